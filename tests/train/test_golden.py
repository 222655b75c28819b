"""Textbook mode against committed losses, and against the fast faces.

A change that should not move the numbers does not move those in golden.json. After one that
should, write them anew, and say why in the commit:

    PYLLM_FACE=reference python tests/train/test_golden.py golden > tests/train/golden.json
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

HERE = Path(__file__).resolve()


def losses(what: str, optimizer: str, folder: Path) -> list[float]:
    """Training losses of the first steps: fp32, one thread, embedded stories, all seeded."""
    import torch

    from pyllm.data import write_stories, write_tokens
    from pyllm.models import ModelConfig, Transformer, preset
    from pyllm.tokenizers import train_bpe
    from pyllm.train import TRAIN_PRESETS, TrainConfig, Trainer
    from pyllm.train.trainer import seed_everything

    if what == "golden":
        model = ModelConfig(
            vocab_size=300,
            n_layers=2,
            d_model=32,
            d_ff=32,
            n_experts=4,
        )
        config = TrainConfig(
            max_steps=5, batch_size=8, seq_len=32, warmup_steps=1, learning_rate=4e-3
        )
    else:
        model = preset("moe-tiny")
        config = replace(TRAIN_PRESETS["moe-tiny"], max_steps=10, batch_size=2, seq_len=64)
    torch.set_num_threads(1)
    stories = list(write_stories(50, 0, "train"))
    tokenizer = train_bpe(stories, model.vocab_size)
    file = write_tokens(stories, tokenizer, folder / "train.bin")
    config = replace(config, optimizer=optimizer)
    seed_everything(config.seed)
    trainer = Trainer(
        Transformer(replace(model, vocab_size=tokenizer.vocab_size)),
        tokenizer,
        file,
        file,
        config,
        folder,
        torch.device("cpu"),
        torch.float32,
    )
    return [trainer.step(step)["train_loss"] for step in range(config.max_steps)]


def run(what: str, face: str) -> dict[str, list[float]]:
    """A process of its own, because the face is chosen when pyllm is imported."""
    result = subprocess.run(
        [sys.executable, str(HERE), what],
        cwd=HERE.parents[2],
        env={**os.environ, "PYLLM_FACE": face, "PYTHONPATH": str(HERE.parents[2])},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    found: dict[str, list[float]] = json.loads(result.stdout)
    return found


@pytest.mark.slow
def test_losses_are_the_committed_ones() -> None:
    golden = json.loads(HERE.with_name("golden.json").read_text(encoding="utf-8"))
    found = run("golden", "reference")
    assert found.keys() == golden.keys() == {"adamw", "muon"}
    for optimizer, expected in golden.items():
        assert found[optimizer] == pytest.approx(expected, rel=1e-4), optimizer
        assert expected[0] - expected[-1] > 0.05, "the updates must show in these losses"


@pytest.mark.slow
def test_the_textbook_trains_moe_tiny_as_the_fast_faces_do() -> None:
    reference, default = run("moe-tiny", "reference"), run("moe-tiny", "")
    for optimizer, expected in reference.items():
        assert len(expected) == 10
        assert default[optimizer][:5] == pytest.approx(expected[:5], rel=1e-4), optimizer
        assert default[optimizer] == pytest.approx(expected, rel=1e-2), optimizer
        assert default[optimizer] != expected, "both ran the same face"


if __name__ == "__main__":
    found = {}
    for rule in ("adamw", "muon"):
        with tempfile.TemporaryDirectory() as name:
            found[rule] = losses(sys.argv[1], rule, Path(name))
    print(json.dumps(found, indent=2))
