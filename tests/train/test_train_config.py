"""Settings that cannot work are refused with what was given and what was expected."""

from typing import Any

import pytest

from pyllm.models import PRESETS
from pyllm.train import TRAIN_PRESETS, TrainConfig


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"max_steps": 0}, "train.max_steps must be at least 1, got 0"),
        ({"batch_size": 0}, "train.batch_size must be at least 1, got 0"),
        ({"accumulation": -2}, "train.accumulation must be at least 1, got -2"),
        ({"seq_len": 0}, "train.seq_len must be at least 1, got 0"),
        ({"eval_every": 0}, "train.eval_every must be at least 1, got 0"),
        ({"save_every": 0}, "train.save_every must be at least 1, got 0"),
        ({"eval_tokens": 0}, "train.eval_tokens must be at least 1, got 0"),
        ({"learning_rate": -1e-3}, "train.learning_rate must be at least 0, got -0.001"),
        ({"learning_rate": 0.0}, "train.learning_rate must be positive, got 0.0"),
        ({"learning_rate": float("nan")}, "train.learning_rate must be at least 0, got nan"),
        ({"learning_rate": float("inf")}, "train.learning_rate must be at least 0, got inf"),
        ({"balance_coef": -0.1}, "train.balance_coef must be at least 0, got -0.1"),
        ({"grad_clip": -1.0}, "train.grad_clip must be at least 0, got -1.0"),
        ({"seed": -1}, "train.seed must be at least 0, got -1"),
        ({"threads": -1}, "train.threads must be at least 0, got -1"),
        ({"beta1": 1.0}, "beta1 and beta2 must be below 1 .* got 1.0, 0.95 and 0.05"),
        ({"beta2": 1.5}, "beta1 and beta2 must be below 1 .* got 0.9, 1.5 and 0.05"),
        ({"min_lr_ratio": 2.0}, "min_lr_ratio at most 1, got 0.9, 0.95 and 2.0"),
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
