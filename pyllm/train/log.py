"""What a run leaves behind: ``metrics.jsonl``, TensorBoard, a progress bar, pictures."""

import json
import math
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pyllm.viz import plot_expert_load, plot_loss

LINES_WITHOUT_TERMINAL = 20
"""Where output goes to a file or a pipe: a line each twentieth of the run, not a bar."""


class RunLog:
    """Writes one row a step to ``metrics.jsonl`` and TensorBoard, and shows progress.

    Args:
        folder: the run folder.
        max_steps: length of the run.
        start_step: rows of later steps, left by a run that was killed, are cut off.
        console: where progress goes.
    """

    def __init__(self, folder: Path, max_steps: int, start_step: int, console: Console) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._path = folder / "metrics.jsonl"
        self._max_steps = max_steps
        self._console = console
        keep_rows(self._path, start_step)
        self._file = self._path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step + 1)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[state]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("training", total=max_steps, completed=start_step, state="")

    def __enter__(self) -> "RunLog":
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()
        self._file.close()
        self._board.close()

    def row(self, metrics: dict[str, Any]) -> None:
        """One step: its number as ``step``, its metrics as numbers (lists go to the file only)."""
        step = metrics["step"]
        self._file.write(json.dumps({k: _finite(v) for k, v in metrics.items()}) + "\n")
        for name, value in metrics.items():
            if isinstance(value, int | float) and name != "step":
                self._board.add_scalar(name, value, step)
        state = f"loss {metrics['train_loss']:.3f}  {metrics['tok_per_sec']:,.0f} tokens/s"
        self._bar.update(self._task, completed=step, state=state)
        every = max(self._max_steps // LINES_WITHOUT_TERMINAL, 1)
        if not self._console.is_terminal and (step % every == 0 or step == self._max_steps):
            validated = f"  val_loss {metrics['val_loss']:.3f}" if "val_loss" in metrics else ""
            self._console.print(f"step {step}/{self._max_steps}  {state}{validated}")

    def flush(self) -> None:
        """Bring the rows to the disk, before the checkpoint that counts on them."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def say(self, text: str) -> None:
        """A line above the progress bar."""
        self._console.print(text, markup=False, highlight=False)


def _finite(value: Any) -> Any:
    """JSON knows no NaN and no infinity: null stands for them."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's ``metrics.jsonl``, in order of their steps; null becomes NaN."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [{k: math.nan if v is None else v for k, v in row.items()} for row in rows]


def keep_rows(path: Path, steps: int) -> None:
    """Keep the rows up to step ``steps``; a killed run may have written more, or half a row."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        if row["step"] > steps:
            break
        kept.append(line + "\n")
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    temporary.replace(path)


def draw(folder: Path) -> None:
    """Write ``loss.png`` and, for a sparse model, ``expert_load.png`` from the metrics."""
    rows = read_metrics(folder)
    if not rows:
        return
    plot_loss(
        folder / "loss.png",
        steps=[row["step"] for row in rows],
        train_loss=[row["train_loss"] for row in rows],
        val_steps=[row["step"] for row in rows if "val_loss" in row],
        val_loss=[row["val_loss"] for row in rows if "val_loss" in row],
    )
    if "expert_load" in rows[-1]:
        plot_expert_load(
            folder / "expert_load.png",
            steps=[row["step"] for row in rows],
            load=[row["expert_load"] for row in rows],
            max_over_mean=[row["expert_load_max_over_mean"] for row in rows],
        )
