"""Which tokenizer a run gets: bytes, characters, words learned from its text, or a file's."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from pyllm.models import load_model
from pyllm.tokenizers import byte_tokenizer, train_bpe, train_characters
from pyllm.train import RunConfig, run_training
from pyllm.train import run as train_run
from pyllm.train.prepare import documents, prepare_text, prepare_tokens


@pytest.fixture
def config(make_run: Callable[..., RunConfig], tmp_path: Path) -> RunConfig:
    config = make_run(tmp_path, max_steps=2, eval_every=2, save_every=2, sample_every=0)
    with Path(config.data.data).open("a", encoding="utf-8") as text:
        text.write("\n<|endoftext|>\nThe café was closed …\n")  # the others are ASCII
    return config


def with_tokenizer(config: RunConfig, name: str) -> RunConfig:
    return replace(config, data=replace(config.data, tokenizer=name))


def test_the_tokenizers_by_name(config: RunConfig, tmp_path: Path) -> None:
    texts = list(documents(config.data, 0, "train"))
    file = train_characters(["ä"], 300).save(tmp_path / "other.json")
    for name, expected in (
        ("byte", byte_tokenizer()),
        ("char", train_characters(texts, config.model.vocab_size)),
        ("", train_bpe(texts, config.model.vocab_size)),
        (str(file), train_characters(["ä"], 300)),
    ):
        text = prepare_text(with_tokenizer(config, name), tmp_path / "new")
        assert text.tokenizer.hash == expected.hash


def test_a_resumed_run_reads_its_own(config: RunConfig, tmp_path: Path) -> None:
    config = with_tokenizer(config, "byte")
    own = prepare_text(with_tokenizer(config, "char"), tmp_path)
    prepare_tokens(own, tmp_path, resume=False)
    size = own.tokenizer.vocab_size
    resumed = replace(config, resume=str(tmp_path), model=replace(config.model, vocab_size=size))
    assert prepare_text(resumed, tmp_path).tokenizer.hash == own.tokenizer.hash


@pytest.mark.parametrize("name", ["byte", "char"])
def test_a_model_of_bytes_or_characters_is_trained(
    config: RunConfig, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_run, "STORY_TOKENS", 5)
    result = run_training(with_tokenizer(config, name), Console(quiet=True))
    model, tokenizer = load_model(result.folder / "best")
    assert model.config.vocab_size == tokenizer.vocab_size
    assert len(tokenizer.encode("café …")) == {"byte": 9, "char": 6}[name]
    assert result.val_bpb and 1 < result.val_bpb.value < 10
