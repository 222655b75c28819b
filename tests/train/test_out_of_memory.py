"""Memory runs out at every possible moment: the step is done all the same, in smaller pieces."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from pyllm.models import Transformer
from pyllm.train import Muon, RunConfig, Trainer, TrainingError, run_training
from pyllm.train.log import RunLog, read_metrics

CheckpointCall = Callable[[Trainer, Path], None]
ERRORS = {
    "of the GPU": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    "of a kernel": lambda: MemoryError("moe_ffn: no room for its workspace"),
    "of PyTorch on the CPU": lambda: RuntimeError(
        "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."
    ),
    "of a library": lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling it"),
}


class Full:
    """Memory runs out where more than ``most`` sequences are computed at once.

    Args:
        moment: ``forward``, or ``backward``: in the middle of either.
    """

    def __init__(
        self,
        trainer: Trainer,
        moment: str,
        most: int,
        error: Callable[[], Exception] = ERRORS["of the GPU"],
    ) -> None:
        self.most, self.error, self.failures = most, error, 0
        attention = trainer.model.blocks[0].attention
        if moment == "forward":
            attention.register_forward_hook(lambda module, inputs, output: self.check(output))
        else:
            attention.register_full_backward_hook(lambda module, down, up: self.check(up[0]))

    def check(self, tensor: Tensor) -> None:
        if tensor.shape[0] > self.most:
            self.failures += 1
            raise self.error()


def train(trainer: Trainer, steps: int = 4) -> list[dict[str, Any]]:
    return [trainer.step(step) for step in range(steps)]


def state(trainer: Trainer) -> dict[str, Tensor]:
    kept = {
        f"{number}.{index}.{name}": value.clone()
        for number, optimizer in enumerate(trainer.optimizers)
        for index, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
    }
    return kept | {name: value.clone() for name, value in trainer.model.state_dict().items()}


def check_close(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.allclose(value, other[name], rtol=1e-3, atol=2e-4), name


@pytest.mark.parametrize("moment", ["forward", "backward"])
@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
def test_the_step_is_done_again_with_half_the_sequences(
    make_trainer: Callable[..., Trainer], moment: str, error: Callable[[], Exception]
) -> None:
    """The balance loss is one of a micro-batch; without it the results are the same."""
    settings: dict[str, Any] = {"balance_coef": 0.0, "optimizer": "adamw", "accumulation": 2}
    roomy, small = make_trainer(**settings), make_trainer(**settings)
    full = Full(small, moment, most=2, error=error)
    expected, found = train(roomy), train(small)
    assert full.failures == 2, "8, then 4: and never again"
    assert [row["micro_batch"] for row in expected] == [8] * 4
    assert [row["micro_batch"] for row in found] == [2] * 4
    for one, other in zip(expected, found, strict=True):
        for name in ("train_loss", "z_loss", "grad_norm", "expert_load_max_over_mean", "lr"):
            assert one[name] == pytest.approx(other[name], rel=1e-3), name
    check_close(state(roomy), state(small))


def test_the_pieces_are_the_same_as_an_accumulation_that_was_asked_for(
    make_trainer: Callable[..., Trainer],
) -> None:
    asked = make_trainer(batch_size=2, accumulation=8)
    small = make_trainer(batch_size=8, accumulation=2)
    Full(small, "forward", most=2)
    one, other = train(asked), train(small)
    assert [row["train_loss"] for row in one] == [row["train_loss"] for row in other]
    for name, value in state(asked).items():
        assert torch.equal(value, state(small)[name]), name


@pytest.mark.parametrize(("batch_size", "sizes"), [(6, [6, 3, 1]), (5, [5, 1]), (9, [9, 3, 1])])
def test_pieces_of_a_batch_are_equal(
    make_trainer: Callable[..., Trainer], batch_size: int, sizes: list[int]
) -> None:
    trainer = make_trainer(batch_size=batch_size)
    seen = []
    for most in sizes:
        Full(trainer, "forward", most=most)
        seen.append(trainer.step(0)["micro_batch"])
    assert seen == sizes


def test_memory_that_runs_out_late_in_the_step(make_trainer: Callable[..., Trainer]) -> None:
    """In the last micro-batch: what the others have added to the gradients is forgotten."""
    settings: dict[str, Any] = {"balance_coef": 0.0, "accumulation": 3, "batch_size": 4}
    roomy, small = make_trainer(**settings), make_trainer(**settings)
    counter = iter(range(100))

    def fail_once(module: object, inputs: object, output: Tensor) -> None:
        if next(counter) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    small.model.blocks[1].attention.register_forward_hook(fail_once)
    one, other = roomy.step(0), small.step(0)
    assert other["micro_batch"] == 2
    assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


def test_memory_that_runs_out_while_the_gradient_is_unscaled(
    make_trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scaler refuses to unscale twice in a step, and the scale must survive."""
    settings: dict[str, Any] = {"balance_coef": 0.0}
    roomy, small = make_trainer(**settings), make_trainer(**settings)
    for trainer in (roomy, small):
        trainer.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    norm, failures = torch.nn.utils.get_total_norm, iter([True])

    def fail_once(gradients: list[Tensor]) -> Tensor:
        if next(failures, False):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return norm(gradients)

    expected = train(roomy)
    monkeypatch.setattr(torch.nn.utils, "get_total_norm", fail_once)
    found = train(small)
    assert [row["micro_batch"] for row in found] == [4] * 4
    assert small.scaler.get_scale() == roomy.scaler.get_scale() == 1024.0
    for one, other in zip(expected, found, strict=True):
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("at", ["the state", "the update"])
@pytest.mark.parametrize("number", [0, 1, 5])
@pytest.mark.parametrize("scaled", [False, True])
def test_memory_that_runs_out_in_the_optimizer(
    make_trainer: Callable[..., Trainer],
    monkeypatch: pytest.MonkeyPatch,
    at: str,
    number: int,
    scaled: bool,
) -> None:
    """Some matrices are updated then, and must not be updated twice."""
    roomy, small = make_trainer(), make_trainer()
    if scaled:
        for trainer in (roomy, small):
            trainer.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    expected = train(roomy)
    module = "pyllm.train.muon.orthogonalise" if at == "the update" else "torch.zeros_like"
    patched = __import__("pyllm.train.muon", fromlist=["muon"])
    work = patched.orthogonalise if at == "the update" else torch.zeros_like
    counter = iter(range(10**6))

    def fail_once(*arguments: Any, **options: Any) -> Tensor:
        if next(counter) == number:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return work(*arguments, **options)

    monkeypatch.setattr(module, fail_once)
    first = small.step(0)
    assert first["micro_batch"] == 4, "from the next step on; this one's gradients were there"
    assert first["grad_norm"] == expected[0]["grad_norm"]
    monkeypatch.undo()
    once = make_trainer()
    if scaled:
        once.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    once.step(0)
    for name, value in state(once).items():
        assert torch.equal(value, state(small)[name]), name


