"""Nothing in a step of generation waits for the device, from the embedding to the drawn token."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pyllm.generate import SamplingConfig, Session, generate_ids
from pyllm.generate.device_step import DeviceStep
from pyllm.models import ModelConfig, Transformer, preset, quantize_model

from .small import SMALL, make_model
from .test_native import FAMILY, make
from .waiting import Waits, nothing_waits

WAYS = {
    "greedy": SamplingConfig(greedy=True),
    "whole": SamplingConfig(seed=1, top_p=1.0),
    "all of it": SamplingConfig(seed=1, top_k=9, top_p=0.9, min_p=0.1, repetition_penalty=1.3),
}
PRESETS = {
    name: replace(
        preset(name), vocab_size=97, max_seq_len=64, n_layers=2, d_model=64, d_ff=24, n_experts=4
    )
    for name in ("moe-158m", "moe-158m-gpt")
}


def standing(model: Transformer, way: str = "all of it", **cache: Any) -> DeviceStep:
    """A step of two rows, one of which runs."""
    step = DeviceStep(model, model.new_cache(2, **cache), model.config.vocab_size)
    generators = [torch.Generator().manual_seed(row) for row in range(2)]
    config = WAYS[way]
    seen = torch.zeros(2, model.config.vocab_size, dtype=torch.bool)
    penalised = config.repetition_penalty != 1
    step.begin(config, {3}, generators, seen if penalised else None)
    step.stand({0: 5})
    step.refill()
    return step


@pytest.mark.parametrize("name", [*FAMILY, *PRESETS])
@torch.inference_mode()
def test_no_operator_waits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    step = standing(make({**FAMILY, **PRESETS}[name]))
    with nothing_waits(monkeypatch):
        step.run()
    assert step.out_B[0] >= 0 > step.out_B[1]


@pytest.mark.parametrize("way", WAYS)
@torch.inference_mode()
def test_no_way_of_drawing_waits(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    step = standing(make(FAMILY["mixture"]), way)
    with nothing_waits(monkeypatch):
        step.run()
    assert step.left_B.tolist() == [4, 0]


@pytest.mark.parametrize("quantised", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("name", ["mixture", "sinks"])
@torch.inference_mode()
def test_int8_does_not_wait(name: str, quantised: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(FAMILY[name])
    step = standing(quantize_model(model) if quantised else model, dtype=torch.int8)
    with nothing_waits(monkeypatch):
        step.run()


@pytest.mark.parametrize("name", [*FAMILY, *PRESETS])
@torch.inference_mode()
def test_a_step_runs_where_there_are_no_values(name: str) -> None:
    """On PyTorch's meta device: nothing is read there, and nothing comes from another device."""
    standing(make({**FAMILY, **PRESETS}[name]).to("meta")).run()


@torch.inference_mode()
def test_sixteen_rows_of_two_experts_do_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(FAMILY["mixture"])
    step = DeviceStep(model, model.new_cache(16), model.config.vocab_size)
    step.begin(WAYS["greedy"], (), [], None)
    step.stand(dict.fromkeys(range(16), 3))
    with nothing_waits(monkeypatch):
        step.run()


FAULTS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x.sum()),
    "a condition": lambda x: bool((x > 0).all()),
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "to the CPU": lambda x: x.cpu(),
    "a mask as index": lambda x: x[x > 0],
    "a write by a mask": lambda x: x.clone().index_put_((x > 0,), torch.zeros(())),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "repeats": lambda x: x.flatten()[:2].repeat_interleave(torch.ones(2, dtype=torch.int64)),
    "numbers from the host": lambda x: x + torch.tensor(1.0),
    "equal": lambda x: torch.equal(x, x),
    "bincount": lambda x: torch.bincount(x.flatten().abs().long()),
}


@pytest.mark.parametrize("fault", FAULTS)
@torch.inference_mode()
def test_whoever_adds_one_is_told(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(FAMILY["mixture"])
    step, norm = standing(model), model.blocks[1].ffn_norm
    plain = norm.forward

    def spoilt(x: Tensor) -> Tensor:
        FAULTS[fault](x)
        return plain(x)

    norm.forward = spoilt
    with pytest.raises(Waits), nothing_waits(monkeypatch):
        step.run()


@torch.inference_mode()
def test_the_loop_over_experts_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows than the face for few takes are the reference's."""
    model = make(FAMILY["mixture"])
    step = DeviceStep(model, model.new_cache(40), model.config.vocab_size)
    step.begin(WAYS["greedy"], (), [], None)
    step.stand(dict.fromkeys(range(40), 3))
    with pytest.raises(Waits, match="tolist"), nothing_waits(monkeypatch):
        step.run()


def test_the_ordinary_path_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(ModelConfig(**SMALL))
    model.blocks[0].register_forward_hook(lambda *_: None)  # so that it is not one native call
    with pytest.raises(Waits), nothing_waits(monkeypatch):
        list(generate_ids(model, [3], SamplingConfig(seed=1)))
    assert Session(model).running == []
