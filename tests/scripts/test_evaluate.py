"""scripts/evaluate.py: what it prints and writes, and what it refuses."""

import json
from pathlib import Path

import pytest

from .conftest import Refusal, load_script

TEXT = "Once there was a fox.\n<|endoftext|>\nThe fox was red, and the fox was once a fox.\n"


def test_the_tables_the_file_and_the_picture(fox: Path, tmp_path: Path, capsys) -> None:
    script = load_script("evaluate")
    (tmp_path / "text.txt").write_text(TEXT)
    script.main(
        script.Config(
            data=str(tmp_path / "text.txt"),
            model=str(fox),
            out=tmp_path / "new" / "report.json",
            picture=tmp_path / "positions.svg",
        )
    )
    shown = capsys.readouterr().out
    report = json.loads((tmp_path / "new" / "report.json").read_text())
    assert report["documents"] == 2
    assert f"{report['perplexity']:.3f}" in shown and f"{report['val_bpb']:.4f}" in shown
    assert len(report["position_loss"]) == len(report["position_count"])
    assert report["position_count"][0] == 2
    assert "<svg" in (tmp_path / "positions.svg").read_text()


def test_embedded_stories_and_a_context_too_short_for_bits_per_byte(fox: Path, capsys) -> None:
    script = load_script("evaluate")
    script.main(script.Config(model=str(fox), documents=3, context=16))
    shown = " ".join(capsys.readouterr().out.split())
    assert "left out" in shown and "1,024 bytes of text are" in shown
    assert "8 to 15" in shown and "16 to" not in shown


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
