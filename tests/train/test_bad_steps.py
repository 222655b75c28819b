"""Steps whose gradient is not finite: left out, counted, and the end after a few in a row."""

import copy
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from pyllm.data import write_stories
from pyllm.models import ModelConfig, ModelOutput
from pyllm.train import DataConfig, RunConfig, TrainConfig, Trainer, TrainingError, run_training
from pyllm.train import trainer as trainer_module
from pyllm.train.log import RunLog, draw, read_metrics

CheckpointCall = Callable[[Trainer, Path], None]


def everything(trainer: Trainer) -> list[Any]:
    """Copies of all tensors and numbers that a step may change."""
    optimizers = [optimizer.state_dict()["state"] for optimizer in trainer.optimizers]
    return copy.deepcopy([trainer.model.state_dict(), *optimizers])


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def spoil(
    trainer: Trainer,
    monkeypatch: pytest.MonkeyPatch,
    passes: Iterable[int],
    how: str = "loss",
) -> None:
    """Put a NaN into the forward passes with these numbers."""
    forward, counter, bad = trainer.model.forward, iter(range(10**6)), set(passes)

    def spoiled(*args: Any, **kwargs: Any) -> ModelOutput:
        if next(counter) not in bad:
            return forward(*args, **kwargs)
        if how == "loss":
            output = forward(*args, **kwargs)
            return output._replace(loss=output.loss * math.nan)
        # As an overflow comes in real life: somewhere in the middle, on its way through the rest.
        hook = trainer.model.blocks[0].attention.register_forward_hook(
            lambda module, inputs, output: output * math.inf * 0
        )
        try:
            return forward(*args, **kwargs)
        finally:
            hook.remove()

    monkeypatch.setattr(trainer.model, "forward", spoiled)


def train(trainer: Trainer, folder: Path) -> None:
    with RunLog(
        folder,
        trainer.config.max_steps,
        trainer.progress.step,
        Console(quiet=True),
        trainer.progress.logs,
    ) as log:
        trainer.train(log)


