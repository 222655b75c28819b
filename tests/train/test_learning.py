"""A loop that learns nothing fails here: the bar is what word frequencies alone would give."""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

from pyllm.train import Trainer


def unigram_entropy(tokens: Any) -> float:
    """Nats per token of a model that knows how often each token occurs and nothing else."""
    counts = Counter(tokens.tolist())
    total = sum(counts.values())
    return -sum(n / total * math.log(n / total) for n in counts.values())


def test_sixty_steps_beat_word_frequencies(make_trainer: Callable[..., Trainer]) -> None:
    trainer = make_trainer(
        max_steps=60, batch_size=16, seq_len=64, learning_rate=2e-2, warmup_steps=5
    )
    bar = unigram_entropy(trainer.train_file.tokens)
    for step in range(60):
        metrics = trainer.step(step)
    validation = trainer.validate()
    assert metrics["train_loss"] < bar - 0.4
    assert validation < bar - 0.4
