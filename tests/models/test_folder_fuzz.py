"""A model folder in which anything may have happened: refused in one line, or loaded right."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from pyllm.models import ModelConfig, Transformer, load_model, save_model
from pyllm.models.durable import MANIFEST
from pyllm.testing.damage import changed, harms
from pyllm.tokenizers import train_bpe

READ = ("model.safetensors", "config.json", "tokenizer.json")
WRITTEN = (*READ, MANIFEST, "tokenizer_config.json", "generation_config.json")


class Folders:
    """A model folder and another one to swap files with; the content of both.

    No dataclass: hypothesis would print all their bytes.
    """

    def __init__(self, folder: Path, contents: list[dict[str, bytes]], model: Transformer) -> None:
        self.folder = folder
        self.others, self.files = contents
        self.state = model.state_dict()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    place = tmp_path_factory.mktemp("fuzz")
    tokenizer = train_bpe(["Once there was a fox. "] * 20, 262)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, max_seq_len=8, n_layers=1, d_model=8, n_heads=2, d_ff=4
    )
    contents = []
    for seed in (1, 0):
        torch.manual_seed(seed)
        model = Transformer(config)
        save_model(place / "model", model, tokenizer)
        contents.append({name: (place / "model" / name).read_bytes() for name in WRITTEN})
    return Folders(place / "model", contents, model)


def load_or_refuse(folder: Path) -> tuple[dict[str, torch.Tensor], ModelConfig] | None:
    """The weights; None where they were refused as they should be."""
    try:
        model, _ = load_model(folder)
    except ValueError as error:
        message = str(error)
        assert "\n" not in message and len(message) < 1000, message
        assert str(folder) in message, message
        return None
    return model.state_dict(), model.config


@pytest.mark.fuzz
@given(harm=harms(WRITTEN))
def test_with_a_manifest_all_damage_is_seen(
    folders: Folders, watchdog: Callable[[], None], harm: tuple[str, Callable[..., Any]]
) -> None:
    watchdog()
    name, change = harm
    content = change(folders.files[name], folders.others[name])
    with changed(folders.folder / name, content):
        loaded = load_or_refuse(folders.folder)
    if loaded is None:
        return
    state = loaded[0]
    assert all(torch.equal(state[key], folders.state[key]) for key in folders.state)
    # Only what is not read may have changed.
    assert name not in READ or content == folders.files[name]


@pytest.mark.fuzz
@given(harm=harms(READ))
def test_without_a_manifest_what_loads_is_what_stands_in_the_files(
    folders: Folders, watchdog: Callable[[], None], harm: tuple[str, Callable[..., Any]]
) -> None:
    """Another program's folder: its parsers meet the damage, and nothing else protects them."""
    watchdog()
    name, change = harm
    folder = folders.folder
    content = change(folders.files[name], folders.others[name])
    with changed(folder / MANIFEST, None), changed(folder / name, content):
        loaded = load_or_refuse(folder)
        if loaded is not None:
            check_against_files(folder, *loaded)


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 70),
    st.sampled_from([2**31, 2**63, 10**30, -(2**63)]),
    st.floats(),
    st.sampled_from(["", "8", "rope", "layer", "gelu", "\n"]),
    st.lists(st.integers(), max_size=2),
    st.just({}),
)
KEYS = st.sampled_from(
    [*ModelConfig.__dataclass_fields__, "model_type", "tokenizer_hash", "eos_token_id", "more"]
)


@pytest.mark.fuzz
@given(key=KEYS, value=VALUES, depth=st.sampled_from([0, 0, 0, 0, 1, 10_000]))
def test_settings_of_any_kind(
    folders: Folders, watchdog: Callable[[], None], key: str, value: Any, depth: int
) -> None:
    watchdog()
    folder = folders.folder
    content = json.loads(folders.files["config.json"]) | {key: value}
    text = json.dumps(content)
    if depth:
        text = text[:-1] + ', "deep": ' + "[" * depth + "]" * depth + "}"
    with changed(folder / MANIFEST, None), changed(folder / "config.json", text.encode()):
        loaded = load_or_refuse(folder)
        if loaded is not None:
            check_against_files(folder, *loaded)


def check_against_files(folder: Path, state: dict[str, torch.Tensor], config: ModelConfig) -> None:
    expected = load_file(folder / "model.safetensors")
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(state[key].nan_to_num(), value.float().nan_to_num())
    settings = json.loads((folder / "config.json").read_bytes())
    for name, value in vars(config).items():
        assert value == (float(settings[name]) if type(value) is float else settings[name])


def test_the_files_are_all_of_them(folders: Folders) -> None:
    assert {path.name for path in folders.folder.iterdir()} == set(WRITTEN)
