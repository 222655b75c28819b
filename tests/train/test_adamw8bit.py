"""AdamW with a state of 8 bits, for real where bitsandbytes is installed (it runs on a CPU too)."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from pyllm.models import ModelConfig, Transformer
from pyllm.train import RunConfig, TrainConfig, Trainer, run_training
from pyllm.train.adamw8bit import _library, is_adamw8bit
from pyllm.train.checkpoint import OPTIMIZER
from pyllm.train.optimizer import empty_state, kept_state, make_optimizers, split_parameters

CheckpointCall = Callable[[Trainer, Path], None]
installed = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None,
    reason="bitsandbytes is not installed: pip install 'pyllm[gpu]'",
)


@pytest.fixture
def make(make_trainer: Callable[..., Trainer]) -> Callable[..., Trainer]:
    """Trainers with the 8-bit optimizer; their experts are large enough for it, the projections of
    the attention are not."""
    return lambda **settings: make_trainer(optimizer="adamw8bit", **settings)


def state(trainer: Trainer) -> list[Any]:
    return [optimizer.state_dict()["state"] for optimizer in trainer.optimizers]


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other)


@installed
def test_what_is_expected_is_what_a_step_leaves(make: Callable[..., Trainer]) -> None:
    trainer = make()
    trainer.step(0)
    plain, eight = trainer.optimizers
    assert is_adamw8bit(eight) and not is_adamw8bit(plain)
    for optimizer in trainer.optimizers:
        left = {
            index: {name: (value.shape, value.dtype) for name, value in values.items()}
            for index, values in optimizer.state_dict()["state"].items()
        }
        assert left == {
            index: {name: (value.shape, value.dtype) for name, value in values.items()}
            for index, values in empty_state(optimizer).items()
        }
    dtypes = {values["state1"].dtype for values in eight.state_dict()["state"].values()}
    assert dtypes == {torch.uint8, torch.float32}


@installed
def test_it_learns_as_adamw_does(
    make: Callable[..., Trainer], make_trainer: Callable[..., Trainer]
) -> None:
    losses = [
        [trainer.step(step)["train_loss"] for step in range(30)]
        for trainer in (
            make(learning_rate=1e-2, max_steps=30),
            make_trainer(optimizer="adamw", learning_rate=1e-2, max_steps=30),
        )
    ]
    assert losses[0][-1] < losses[0][0] - 1
    assert losses[0][-1] == pytest.approx(losses[1][-1], rel=0.02)
    assert losses[0] != losses[1]


@installed
def test_a_resumed_run_goes_on_bit_for_bit(
    make: Callable[..., Trainer], save: CheckpointCall, load: CheckpointCall, tmp_path: Path
) -> None:
    trainer = make()
    for step in range(3):
        trainer.step(step)
    trainer.progress.step = 3
    save(trainer, tmp_path / "last")
    tensors = load_file(tmp_path / "last" / OPTIMIZER)
    assert any(value.dtype == torch.uint8 and value.dim() == 3 for value in tensors.values())
    resumed = make()
    load(resumed, tmp_path / "last")
    for each in (trainer, resumed):
        metrics = [each.step(step) for step in range(3, 6)]
    assert metrics[-1]["train_loss"] > 0
    assert same(state(trainer), state(resumed))
    assert same(dict(trainer.model.state_dict()), dict(resumed.model.state_dict()))


@installed
def test_a_checkpoint_of_another_optimizer_is_refused(
    make: Callable[..., Trainer],
    make_trainer: Callable[..., Trainer],
    save: CheckpointCall,
    load: CheckpointCall,
    tmp_path: Path,
) -> None:
    trainer = make()
    trainer.step(0)
    trainer.progress.step = 1
    save(trainer, tmp_path / "last")
    with pytest.raises(ValueError, match="train.optimizer was 'adamw8bit', here 'adamw'"):
        load(make_trainer(optimizer="adamw"), tmp_path / "last")


@installed
def test_a_step_that_is_not_finite_leaves_everything(
    make: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make()
    trainer.step(0)
    before = state(trainer)
    forward = trainer.model.forward

    def spoiled(*arguments: Any) -> Any:
        output = forward(*arguments)
        return output._replace(loss=output.loss * float("nan"))

    kept = [{i: {n: v.clone() for n, v in s.items()} for i, s in each.items()} for each in before]
    monkeypatch.setattr(trainer.model, "forward", spoiled)
    assert trainer.step(1)["skipped_steps"] == 1
    assert same(state(trainer), kept)


@installed
@pytest.mark.parametrize("number", [0, 1, 3])
def test_no_matrix_is_updated_twice_where_memory_runs_out(
    make: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    roomy, small = make(), make()
    base = _library().__mro__[2]
    work, counter = base.update_step, iter(range(10**6))

    def fail_once(self: Any, group: Any, p: Any, gindex: int, pindex: int) -> None:
        if next(counter) == number:
            self.state[p]["step"] += 1  # as the library does before it calls its kernel
            raise torch.OutOfMemoryError("CUDA out of memory")
        work(self, group, p, gindex, pindex)

    for trainer in (roomy, small):
        trainer.step(0)
    roomy.step(1)
    monkeypatch.setattr(base, "update_step", fail_once)
    assert small.step(1)["micro_batch"] == 4
    assert same(state(roomy), state(small))
    assert same(dict(roomy.model.state_dict()), dict(small.model.state_dict()))


def test_the_state_is_a_quarter_of_adamws() -> None:
    model = Transformer(ModelConfig(n_layers=1))

    def bytes_of(kind: str) -> int:
        return sum(t.nbytes for kept in kept_state(model, kind).values() for t in kept.values())

    saved = bytes_of("adamw") - bytes_of("adamw8bit")
    _, matrices = split_parameters(model)
    # 8 bytes a number become 2, and 2 float32 in a block of 256.
    assert saved == (8 - 2 - 8 / 256) * sum(matrix.numel() for matrix in matrices)


def missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    _library.cache_clear()


def test_without_the_library_it_says_what_to_do(
    make_run: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing(monkeypatch)
    config = make_run(tmp_path, max_steps=2, optimizer="adamw8bit")
    with pytest.raises(
        ValueError,
        match=r"^train.optimizer adamw8bit needs bitsandbytes, which .*: pip install "
        r"'pyllm\[gpu\]', or give --train.optimizer adamw or muon$",
    ):
        run_training(config, Console(quiet=True))
    assert not (tmp_path / "whole" / "config.json").exists()
    assert not (tmp_path / "whole" / "tokens").exists(), "found out before the text was read"
    _library.cache_clear()


def test_the_wiring_with_a_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the library is not installed: which parameters it is handed, and how."""
    given: dict[str, Any] = {}

    class StandIn(torch.optim.SGD):
        def __init__(self, params: Any, **settings: Any) -> None:
            given.update(settings, params=list(params))
            super().__init__(given["params"], lr=settings["lr"])

        def init_state(self) -> None: ...

        def update_step(self) -> None: ...

    module = ModuleType("bitsandbytes.optim")
    module.AdamW8bit = StandIn  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace(optim=module))
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", module)
    _library.cache_clear()
    model = Transformer(ModelConfig(n_layers=1, vocab_size=64))
    config = TrainConfig(optimizer="adamw8bit", learning_rate=0.25, beta2=0.9)
    plain, eight = make_optimizers(model, config)
    assert is_adamw8bit(eight) and isinstance(plain, torch.optim.AdamW)
    names = {p: n for n, p in model.named_parameters()}
    assert sorted(names[p] for p in given.pop("params")) == [
        "blocks.0.attention.out_proj.weight",
        "blocks.0.attention.qkv_proj.weight",
        "blocks.0.ffn.w_in",
        "blocks.0.ffn.w_out",
    ]
    assert given == {"lr": 0.25, "betas": (0.9, 0.9), "weight_decay": config.weight_decay}
    _library.cache_clear()
