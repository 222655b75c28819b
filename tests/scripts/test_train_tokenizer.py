"""The script that makes tokenizers: each kind, and that the trainers write the same file."""

import json
import sys
from pathlib import Path

import pytest

from pyllm.data import write_stories
from pyllm.tokenizers import Tokenizer, byte_tokenizer, train_bpe, train_characters

from .conftest import load_script

STORIES = [*write_stories(30, 0), "The café was closed …"]


@pytest.fixture
def data(tmp_path: Path) -> str:
    file = tmp_path / "stories.txt"
    file.write_text("\n<|endoftext|>\n".join(STORIES), encoding="utf-8")
    return str(file)


def make(capsys: pytest.CaptureFixture[str], **settings: object) -> tuple[Tokenizer, str]:
    """The tokenizer that the script leaves, and what it says."""
    script = load_script("train_tokenizer")
    script.main(script.Config(**settings))
    out = capsys.readouterr().out
    return Tokenizer.load(out.splitlines()[-1]), out


def test_words(data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = []
    for trainer in ("pyllm", "tokenizers"):
        out = tmp_path / trainer
        settings = {"data": data, "vocab_size": 400, "trainer": trainer, "out": out}
        tokenizer, said = make(capsys, **settings)
        assert tokenizer.hash == train_bpe(STORIES, 400).hash
        assert said.startswith("400 tokens from 31 documents (")
        files.append((out / "tokenizer.json").read_bytes())
    assert files[0] == files[1]
    _, said = make(capsys, data=data, vocab_size=100_000, out=tmp_path / "all.json")
    assert "fewer than the 100000 asked for: the text holds no more pairs" in said


def test_the_trainer_is_the_one_asked_for(
    data: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*arguments: object) -> None:
        raise AssertionError("our own trainer")

    monkeypatch.setattr("pyllm.tokenizers.bpe.learn_merges", asked)
    monkeypatch.chdir(Path(data).parent)
    make(capsys, data=data, vocab_size=300, trainer="tokenizers")
    with pytest.raises(AssertionError, match="our own trainer"):
        make(capsys, data=data, vocab_size=300, out=Path("other"))


def test_characters(data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer, said = make(capsys, kind="char", data=data, out=tmp_path)
    assert tokenizer.hash == train_characters(STORIES, 4096).hash
    assert said.startswith("263 tokens from 31 documents (") and "fewer" not in said


def test_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer, said = make(capsys, kind="byte", out=tmp_path)
    assert tokenizer.hash == byte_tokenizer().hash
    assert said == f"260 tokens\n{tmp_path / 'tokenizer.json'}\n"


def test_gpt2(shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shared_data / "tokenizer"
    files = {
        "vocab_bpe": str(folder / "gpt2_vocab.bpe"),
        "encoder_json": str(folder / "gpt2_encoder.json"),
    }
    tokenizer, said = make(capsys, kind="gpt2", out=tmp_path, **files)
    assert tokenizer.hash == Tokenizer.from_gpt2(**files).hash
    assert said.startswith("50257 tokens\n")
    model = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    assert (len(model["vocab"]), len(model["merges"])) == (50257, 50000)


@pytest.mark.parametrize("out", [".", "own.json"])
def test_a_tokenizer_that_is_there_stays(
    out: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(capsys, kind="byte", out=tmp_path / out)
    [file] = tmp_path.iterdir()
    before = file.read_bytes()
    with pytest.raises(ValueError, match=f"{file.name}: already there; remove it or name another"):
        make(capsys, kind="byte", out=tmp_path / out)
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    ("settings", "flag"),
    [
        ({"kind": "byte", "vocab_size": 999}, "--vocab-size"),
        ({"kind": "gpt2", "vocab_size": 999, "vocab_bpe": "x", "encoder_json": "y"}, "--vocab-s"),
        ({"kind": "byte", "trainer": "tokenizers"}, "--trainer"),
        ({"kind": "char", "trainer": "tokenizers", "data": "x.txt"}, "--trainer"),
        ({"kind": "byte", "text_column": "story"}, "--text-column"),
    ],
)
def test_flags_that_would_do_nothing(
    settings: dict[str, object], flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=f"{flag}.* is given, but --kind .* has no use for it"):
        make(capsys, out=tmp_path, **settings)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("real", [True, False])
def test_the_benchmark(
    real: bool,
    data: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    if real:
        (tmp_path / "tinystories").mkdir()
        Path(data).rename(tmp_path / "tinystories" / "train.txt")
    benchmark = load_script("benchmarks/tokenizer")
    settings = {"data": str(tmp_path), "n_stories": 20, "merges": 60, "runs": 2}
    benchmark.main(benchmark.Config(**settings, results=tmp_path / "results"))
    out = capsys.readouterr().out
    [file] = (tmp_path / "results").glob("tokenizer-*.json")
    content = json.loads(file.read_text(encoding="utf-8"))
    assert content["same_tokenizer"] and "the two learned the same" in out
    assert ("the embedded stories instead" in out) != real
    assert content["text"]["documents"] == (31 if real else 20)
    for times in content["training"].values():
        assert len(times["seconds"]) == len(times["cpu_seconds"]) == 2
        assert all(seconds > 0 for seconds in times["seconds"])
    assert list(content["encoding"]) == ["bytes", "characters", "bpe"]
    assert "no GPT-2 there" in out
    assert content["encoding"]["bytes"]["tokens"] == content["text"]["bytes"]
    assert content["encoding"]["bpe"]["bytes_per_token"] > 1.2