def test_a_half_made_state_of_adamw_begins_anew(
    make_trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    roomy, small = (make_trainer(optimizer="adamw") for _ in range(2))
    zeros, counter = torch.zeros_like, iter(range(10**6))

    def fail_once(*arguments: Any, **options: Any) -> Tensor:
        if next(counter) == 5:  # the first moment of the third parameter is there, its second not
            raise torch.OutOfMemoryError("CUDA out of memory")
        return zeros(*arguments, **options)

    roomy.step(0)
    monkeypatch.setattr(torch, "zeros_like", fail_once)
    small.step(0)
    assert next(counter) > 6, "it failed on the way"
    for name, value in state(roomy).items():
        assert torch.equal(value, state(small)[name]), name


def test_an_optimizer_that_never_fits_is_an_error(
    make_trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer()

    def fail(self: Muon, closure: object = None) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory\nwith advice")

    monkeypatch.setattr(Muon, "step", fail)
    with pytest.raises(
        TrainingError,
        match=r"^out of memory on cpu in the optimizer's step \(CUDA out of memory\); start a run "
        r"with --train.recompute, --train.optimizer adamw8bit, a shorter --train.seq-len or a "
        r"smaller --preset$",
    ):
        trainer.step(0)


def test_one_sequence_that_does_not_fit_is_an_error(make_trainer: Callable[..., Trainer]) -> None:
    trainer = make_trainer(batch_size=4, recompute=True)
    before = state(trainer)
    full = Full(trainer, "backward", most=0)
    with pytest.raises(
        TrainingError,
        match=r"^out of memory on cpu with one sequence of 32 tokens at a time \(CUDA out of "
        r"memory. Tried to allocate 2 GiB\); start a run with --train.optimizer adamw8bit, a "
        r"shorter --train.seq-len or a smaller --preset$",
    ):
        trainer.step(0)
    assert full.failures == 3
    assert all(torch.equal(value, before[name]) for name, value in state(trainer).items())
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


def test_another_error_is_not_taken_for_it(make_trainer: Callable[..., Trainer]) -> None:
    trainer = make_trainer()
    Full(trainer, "forward", most=0, error=lambda: RuntimeError("a bug of ours"))
    with pytest.raises(RuntimeError, match="a bug of ours"):
        trainer.step(0)
    assert trainer.micro_batch == 8


def test_it_is_logged_and_a_resumed_run_remembers(
    make_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    trainer = make_trainer(max_steps=2, save_every=1, batch_size=8, accumulation=2)
    full = Full(trainer, "forward", most=4)
    console = Console(record=True, width=200, file=io.StringIO())
    with RunLog(tmp_path, 2, 0, console) as log:
        trainer.train(log)
    assert full.failures == 1, "the validation takes no more at a time than the training"
    assert (
        "step 1: out of memory with 8 sequences at a time; from here on 4 at a time, 4 times a step"
        in console.export_text()
    )
    assert [row["micro_batch"] for row in read_metrics(tmp_path)] == [4, 4]
    resumed = make_trainer(max_steps=2, save_every=1, batch_size=8, accumulation=2)
    resumed.resume()
    assert resumed.micro_batch == 4
    assert trainer.validate() == resumed.validate()


def test_a_micro_batch_that_no_run_can_have_is_refused(
    make_trainer: Callable[..., Trainer], tmp_path: Path, save: CheckpointCall, load: CheckpointCall
) -> None:
    trainer = make_trainer()
    trainer.progress.micro_batch = 3
    save(trainer, tmp_path / "last")
    with pytest.raises(ValueError, match="3 sequences at a time do not fit a batch"):
        load(make_trainer(), tmp_path / "last")


def test_a_run_says_it_in_one_line(
    make_run: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Transformer, *arguments: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Transformer, "forward", full)
    config = make_run(tmp_path, max_steps=2)
    with pytest.raises(ValueError, match="^out of memory on cpu with one sequence of 16 tokens"):
        run_training(config, Console(quiet=True))
    assert not (tmp_path / "whole" / "config.json").exists(), "a run that cannot be gone on with"
