"""Settings that cannot work are refused with what was given and what was expected."""

import json
from collections.abc import Callable
from dataclasses import asdict, fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyllm.models import PRESETS, ModelConfig
from pyllm.train import TRAIN_PRESETS, DataConfig, RunConfig, TrainConfig


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"max_steps": 0}, "train.max_steps must be a whole number from 1 to 2,147,483,647, got 0"),
        (
            {"batch_size": 0},
            "train.batch_size must be a whole number from 1 to 2,147,483,647, got 0",
        ),
        (
            {"accumulation": -2},
            "train.accumulation must be a whole number from 1 to 2,147,483,647, got -2",
        ),
        ({"seq_len": 0}, "train.seq_len must be a whole number from 1 to 2,147,483,647, got 0"),
        (
            {"eval_every": 0},
            "train.eval_every must be a whole number from 1 to 2,147,483,647, got 0",
        ),
        (
            {"save_every": 0},
            "train.save_every must be a whole number from 1 to 2,147,483,647, got 0",
        ),
        (
            {"eval_tokens": 0},
            "train.eval_tokens must be a whole number from 1 to 2,147,483,647, got 0",
        ),
        (
            {"learning_rate": -1e-3},
            "train.learning_rate must be a number from 0 to 1,000,000, got -0.001",
        ),
        ({"learning_rate": 0.0}, "train.learning_rate must be positive, got 0.0"),
        (
            {"learning_rate": float("nan")},
            "train.learning_rate must be a number from 0 to 1,000,000, got nan",
        ),
        (
            {"learning_rate": float("inf")},
            "train.learning_rate must be a number from 0 to 1,000,000, got inf",
        ),
        (
            {"balance_coef": -0.1},
            "train.balance_coef must be a number from 0 to 1,000,000, got -0.1",
        ),
        ({"grad_clip": -1.0}, "train.grad_clip must be a number from 0 to 1,000,000, got -1.0"),
        ({"seed": -1}, "train.seed must be a whole number from 0 to 4,294,967,295, got -1"),
        ({"threads": -1}, "train.threads must be a whole number from 0 to 1,024, got -1"),
        ({"beta1": 1.0}, "beta1 and beta2 must be below 1 .* got 1.0, 0.95 and 0.05"),
        ({"beta2": 1.5}, "beta1 and beta2 must be below 1 .* got 0.9, 1.5 and 0.05"),
        ({"min_lr_ratio": 2.0}, "min_lr_ratio at most 1, got 0.9, 0.95 and 2.0"),
        # As they come from a config.json that somebody edited:
        ({"max_steps": "9"}, "train.max_steps must be a whole number from 1 to .*, got '9'"),
        ({"max_steps": 2.0}, "train.max_steps must be a whole number from 1 to .*, got 2.0"),
        ({"max_steps": True}, "train.max_steps must be a whole number from 1 to .*, got True"),
        ({"max_steps": 2**31}, "train.max_steps must be a whole number from 1 to .*, got 21474"),
        ({"seed": 2**32}, "train.seed must be a whole number from 0 to 4,294,967,295, got 42949"),
        (
            {"learning_rate": None},
            "train.learning_rate must be a number from 0 to 1,000,000, got None",
        ),
        ({"grad_clip": 10**400}, "train.grad_clip must be a number from 0 to 1,000,000, got 1000"),
        (
            {"weight_decay": 1e300},
            "train.weight_decay must be a number from 0 to 1,000,000, got 1e",
        ),
        ({"recompute": 1}, "train.recompute must be true or false, got 1"),
        ({"device": "gpu"}, "train.device must be one of auto, cpu, cuda, mps, got 'gpu'"),
        ({"dtype": []}, r"train.dtype must be one of auto, float32, .*, got \[\]"),
        ({"batch_size": 2**20, "seq_len": 2**12}, "must be at most .* tokens, got 1048576 x 4096"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_setting_that_cannot_work(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**setting)


def test_zero_switches_off_what_can_be_switched_off() -> None:
    TrainConfig(grad_clip=0.0, balance_coef=0.0, z_coef=0.0, sample_every=0, warmup_steps=0)


def test_tokens_per_step() -> None:
    assert TrainConfig(batch_size=3, accumulation=5, seq_len=7).tokens_per_step == 105


def test_every_model_preset_has_a_training_preset_that_fits() -> None:
    assert TRAIN_PRESETS.keys() == PRESETS.keys()
    for name, train in TRAIN_PRESETS.items():
        assert train.seq_len <= PRESETS[name].max_seq_len


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"n_stories": 0}, "n_stories must be a whole number from 1 to 2,147,483,647, got 0"),
        ({"valid": "v.txt"}, "valid is given without data; give the training text too"),
        ({"data": None}, "data must be a str, not NoneType"),
        ({"data": "caf\udce9"}, "data has no UTF-8 form"),
    ],
)
def test_data_that_cannot_work(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**setting)


def test_sequences_longer_than_the_context() -> None:
    train, model = TrainConfig(seq_len=65), ModelConfig(max_seq_len=64)
    with pytest.raises(ValueError, match=r"train.seq_len \(65\) exceeds .* \(now 64\)"):
        RunConfig(train=train, model=model)


ANYTHING = st.one_of(
    st.integers(-2, 2**33),
    st.floats(),
    st.booleans(),
    st.text(max_size=4),
    st.sampled_from(["cpu", "muon", "float16", "\udce9", b"", None, [], 10**400]),
)


@pytest.mark.fuzz
@given(
    kind=st.sampled_from([TrainConfig, DataConfig]),
    settings=st.data(),
)
def test_any_setting_is_kept_or_refused_in_one_line(
    watchdog: Callable[[], None], kind: type[Any], settings: st.DataObject
) -> None:
    watchdog()
    names = [item.name for item in fields(kind)]
    given_ = settings.draw(st.dictionaries(st.sampled_from(names), ANYTHING, max_size=3))
    try:
        config = kind(**given_)
    except ValueError as error:
        assert any(name in str(error) for name in given_) and "\n" not in str(error)
        return
    for name, value in asdict(config).items():
        expected = given_.get(name, getattr(kind(), name))
        assert value is expected or value == expected
        # What was taken goes through JSON, where a run keeps it, and is of the declared type.
        assert json.loads(json.dumps(value, allow_nan=False)) == value
        declared = next(item.type for item in fields(kind) if item.name == name)
        assert type(value) in {int: (int,), float: (int, float), bool: (bool,)}.get(
            declared, (str,)
        )
