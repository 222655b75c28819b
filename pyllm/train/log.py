"""What a run leaves behind: ``metrics.jsonl``, TensorBoard, samples, a progress bar, pictures."""

import hashlib
import json
import math
import os
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from pyllm.models.durable import named_errors
from pyllm.viz import plot_expert_load, plot_loss

LINES_WITHOUT_TERMINAL = 20
"""Where output goes to a file or a pipe: a line each twentieth of the run, not a bar."""
METRICS, SAMPLES = "metrics.jsonl", "samples.txt"


class GrowingFile:
    """A file that is only appended to; nothing waits in a buffer, so an error comes at its write.

    Args:
        path: of the file.
        mark: of a checkpoint, see :meth:`mark`; what was written after it is cut off.

    Raises:
        ValueError: the file does not begin with what the mark says it did.
    """

    def __init__(self, path: Path, mark: Sequence[Any] | None = None) -> None:
        self.path = path
        self.lost = bool(mark and mark[0]) and not path.exists()
        """The whole file is gone: it begins anew."""
        kept = b""
        if mark and path.exists():
            with path.open("rb") as file:
                kept = file.read(mark[0])
            if [len(kept), hashlib.sha256(kept).hexdigest()] != list(mark):
                raise ValueError(
                    f"{path}: its first {mark[0]:,} bytes are not those that were there at the "
                    "checkpoint; restore it, or move it away to go on without its beginning"
                )
        self._size, self._digest = len(kept), hashlib.sha256(kept)
        with path.open("ab", buffering=0) as file:
            file.truncate(len(kept))

    def write(self, data: bytes) -> None:
        """Append.

        Raises:
            OSError: with the name of the file; the disk is full, for one.
        """
        view = memoryview(data)
        with named_errors(self.path), self.path.open("ab", buffering=0) as file:
            while view:  # an almost full disk takes a part, and refuses the next
                view = view[file.write(view) :]
        self._size += len(data)
        self._digest.update(data)

    def mark(self) -> list[Any]:
        """Bring all to the disk; returns the size and the sha256 up to here."""
        with named_errors(self.path), self.path.open("ab", buffering=0) as file:
            os.fsync(file.fileno())
        return [self._size, self._digest.hexdigest()]


class Board:
    """Scalars for TensorBoard.

    torch's SummaryWriter hands its writing to a thread: an error there (a full disk) prints a
    traceback and reaches the caller late or never. Here it is an OSError at the call.

    Args:
        folder: for the event file.
        start_step: later steps in older event files are to be forgotten.
    """

    def __init__(self, folder: Path, start_step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads what has "tfevents" in its name, in the order of the names.
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._records = RecordWriter(GrowingFile(folder / name))
        self._write(file_version="brain.Event:2")
        self._write(step=start_step + 1, session_log=SessionLog(status=SessionLog.START))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """The values of one step."""
        listed = [Summary.Value(tag=name, simple_value=x) for name, x in values.items()]
        self._write(step=step, summary=Summary(value=listed))

    def _write(self, **content: Any) -> None:
        self._records.write(Event(wall_time=time.time(), **content).SerializeToString())


class RunLog:
    """Writes one row a step to ``metrics.jsonl`` and TensorBoard, and shows progress.

    Args:
        folder: the run folder.
        max_steps: length of the run.
        start_step: TensorBoard forgets later steps, left by a run that was killed.
        console: where progress goes.
        marks: of the checkpoint the run goes on from; later rows and samples are cut off.

    Raises:
        ValueError: the files are not those of the checkpoint.
    """

    def __init__(
        self,
        folder: Path,
        max_steps: int,
        start_step: int,
        console: Console,
        marks: Mapping[str, Any] | None = None,
    ) -> None:
        self._max_steps = max_steps
        self._console = console
        marks = marks or {}
        self._files = {
            name: GrowingFile(folder / name, marks.get(name)) for name in (METRICS, SAMPLES)
        }
        for file in self._files.values():
            if file.lost:
                self.say(f"{file.path}: gone; it begins anew after step {start_step}")
        self._board = Board(folder / "tensorboard", start_step)
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

    def row(self, metrics: dict[str, Any]) -> None:
        """One step: its number as ``step``, its metrics as numbers (lists go to the file only)."""
        step = metrics["step"]
        line = json.dumps({k: _finite(v) for k, v in metrics.items()}) + "\n"
        self._files[METRICS].write(line.encode())
        numbers = {k: v for k, v in metrics.items() if isinstance(v, int | float) and k != "step"}
        self._board.scalars(step, numbers)
        state = f"loss {metrics['train_loss']:.3f}  {metrics['tok_per_sec']:,.0f} tokens/s"
        if skipped := metrics.get("skipped_steps"):
            state += f"  {skipped} skipped"
        self._bar.update(self._task, completed=step, state=state)
        every = max(self._max_steps // LINES_WITHOUT_TERMINAL, 1)
        if not self._console.is_terminal and (step % every == 0 or step == self._max_steps):
            validated = f"  val_loss {metrics['val_loss']:.3f}" if "val_loss" in metrics else ""
            self.say(f"step {step}/{self._max_steps}  {state}{validated}")

    def sample(self, step: int, story: str) -> None:
        """A story told after ``step`` steps."""
        self._files[SAMPLES].write(f"--- step {step}\n{story}\n".encode())
        self.say(f"step {step}: {' '.join(story.split())} ...")

    def marks(self) -> dict[str, list[Any]]:
        """Bring rows and samples to the disk, before the checkpoint that counts on them."""
        return {name: file.mark() for name, file in self._files.items()}

    def say(self, text: str) -> None:
        """A line above the progress bar."""
        self._console.print(text, markup=False, highlight=False)


def _finite(value: Any) -> Any:
    """JSON knows no NaN and no infinity: null stands for them."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's ``metrics.jsonl``, in order of their steps; null becomes NaN.

    Half a row at the end, as a kill leaves it, does not count.

    Raises:
        ValueError: a row is damaged.
    """
    path = folder / METRICS
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            row = json.loads(line)
            rows.append({k: math.nan if v is None else v for k, v in row.items()})
        except (ValueError, RecursionError, AttributeError):
            raise ValueError(f"{path}: row {number} is damaged; restore the file") from None
    return rows


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