@pytest.mark.parametrize("how", ["loss", "activation"])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_bad_step_leaves_everything_bitwise(
    make_trainer: Callable[..., Trainer],
    monkeypatch: pytest.MonkeyPatch,
    how: str,
    optimizer: str,
    accumulation: int,
) -> None:
    """Also where only one micro-batch of the step is bad."""
    trainer = make_trainer(optimizer=optimizer, accumulation=accumulation)
    for step in range(2):
        trainer.step(step)
    spoil(trainer, monkeypatch, passes=[accumulation // 2], how=how)
    before = everything(trainer)
    skipped = trainer.step(2)
    assert math.isnan(skipped["train_loss"]) and math.isnan(skipped["grad_norm"])
    assert skipped["skipped_steps"] == 1
    assert same(everything(trainer), before)
    after = trainer.step(3)
    assert math.isfinite(after["train_loss"]) and after["skipped_steps"] == 1
    assert not same(everything(trainer), before)
    assert all(value.isfinite().all() for value in trainer.model.state_dict().values())


def test_a_run_with_bad_steps_still_learns(
    make_trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bad = [3, 4, 5, 6, 12, 20, 21, 33]
    trainer = make_trainer(max_steps=40, learning_rate=1e-2, eval_every=40)
    spoil(trainer, monkeypatch, passes=bad, how="activation")
    train(trainer, tmp_path)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["step"] - 1 for row in rows if row["train_loss"] is None] == bad
    assert [row["step"] - 1 for row in rows if row["grad_norm"] is None] == bad
    assert rows[-1]["skipped_steps"] == trainer.progress.skipped_steps == len(bad)
    assert rows[-1]["train_loss"] < rows[0]["train_loss"] - 1
    draw(tmp_path)
    assert (tmp_path / "loss.png").is_file() and (tmp_path / "expert_load.png").is_file()


def test_five_in_a_row_end_the_run_with_the_weights_before_them(
    make_trainer: Callable[..., Trainer],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    load: CheckpointCall,
) -> None:
    trainer = make_trainer(max_steps=30)
    # Four bad ones and a good one do not end it: five in a row do.
    spoil(trainer, monkeypatch, passes=[2, 3, 4, 5, 7, 8, 9, 10, 11])
    with pytest.raises(
        TrainingError,
        match=r"not finite \(nan\) for 5 steps in a row, up to step 12; .*last holds the weights "
        r"before them; start a run with a lower --train.learning-rate, or with --train.dtype",
    ) as caught:
        train(trainer, tmp_path)
    assert "\n" not in str(caught.value)
    assert len(read_metrics(tmp_path)) == 12
    assert trainer.progress.skipped_steps == 9
    good = make_trainer(max_steps=30)
    spoil(good, monkeypatch, passes=[2, 3, 4, 5])
    for step in range(7):
        good.step(step)
    resumed = make_trainer(max_steps=30)
    load(resumed, tmp_path / "last")
    assert resumed.progress.step == 12
    assert same(everything(resumed), everything(good))


def test_the_count_survives_kill_and_resume(
    make_trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Three bad steps, a kill, two more: five in a row."""
    before = make_trainer(max_steps=30, save_every=3)
    spoil(before, monkeypatch, passes=[0, 1, 2])
    monkeypatch.setattr(trainer_module.Trainer, "validate", lambda self: math.nan)

    class Kill(BaseException):
        pass

    step = trainer_module.Trainer.step

    def dying(self: Trainer, number: int) -> dict[str, Any]:
        if number == 4:
            raise Kill
        return step(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module.Trainer, "step", dying)
        with pytest.raises(Kill):
            train(before, tmp_path)
    after = make_trainer(max_steps=30, save_every=3)
    after.resume()
    assert after.progress.step == 3 and after.progress.bad_in_a_row == 3
    spoil(after, monkeypatch, passes=[0, 1])
    with pytest.raises(TrainingError, match="for 5 steps in a row, up to step 5"):
        train(after, tmp_path)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]


def test_a_nan_in_validation_is_never_the_best(
    make_trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    losses = iter([math.nan, 5.0, math.nan, math.inf, 6.0])
    trainer = make_trainer(max_steps=5, eval_every=1)
    monkeypatch.setattr(trainer, "validate", lambda: next(losses))
    saved = []
    save = trainer.save
    monkeypatch.setattr(trainer, "save", lambda name, log: (saved.append(name), save(name, log)))
    train(trainer, tmp_path)
    assert saved == ["best", "last"]
    assert trainer.progress.best_val_loss == 5.0
    state = json.loads((tmp_path / "best" / "train_state" / "state.json").read_text())
    assert state["progress"]["step"] == 2
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["val_loss"] for row in rows] == [None, 5.0, None, None, 6.0]


def test_a_run_without_a_finite_validation_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny: ModelConfig, quick: dict[str, Any]
) -> None:
    text = "\n<|endoftext|>\n".join(write_stories(60, 0, "train"))
    (tmp_path / "train.txt").write_text(text)
    monkeypatch.setattr(trainer_module.Trainer, "validate", lambda self: math.nan)
    config = RunConfig(
        out=str(tmp_path / "run"),
        model=tiny,
        data=DataConfig(data=str(tmp_path / "train.txt")),
        train=TrainConfig(**(quick | {"max_steps": 3})),
    )
    with pytest.raises(TrainingError, match="no validation loss was finite, .*/last holds the"):
        run_training(config, Console(quiet=True))
    assert (tmp_path / "run" / "last").is_dir() and not (tmp_path / "run" / "best").exists()


def test_loss_scaling_skips_overflows_and_gives_up_at_scale_one(
    make_trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """float16: an overflow halves the scale and is no sign of harm, until the scale is 1."""
    trainer = make_trainer(max_steps=60, save_every=100)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    for step in range(2):
        trainer.step(step)
    spoil(trainer, monkeypatch, passes=range(1000))
    before = everything(trainer)
    trainer.progress.step = 2
    with pytest.raises(TrainingError, match="5 steps in a row, up to step 11"):
        train(trainer, tmp_path)  # four halvings from 16 to 1, then five
    assert trainer.progress.skipped_steps == 9 and trainer.scaler.get_scale() < 1
    assert same(everything(trainer), before)


def test_loss_scaling_recovers(
    make_trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    scaled, plain = make_trainer(), make_trainer()
    scaled.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    spoil(scaled, monkeypatch, passes=[1])
    assert scaled.step(0)["grad_norm"] == pytest.approx(plain.step(0)["grad_norm"], rel=1e-4)
    before = everything(scaled)
    scaled.step(1)
    assert same(everything(scaled), before) and scaled.scaler.get_scale() == 2.0**15
    scaled.step(2)
    assert not same(everything(scaled), before)
    assert scaled.progress.bad_in_a_row == 0 and scaled.progress.skipped_steps == 1
