"""scripts/evaluate.py: what it prints and writes, and what it refuses."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pyllm import viz
from pyllm.data import write_stories
from pyllm.evaluate import bits_per_byte, score_text
from pyllm.export import TextSettings, write_hugging_face
from pyllm.models import load_model, quantize_folder
from pyllm.train import DataConfig, RunConfig, prepare
from pyllm.train.run_folder import write_run_config

from .conftest import Refusal, load_script

DOCUMENTS = [
    "Once there was a fox." * 60,  # longer than 1,024 bytes, and than the context
    "The fox was red, and the fox was once a fox.",
    "x",
]
TEXT = "\n<|endoftext|>\n".join(DOCUMENTS)


@pytest.fixture
def evaluate(tmp_path: Path, capsys, monkeypatch) -> Callable[..., tuple[list[list[str]], dict]]:
    """Run it on the documents; the rows of its tables, and what it writes with --out."""
    (tmp_path / "text.txt").write_text(TEXT)
    monkeypatch.setenv("COLUMNS", "160")

    def run(model: Path, **settings: Any) -> tuple[list[list[str]], dict]:
        script = load_script("evaluate")
        out = tmp_path / "new" / "report.json"
        given = {"data": str(tmp_path / "text.txt"), "out": out} | settings
        script.main(script.Config(model=str(model), **given))
        lines = capsys.readouterr().out.splitlines()
        rows = [[cell.strip() for cell in re.split("[\u2502\u2503]", line)[1:-1]] for line in lines]
        rows = [row for row in rows if row] + [[line.strip()] for line in lines]
        return rows, json.loads(out.read_text())

    return run


def test_the_tables_and_the_file_are_the_scores_of_the_documents(evaluate, fox: Path) -> None:
    rows, report = evaluate(fox)
    score = score_text(*load_model(fox), DOCUMENTS)
    bpb = bits_per_byte(*load_model(fox), DOCUMENTS)
    n_bytes = sum(len(document) for document in DOCUMENTS)
    assert (score.bytes, bpb.bytes) == (n_bytes, n_bytes - len(DOCUMENTS[0]) + 1024)
    assert report.pop("model") == str(fox) and report.pop("data").endswith("text.txt")
    assert report == {
        "documents": 3,
        "tokens": score.tokens,
        "context": 64,
        "loss": pytest.approx(score.loss, rel=1e-6),
        "perplexity": pytest.approx(score.perplexity, rel=1e-6),
        "bits_per_byte": pytest.approx(score.bits_per_byte, rel=1e-6),
        "bytes": score.bytes,
        "val_bpb": pytest.approx(bpb.value, rel=1e-6),
        "val_bpb_bytes": bpb.bytes,
        "val_bpb_documents": 3,
        "position_loss": pytest.approx(list(score.position_loss), rel=1e-6),
        "position_count": list(score.position_count),
    }
    tokens = f"{score.tokens:,} tokens of 3 documents"
    assert ["loss, nats per token", f"{score.loss:.4f}", tokens] in rows
    assert ["perplexity", f"{score.perplexity:.3f}", tokens] in rows
    assert score.bits_per_byte is not None
    wanted = ["bits per byte", f"{score.bits_per_byte:.4f}", f"{n_bytes:,} bytes of 3 documents"]
    assert wanted in rows
    starts = f"the first 1,024 bytes of each, {bpb.bytes:,} of 3 documents"
    assert ["val_bpb, bits per byte", f"{bpb.value:.4f}", starts] in rows
    for first, end, loss in score.buckets():
        place = str(first) if end == first + 1 else f"{first} to {end - 1}"
        assert [place, f"{loss:.4f}"] in rows


def test_the_picture_is_of_the_loss_at_each_position(
    evaluate, fox: Path, tmp_path: Path, monkeypatch
) -> None:
    drawn = []
    draw = viz.plot_curves
    monkeypatch.setattr(viz, "plot_curves", lambda *a, **k: (drawn.append(a), draw(*a, **k)))
    _, report = evaluate(fox, picture=tmp_path / "positions.svg")
    [(_, curves)] = drawn
    places, losses = curves["loss"]
    assert list(places) == list(range(64)) and losses == pytest.approx(report["position_loss"])
    assert "<svg" in (tmp_path / "positions.svg").read_text()


def test_a_context_of_its_own(evaluate, fox: Path) -> None:
    rows, report = evaluate(fox, context=16, documents=1)
    score = score_text(*load_model(fox), DOCUMENTS[:1], context=16)
    assert report["loss"] == pytest.approx(score.loss, rel=1e-6) and report["context"] == 16
    assert report["val_bpb_documents"] == 1
    places = [row[0] for row in rows]
    assert "8 to 15" in places and "16 to 31" not in places


def test_a_model_that_begins_and_ends_texts_otherwise(evaluate, fox: Path, tmp_path: Path) -> None:
    """As generation does: nothing before a text, ``<|im_end|>`` behind it."""
    model, tokenizer = load_model(fox)
    end = tokenizer.token_to_id("<|im_end|>")
    assert end is not None
    texts = TextSettings(begin_ids=[], stop_ids=[end])
    write_hugging_face(tmp_path / "bare", model, tokenizer, texts=texts)
    _, report = evaluate(tmp_path / "bare")
    nats = []
    for document in DOCUMENTS:
        ids = [*tokenizer.encode(document), end]
        for at in range(1, len(ids)):
            with torch.no_grad():
                logits = model(torch.tensor([ids[(at - 1) // 64 * 64 : at]])).logits[0, -1]
            nats.append(-logits.log_softmax(-1)[ids[at]].item())
    assert report["tokens"] == len(nats)
    assert report["loss"] == pytest.approx(sum(nats) / len(nats), rel=1e-5)


def test_an_end_that_the_model_does_not_have_is_not_counted(
    evaluate, fox: Path, tmp_path: Path
) -> None:
    shutil.copytree(fox, tmp_path / "fox")
    (tmp_path / "fox" / "manifest.json").unlink()
    (tmp_path / "fox" / "generation_config.json").write_text('{"eos_token_id": 261}')
    _, report = evaluate(tmp_path / "fox")
    score = score_text(*load_model(fox), DOCUMENTS, count_end=False)
    assert (report["tokens"], report["loss"]) == (score.tokens, pytest.approx(score.loss))


def test_a_model_without_a_run_is_scored_on_the_embedded_stories(evaluate, fox: Path) -> None:
    rows, report = evaluate(fox, data="", documents=3)
    stories = list(write_stories(3, 0, "valid"))
    assert report["loss"] == pytest.approx(score_text(*load_model(fox), stories).loss, rel=1e-6)
    assert report["data"] == "embedded stories"
    assert any("on embedded stories" in row[0] for row in rows)


@pytest.mark.parametrize("valid", ["", "valid.txt"])
def test_a_run_is_scored_on_its_own_validation_text(
    evaluate, refusal: Refusal, fox: Path, tmp_path: Path, valid: str
) -> None:
    texts = {"train.txt": [f"A fox {number}." for number in range(100)], "valid.txt": DOCUMENTS}
    for name, documents in texts.items():
        (tmp_path / name).write_text("\n<|endoftext|>\n".join(documents))
    data = DataConfig(data=str(tmp_path / "train.txt"), valid=valid and str(tmp_path / valid))
    config = RunConfig(data=data)
    shutil.copytree(fox, tmp_path / "run" / "best")
    write_run_config(tmp_path / "run", config)
    _, report = evaluate(tmp_path / "run", data="")
    expected = DOCUMENTS if valid else list(prepare.documents(data, config.train.seed, "valid"))
    assert report["documents"] == len(expected) in (2, 3)
    assert report["loss"] == pytest.approx(score_text(*load_model(fox), expected).loss, rel=1e-6)
    wanted = data.valid or f"{data.data}, the part held out from training"
    assert report["data"] == wanted
    quantize_folder(tmp_path / "run" / "best", tmp_path / "run" / "best-int8")
    _, report = evaluate(tmp_path / "run" / "best-int8", data="")
    assert report["data"] == wanted
    for name in filter(None, ("train.txt", valid)):
        line = refusal("evaluate", "--model", tmp_path / "run", "--out", name)
        assert f"--out {name} is the text to score" in line
    (tmp_path / (valid or "train.txt")).unlink()
    line = refusal("evaluate", "--model", tmp_path / "run")
    assert "no such file" in line and line.endswith("this run's text, name another with --data")


def test_what_is_read_is_not_written_over(refusal: Refusal, fox: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(fox, tmp_path / "fox"))
    before = {path: path.read_bytes() for path in model.iterdir()}
    (tmp_path / "text.txt").write_text(TEXT)
    for name in ("hard.json", "hard.svg"):
        (tmp_path / name).hardlink_to(tmp_path / "text.txt")
    (tmp_path / "link.json").symlink_to(tmp_path / "text.txt")
    (tmp_path / "there").symlink_to(model)
    for flags, message in (
        (["--out", "text.txt"], "--out text.txt is the text to score; name another file"),
        (["--out", "hard.json"], "--out hard.json is the text to score"),
        (["--out", "link.json"], "--out link.json is the text to score"),
        (["--picture", "hard.svg"], "--picture hard.svg is the text to score"),
        (["--out", "x/../text.txt"], "is the text to score"),
        (["--out", "a.svg", "--picture", "./a.svg"], "--out and --picture are one file; name two"),
        (["--out", "fox/config.json"], "--out fox/config.json is inside the model's folder; name"),
        (["--picture", "there/a.svg"], "--picture there/a.svg is inside the model's folder"),
    ):
        assert message in refusal("evaluate", "--model", "fox", "--data", "text.txt", *flags)
    assert {path: path.read_bytes() for path in model.iterdir()} == before
    assert (tmp_path / "text.txt").read_text() == TEXT


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "absent.txt"], "absent.txt: no such file"),
        (["--model", "nowhere"], "nowhere: no such folder"),
        (["--context", "65"], "context must be a whole number from 1 to 64, got 65"),
        (["--context", "-1"], "--context (0 for the model's) must be a whole number"),
        (["--out", "/"], "/ is a folder; name a file"),
        (["--picture", "a.bmp"], "--picture must end in .png or .svg, got a.bmp"),
        (["--dta", "x"], "--data"),
    ],
)
def test_refusals(refusal: Refusal, fox: Path, flags: list[str], message: str) -> None:
    model = [] if "--model" in flags else ["--model", fox]
    assert message in refusal("evaluate", *model, *flags)
