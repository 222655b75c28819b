"""The optimizers of a checkpoint: each tensor is checked, settings are never read."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pyllm.models.durable import MANIFEST, read_manifest, write_manifest
from pyllm.train import Trainer
from pyllm.train.checkpoint import OPTIMIZER, STATE
from pyllm.train.optimizer import empty_state

CheckpointCall = Callable[[Trainer, Path], None]


def resign(folder: Path) -> None:
    """Let the manifest vouch for what is there now."""
    write_manifest(folder, [name for name in read_manifest(folder) or {} if name != MANIFEST])


@pytest.fixture
def last(make_trainer: Callable[..., Trainer], tmp_path: Path, save: CheckpointCall) -> Path:
    """The checkpoint of the first step."""
    trainer = make_trainer()
    trainer.step(0)
    trainer.progress.step = 1
    save(trainer, tmp_path / "last")
    return tmp_path / "last"


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_what_is_expected_is_what_a_step_leaves(
    make_trainer: Callable[..., Trainer], optimizer: str
) -> None:
    trainer = make_trainer(optimizer=optimizer)
    trainer.step(0)
    for each in trainer.optimizers:
        left = each.state_dict()["state"]
        expected = empty_state(each)
        assert left.keys() == expected.keys()
        for index, values in left.items():
            assert {name: (value.shape, value.dtype) for name, value in values.items()} == {
                name: (value.shape, value.dtype) for name, value in expected[index].items()
            }


@pytest.mark.parametrize(
    ("setting", "value"),
    [("betas", ["a", "b"]), ("maximize", True), ("weight_decay", float("nan")), ("eps", None)],
)
def test_settings_that_someone_wrote_into_the_state_are_not_read(
    make_trainer: Callable[..., Trainer],
    last: Path,
    load: CheckpointCall,
    setting: str,
    value: Any,
) -> None:
    trainer = make_trainer()
    fresh = [each.state_dict()["param_groups"] for each in trainer.optimizers]
    forged = copy.deepcopy(fresh)
    for groups in forged:
        for group in groups:
            group[setting] = value
    content = json.loads((last / STATE).read_text())
    (last / STATE).write_text(json.dumps(content | {"optimizers": forged}))
    resign(last)
    load(trainer, last)
    assert [each.state_dict()["param_groups"] for each in trainer.optimizers] == fresh


HARMS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "a tensor is missing": (
        lambda tensors: tensors.pop("0.0.exp_avg"),
        r"tensors, expected \d+ \('0.0.exp_avg' is in one only\); restore it",
    ),
    "one too many": (
        lambda tensors: tensors.update({"0.0.max_exp_avg_sq": tensors["0.0.exp_avg_sq"].clone()}),
        "'0.0.max_exp_avg_sq' is in one only",
    ),
    "of no optimizer": (lambda tensors: tensors.update(x=torch.zeros(1)), "'x' is in one only"),
    "none at all": (
        lambda tensors: [tensors.pop(name) for name in list(tensors) if "rng" not in name],
        ": 0 tensors, expected ",
    ),
    "another dtype": (
        lambda tensors: tensors.update({"0.0.exp_avg": tensors["0.0.exp_avg"].half()}),
        "0.0.exp_avg has shape .* and dtype torch.float16, expected .* and torch.float32",
    ),
    "a scalar moment": (
        lambda tensors: tensors.update({"0.0.exp_avg": torch.tensor(0.0)}),
        r"0.0.exp_avg has shape \(\) and .*, expected \(300, 32\)",
    ),
    "many counters": (
        lambda tensors: tensors.update({"0.0.step": torch.zeros(3)}),
        r"0.0.step has shape \(3,\) and .*, expected \(\)",
    ),
}


@pytest.mark.parametrize("harm", HARMS)
def test_tensors_of_another_optimizer_are_refused(
    make_trainer: Callable[..., Trainer], last: Path, load: CheckpointCall, harm: str
) -> None:
    change, message = HARMS[harm]
    tensors = load_file(last / OPTIMIZER)
    change(tensors)
    save_file(tensors, last / OPTIMIZER)
    resign(last)
    with pytest.raises(ValueError, match=message) as caught:
        load(make_trainer(), last)
    assert "\n" not in str(caught.value) and str(last / OPTIMIZER) in str(caught.value)


def test_a_checkpoint_before_any_update_has_no_tensors(
    make_trainer: Callable[..., Trainer], tmp_path: Path, save: CheckpointCall, load: CheckpointCall
) -> None:
    """The first steps of loss scaling are often skipped."""
    trainer = make_trainer()
    trainer.progress.step = trainer.progress.skipped_steps = 2
    save(trainer, tmp_path / "last")
    load(make_trainer(), tmp_path / "last")


@pytest.mark.parametrize(
    ("name", "value"),
    [("scale", float("nan")), ("scale", 0.0), ("scale", "a"), ("_growth_tracker", 2**40)],
)
def test_a_loss_scale_that_cannot_be_is_refused(
    make_trainer: Callable[..., Trainer],
    tmp_path: Path,
    save: CheckpointCall,
    load: CheckpointCall,
    name: str,
    value: Any,
) -> None:
    trainers = make_trainer(), make_trainer()
    for trainer in trainers:
        trainer.scaler = torch.amp.GradScaler("cpu", init_scale=8.0 * (trainer is trainers[0]) + 1)
    save(trainers[0], tmp_path / "last")
    load(trainers[1], tmp_path / "last")
    assert trainers[1].scaler.get_scale() == 9.0
    content = json.loads((tmp_path / "last" / STATE).read_text())
    content["scaler"] |= {name: value, "growth_factor": -1.0}
    (tmp_path / "last" / STATE).write_text(json.dumps(content))
    resign(tmp_path / "last")
    with pytest.raises(ValueError, match=r"state.json: not the state .*no scaler has scale"):
        load(trainers[1], tmp_path / "last")
    assert trainers[1].scaler.state_dict()["growth_factor"] == 2.0
