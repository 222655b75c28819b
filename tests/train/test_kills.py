"""kill -9 at thirty random moments of a run's life, resumed each time: nothing tells in the end."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pyllm.data import write_stories
from pyllm.train.log import read_metrics

KILLS = 30
SEED = 0
KILLING = Path(__file__).with_name("killing.py")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has neither fork nor SIGKILL"),
]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of the runs, and what is known of each kill."""
    folder = tmp_path_factory.mktemp("killed")
    for name, count in (("train", 300), ("valid", 6)):
        stories = write_stories(count, 0, name)
        text = "".join(f"{story}\n<|endoftext|>\n" for story in stories)
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(KILLING), str(folder), str(KILLS), str(SEED)],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    kills = [json.loads(line) for line in done.stdout.splitlines()]
    for kill in kills:
        print(f"seed {SEED}, chain {kill['chain']}, {kill['delay']:.4f} s: {kill['left']}")
    return folder, kills


@pytest.mark.parametrize("code", [0, 3])
def test_a_run_that_ends_as_it_is_killed_counts_as_ended(code: int, tmp_path: Path) -> None:
    # The signal reaches a process that has called exit and is not waited for yet.
    program = f"""
import os, sys
sys.path.insert(0, {str(KILLING.parent)!r})
import killing
child = os.fork()
if not child:
    os._exit({code})
killing.ended = lambda child: False
print(killing.kill_once(child, killing.Path({str(tmp_path)!r}), "anywhere", 0.5, set()))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    if code:
        assert done.returncode and "failed by itself" in done.stderr, done.stderr
    else:
        assert done.stdout == "False\n", done.stderr


def rows_without_times(folder: Path) -> list[dict[str, Any]]:
    rows = read_metrics(folder)
    return [{k: v for k, v in row.items() if k not in ("tok_per_sec", "mfu")} for row in rows]


def test_the_kills_fell_everywhere(killed: tuple[Path, list[dict[str, Any]]]) -> None:
    found = Counter(kill["left"] for kill in killed[1])
    assert found.total() == KILLS
    assert found["before the settings are saved"] + found["before the first checkpoint"] > 2, found
    assert found["while a checkpoint is written"] > 0, found
    assert found["between checkpoints"] > 0, found


def test_the_killed_run_is_the_uninterrupted_one(
    killed: tuple[Path, list[dict[str, Any]]],
) -> None:
    folder, kills = killed
    whole = folder / "whole"
    rows = rows_without_times(whole)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    for number in range(1 + max(kill["chain"] for kill in kills)):
        run = folder / f"chain-{number}"
        assert rows_without_times(run) == rows
        assert (run / "samples.txt").read_bytes() == (whole / "samples.txt").read_bytes()
        for name in ("last", "best"):
            for file in ("model.safetensors", "train_state/optimizer.safetensors"):
                ours, theirs = (load_file(each / name / file) for each in (run, whole))
                assert ours.keys() == theirs.keys()
                for key in ours:
                    assert torch.equal(ours[key], theirs[key]), f"{run.name}/{name}/{file}: {key}"
        results = [json.loads((each / "result.json").read_text()) for each in (run, whole)]
        for result in results:
            result.pop("train_seconds")
        assert results[0] == results[1]
        assert not list(run.rglob("*.tmp")) and not list(run.glob("*.old"))
