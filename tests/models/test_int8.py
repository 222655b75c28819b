"""Int8 models: what they compute, how they are saved and loaded, what they refuse."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import pyllm
from pyllm.export import write_gguf, write_hugging_face
from pyllm.generate import expert_trace
from pyllm.layers.int8 import SCALE
from pyllm.models import (
    Int8Transformer,
    ModelConfig,
    Transformer,
    load_model,
    quantize_folder,
    quantize_model,
    save_model,
)
from pyllm.models.durable import MANIFEST
from pyllm.tokenizers import byte_tokenizer

CONFIG = ModelConfig(
    vocab_size=300,
    max_seq_len=32,
    n_layers=2,
    d_model=32,
    n_heads=4,
    n_kv_heads=2,
    d_ff=24,
    n_experts=3,
    top_k=2,
    n_shared_experts=1,
)
CONFIGS = {
    "mixture": CONFIG,
    "gpt": replace(
        CONFIG,
        norm="layer",
        position="learned",
        activation="gelu",
        tie_embeddings=False,
        router_bias=True,
    ),
    "dense": replace(CONFIG, moe_every=0, n_shared_experts=0),
    "sinusoidal": replace(CONFIG, position="sinusoidal", moe_every=2),
}


def make(config: ModelConfig) -> Transformer:
    torch.manual_seed(0)
    return Transformer(config).eval()


def dequantised(model: Int8Transformer) -> Transformer:
    """A float model with the rounded weights."""
    result = make(model.config)
    state = model.state_dict()
    for name, target in result.state_dict().items():
        value = state[name]
        if name + SCALE in state:
            value = value * state[name + SCALE].unsqueeze(-1)
        target.copy_(value)
    return result


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "floats"
    save_model(folder, make(replace(CONFIG, vocab_size=260)), byte_tokenizer())
    return folder


@pytest.fixture(scope="module")
def ints(floats: Path) -> Path:
    folder = floats.with_name("ints")
    quantize_folder(floats, folder)
    return folder


@torch.inference_mode()
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_losses_are_near(name: str) -> None:
    model = make(CONFIGS[name])
    small = quantize_model(model)
    ids = torch.randint(300, (2, 20), generator=torch.Generator().manual_seed(0))
    exact, got, rounded = (m(ids).logits for m in (model, small, dequantised(small)))
    # Weights and activations each lose half a percent in every product. Of an untrained router
    # some choices flip, so that a few tokens go another way.
    for one, other, most in ((got, exact, 0.05), (got, rounded, 0.05), (rounded, exact, 0.04)):
        errors_BT = (one - other).norm(dim=-1) / other.norm(dim=-1)
        assert 0 < float(errors_BT.median()) < most
    losses = [float(m(ids, ids.roll(-1, 1)).loss) for m in (model, small)]
    assert losses[1] == pytest.approx(losses[0], abs=0.05)


@torch.inference_mode()
def test_losses_of_more_rows_than_are_held_at_once() -> None:
    small = quantize_model(make(CONFIG))
    ids = torch.randint(300, (20, 32), generator=torch.Generator().manual_seed(0))
    targets = ids.roll(-1, 1)
    targets[::3] = -100
    each = small(ids, targets, reduction="none").loss
    logits = small(ids).logits
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), reduction="none"
    )
    torch.testing.assert_close(each.flatten(), expected)
    torch.testing.assert_close(small(ids, targets, reduction="sum").loss, expected.sum())
    mean = expected.sum() / (targets != -100).sum()
    torch.testing.assert_close(small(ids, targets).loss, mean)


def test_what_is_int8_and_what_is_not() -> None:
    state = quantize_model(make(CONFIGS["gpt"])).state_dict()
    floats = {name for name, value in state.items() if value.dtype == torch.float32}
    ints = {name for name, value in state.items() if value.dtype == torch.int8}
    assert floats | ints == state.keys()
    assert {name + SCALE for name in ints} <= floats
    rest = {name for name in floats if not name.endswith(SCALE)}
    assert all("norm" in n or "router" in n or n == "positions.weight" for n in rest)


def test_a_model_is_left_as_it_was() -> None:
    model = make(CONFIG)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    small = quantize_model(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="in int8 already"):
        quantize_model(small)


def test_no_gradients() -> None:
    small = quantize_model(make(CONFIG))
    assert not any(parameter.requires_grad for parameter in small.parameters())
    small.final_norm.weight.requires_grad_()
    ids = torch.tensor([[1, 2, 3]])
    with pytest.raises(ValueError, match="no gradient flows through integers"):
        small(ids)


@torch.inference_mode()
def test_saved_loaded_and_quantised_while_loading(floats: Path, ints: Path) -> None:
    expected = quantize_model(load_model(floats)[0]).state_dict()
    for folder, dtype in ((ints, None), (ints, torch.int8), (floats, torch.int8)):
        model, tokenizer = load_model(folder, dtype=dtype)
        assert isinstance(model, Int8Transformer) and tokenizer.vocab_size == 260
        assert not model.training
        state = model.state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in state.items())
        assert torch.equal(model.rotary.cos, load_model(floats)[0].rotary.cos)
    size = (ints / "model.safetensors").stat().st_size
    assert size < 0.4 * (floats / "model.safetensors").stat().st_size


def test_it_writes_by_every_name(floats: Path, ints: Path) -> None:
    texts = [
        pyllm.load(folder, dtype=dtype).generate("Once", max_new_tokens=20, greedy=True)
        for folder, dtype in ((ints, "auto"), (ints, "int8"), (floats, torch.int8))
    ]
    assert texts[0] == texts[1] == texts[2]
    assert "int8" in repr(pyllm.load(ints))


def test_settings_of_texts_come_along(floats: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(floats, tmp_path / "source"))
    (source / MANIFEST).unlink()
    settings = {"do_sample": True, "temperature": 0.25, "top_p": 0.5, "eos_token_id": 256}
    (source / "generation_config.json").write_text(json.dumps(settings))
    quantize_folder(source, tmp_path / "ints")
    assert pyllm.load(tmp_path / "ints").defaults.temperature == 0.25


def test_what_cannot_be_done_with_it(floats: Path, ints: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="its weights are int8, got dtype torch.float32; load it"):
        load_model(ints, dtype=torch.float32)
    with pytest.raises(ValueError, match="its weights are int8 already"):
        quantize_folder(ints, tmp_path / "again")
    tokenizer = load_model(ints)[1]
    plain = make(replace(CONFIG, vocab_size=260, n_shared_experts=0))
    for write in (write_hugging_face, write_gguf):
        with pytest.raises(ValueError, match="the model's weights are int8, a form of pyllm's own"):
            write(tmp_path / "out", quantize_model(plain), tokenizer)
    write_hugging_face(tmp_path / "hf", plain, tokenizer)
    with pytest.raises(ValueError, match="pyllm did not write this folder; load it with dtype int"):
        quantize_folder(tmp_path / "hf", tmp_path / "hf-int8")
    loaded = load_model(tmp_path / "hf", dtype=torch.int8)[0].state_dict()
    expected = quantize_model(plain).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("embedding.weight", torch.zeros(260, 32), "embedding.weight must hold int8, got torch.fl"),
        (
            "embedding.weight",
            torch.zeros(260, 32, dtype=torch.int16),
            "embedding.weight must hold int8, got torch.int16",
        ),
        ("embedding.weight", torch.zeros(260, 31, dtype=torch.int8), "must have shape"),
        ("embedding.weight", None, "missing tensors"),
        ("embedding.weight_scale", None, "missing tensors"),
        (
            "embedding.weight_scale",
            torch.full((260,), float("nan")),
            "embedding.weight_scale holds a number that is NaN or infinite",
        ),
        ("embedding.weight_scale", torch.zeros(260, dtype=torch.int8), "must hold floats"),
        (
            "embedding.weight_scale",
            torch.full((260,), 1e300, dtype=torch.float64),
            "embedding.weight_scale holds a number that is NaN or infinite",
        ),
    ],
)
def test_damaged_files(
    ints: Path, tmp_path: Path, name: str, value: torch.Tensor | None, message: str
) -> None:
    folder = Path(shutil.copytree(ints, tmp_path / "model"))
    (folder / MANIFEST).unlink()
    weights = load_file(folder / "model.safetensors")
    weights.pop(name)
    if value is not None:
        weights[name] = value
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        load_model(folder)


@pytest.mark.parametrize("claim", ["int4", 8, None])
def test_another_quantisation_is_refused(ints: Path, tmp_path: Path, claim: object) -> None:
    folder = Path(shutil.copytree(ints, tmp_path / "model"))
    (folder / MANIFEST).unlink()
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"quantization": claim}))
    with pytest.raises(ValueError, match="quantization must be int8, got"):
        load_model(folder)


def test_floats_that_claim_to_be_ints(floats: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(floats, tmp_path / "model"))
    (folder / MANIFEST).unlink()
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"quantization": "int8"}))
    with pytest.raises(ValueError, match="missing tensors"):
        load_model(folder)


def test_weights_that_are_not_finite(floats: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(floats, tmp_path / "model"))
    (folder / MANIFEST).unlink()
    weights = load_file(folder / "model.safetensors")
    weights["blocks.0.ffn.w_in"][1, 2, 3] = float("inf")
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"blocks.0.ffn.w_in, from row 0: .* finite, .* row 50$"):
        load_model(folder, dtype=torch.int8)


@pytest.mark.parametrize("name", ["final_norm.weight", "embedding.weight"])
def test_other_kinds_of_numbers(floats: Path, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(floats, tmp_path / "model"))
    (folder / MANIFEST).unlink()
    weights = load_file(folder / "model.safetensors")
    weights[name] = torch.ones(weights[name].shape, dtype=torch.int64)
    save_file(weights, folder / "model.safetensors")
    for dtype in (None, torch.int8):
        with pytest.raises(ValueError, match=f"{name} must hold floats, got torch.int64"):
            load_model(folder, dtype=dtype)


def test_it_begins_as_zeros() -> None:
    state = Int8Transformer(CONFIGS["gpt"]).state_dict()
    assert not any(bool(value.any()) for value in state.values())


def test_larger_than_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyllm._memory.memory_bytes", lambda: 1000)
    with pytest.raises(ValueError, match="an int8 model of .* takes .* of memory, and this machin"):
        Int8Transformer(CONFIG)


def test_which_expert_wrote_which_word() -> None:
    small = quantize_model(make(CONFIG))
    traced = expert_trace(small, [1, 2, 3, 4])
    assert traced.shape == (2, 4, 2)
    assert torch.equal(traced[0], expert_trace(make(CONFIG), [1, 2, 3, 4])[0])


LOADS = """
import sys, torch
import pyllm.models
pyllm.models.load_model(sys.argv[2], dtype=torch.int8)  # what comes with the first of all
from pyllm.generate import peak_memory_bytes
cpu = torch.device("cpu")
before = peak_memory_bytes(cpu)
model, _ = pyllm.models.load_model(sys.argv[1], dtype=torch.int8)
print(peak_memory_bytes(cpu) - before)
"""


def test_the_float_weights_are_never_whole_in_memory(floats: Path, tmp_path: Path) -> None:
    config = replace(
        CONFIG, vocab_size=260, d_model=512, n_heads=8, d_ff=1024, n_experts=8, n_layers=6
    )
    save_model(tmp_path / "floats", make(config), byte_tokenizer())
    quantize_folder(tmp_path / "floats", tmp_path / "ints")
    ints = (tmp_path / "ints" / "model.safetensors").stat().st_size
    grown = [
        int(
            subprocess.check_output(
                [sys.executable, "-c", LOADS, str(tmp_path / name), str(floats)], text=True
            )
        )
        for name in ("ints", "floats")
    ]
    # One tensor of the file is mapped while it is read, four times as large in floats, and some of
    # it is held a few times more while it is rounded. All floats would be four times the ints.
    assert 0.9 * ints < grown[0] < 1.5 * ints, (grown, ints)
    assert 0.9 * ints < grown[1] < 2.5 * ints, (grown, ints)
