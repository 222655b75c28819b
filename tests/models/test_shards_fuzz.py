"""A Hugging Face folder to which anything may have happened: refused in one line, or right."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from pyllm.models import Transformer, load_transformer
from pyllm.models.hugging_face import DEFAULTS, read_settings, tensor_parts
from pyllm.models.shards import INDEX, split_rows
from pyllm.testing.damage import changed, harms

SETTINGS: dict[str, Any] = {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 4,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 8,
    "num_local_experts": 2,
    "rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 4},
}
SHARDS = ("model-0.safetensors", "model-1.safetensors")
FILES = ("config.json", INDEX, *SHARDS)


def write(folder: Path, seed: int) -> dict[str, bytes]:
    torch.manual_seed(seed)
    model = Transformer(read_settings(SETTINGS))
    state = model.state_dict()
    tensors = {
        part.name: rows.clone()
        for name, parts in tensor_parts(model.config)
        for part, rows in zip(parts, split_rows(state[name], parts), strict=True)
    }
    weight_map = {name: SHARDS[number % 2] for number, name in enumerate(tensors)}
    for file in SHARDS:
        held = {name: tensor for name, tensor in tensors.items() if weight_map[name] == file}
        save_file(held, folder / file)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(SETTINGS))
    return {name: (folder / name).read_bytes() for name in FILES}


class Folder:
    """A folder, its files, and those of another model. No dataclass: hypothesis would print it."""

    def __init__(self, path: Path) -> None:
        self.others, self.files = write(path, 1), write(path, 0)
        self.path = path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    return Folder(tmp_path_factory.mktemp("fuzz"))


def load_or_refuse(folder: Path) -> Transformer | None:
    """None where it was refused as it should be."""
    try:
        return load_transformer(folder)
    except ValueError as error:
        message = str(error)
        assert "\n" not in message and len(message) < 1000, message
        assert str(folder) in message, message
        return None


def check_against_files(folder: Path, model: Transformer) -> None:
    held = [load_file(folder / name) for name in SHARDS]
    state = model.state_dict()
    for name, parts in tensor_parts(model.config):
        for part, rows in zip(parts, split_rows(state[name], parts), strict=True):
            (expected,) = (tensors[part.name] for tensors in held if part.name in tensors)
            assert torch.equal(rows.nan_to_num(), expected.to(rows.dtype).nan_to_num())


@pytest.mark.fuzz
@given(harm=harms(FILES))
def test_what_loads_is_what_stands_in_the_files(
    folder: Folder, watchdog: Callable[[], None], harm: tuple[str, Callable[..., Any]]
) -> None:
    watchdog()
    name, change = harm
    with changed(folder.path / name, change(folder.files[name], folder.others[name])):
        model = load_or_refuse(folder.path)
        if model is not None:
            check_against_files(folder.path, model)


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 70),
    st.sampled_from([2**31, 2**63, 10**30, -(2**63), 10**400]),
    st.floats(),
    st.sampled_from(["", "8", "llama", "mistral", "linear", "silu", "\n"]),
    st.lists(st.integers(), max_size=2),
    st.just({}),
)
KEYS = sorted(
    {key for family in DEFAULTS.values() for key in family}
    | SETTINGS.keys()
    | {"head_dim", "tie_word_embeddings", "rope_parameters", "original_max_position_embeddings"}
    | {"hidden_act", "attention_bias", "quantization_config", "partial_rotary_factor", "more"}
)
SCALINGS = st.dictionaries(
    st.sampled_from(
        [
            *("rope_type", "type", "factor", "rope_theta", "original_max_position_embeddings"),
            *("beta_fast", "attention_factor", "low_freq_factor", "high_freq_factor", "more"),
        ]
    ),
    st.one_of(VALUES, st.sampled_from(["linear", "llama3", "yarn", "default"]), st.just(4.0)),
)


@pytest.mark.fuzz
@given(key=st.sampled_from(KEYS), value=st.one_of(VALUES, SCALINGS))
def test_settings_of_any_kind(
    folder: Folder, watchdog: Callable[[], None], key: str, value: Any
) -> None:
    watchdog()
    settings = SETTINGS | {key: value}
    with changed(folder.path / "config.json", json.dumps(settings).encode()):
        model = load_or_refuse(folder.path)
        if model is not None:
            check_against_files(folder.path, model)
