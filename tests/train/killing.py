"""Kills a run at random moments: `python killing.py FOLDER KILLS SEED` (test_kills.py starts it).

This process imports everything once and forks the runs: Python with torch takes two seconds to
start, a fork a few milliseconds, and so thirty kills fit into a minute. It computes nothing itself,
so that no thread of OpenMP or of the tokenizers is lost in a fork.
"""

import contextlib
import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"

from rich.console import Console

from pyllm.models import ModelConfig
from pyllm.train import DataConfig, RunConfig, TrainConfig, run_training, trainer

EARLY = 10
"""So many kills come first, later and later in the time up to the first checkpoint."""
STEPS = 240
# Only `mfu` uses it, and it takes a second at each start.
trainer.matmul_peak = lambda device, dtype: 1e11


def settings(folder: Path, out: Path) -> RunConfig:
    if (out / "config.json").exists():
        return RunConfig(resume=str(out))
    return RunConfig(
        out=str(out),
        model=ModelConfig(
            vocab_size=300, max_seq_len=1024, n_layers=2, d_model=32, d_ff=32, n_experts=4
        ),
        data=DataConfig(data=str(folder / "train.txt"), valid=str(folder / "valid.txt")),
        train=TrainConfig(
            max_steps=STEPS,
            batch_size=2,
            accumulation=2,
            seq_len=32,
            warmup_steps=4,
            eval_every=7,
            eval_tokens=128,
            save_every=4,
            sample_every=60,
            dtype="float32",
            device="cpu",
            threads=1,
        ),
    )


def start(folder: Path, out: Path) -> int:
    """Fork a run, which goes on where the one before it died."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        run_training(settings(folder, out), Console(quiet=True))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def require_success(status: int) -> None:
    if status:
        raise SystemExit(f"a run failed by itself, with status {status}")


def ended(child: int) -> bool:
    done, status = os.waitpid(child, os.WNOHANG)
    require_success(status)  # 0 while it runs
    return bool(done)


def kill_once(child: int, out: Path, aim: str, delay: float, before: set[int]) -> bool:
    """Kill after `delay` seconds (of the next checkpoint's beginning); False: it ended before."""
    while aim == "checkpoint" and not unfinished(out) - before:
        if ended(child):
            return False
        time.sleep(0.0005)
    time.sleep(delay)
    if ended(child):
        return False
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return True
    require_success(status)  # it was leaving already: the signal came after its last word
    return False


def what_is_left(out: Path, before: set[int]) -> str:
    """Where the kill fell, read from the folder; `before` tells leftovers of the kill before."""
    if not (out / "config.json").exists():
        return "before the settings are saved"
    if unfinished(out) - before:
        return "while a checkpoint is written"
    if not (out / "last").exists() and not (out / "last.old").exists():
        return "before the first checkpoint"
    return "between checkpoints"


def unfinished(out: Path) -> set[int]:
    """The temporary folders of checkpoints, by inode."""
    found = set()
    for name in ("last.tmp", "best.tmp"):
        with contextlib.suppress(FileNotFoundError):
            found.add((out / name).stat().st_ino)
    return found


def run_whole(folder: Path, out: Path) -> float:
    """An uninterrupted run; returns the seconds until its first checkpoint."""
    began = time.monotonic()
    child = start(folder, out)
    while not (out / "best").exists() and not (out / "last").exists() and not ended(child):
        time.sleep(0.002)
    seconds = time.monotonic() - began
    assert not os.waitpid(child, 0)[1]
    return seconds


def main(folder: Path, kills: int, seed: int) -> None:
    """Kill one run `kills` times and let it end; should it end too soon, go on with another."""
    drawn = random.Random(seed)
    first = run_whole(folder, folder / "whole")
    # A kill's delay is drawn up to this, from the start of the run or of a checkpoint.
    longest = {"early": first / EARLY, "anywhere": 3 * first, "checkpoint": 0.015}
    done = chain = 0
    while done < kills:
        out = folder / f"chain-{chain}"
        finished = False
        while not finished and done < kills:
            aim = "early" if done < EARLY else ("anywhere", "checkpoint")[done % 2]
            delay = drawn.uniform(0, longest[aim]) * (done + 1 if aim == "early" else 1)
            before = unfinished(out)
            child = start(folder, out)
            finished = not kill_once(child, out, aim, delay, before)
            if not finished:
                done += 1
                left = what_is_left(out, before)
                print(json.dumps({"chain": chain, "aim": aim, "delay": delay, "left": left}))
        if not finished:
            assert not os.waitpid(start(folder, out), 0)[1]
        chain += 1


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
