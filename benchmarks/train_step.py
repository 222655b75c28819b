"""How long a training step takes, beside transformers on the same weights, in one run.

    pip install 'transformers>=5'
    python benchmarks/train_step.py

A step is forward, backward and a fused AdamW, on the same tokens in both programs, which take
turns, each in a process of its own. transformers gets the weights through pyllm's export, as a
Mixtral, and runs its experts in whichever of its implementations a trial finds fastest. Before
anything is timed, both must give one loss. Neither has a balance loss or a clipped gradient:
transformers defines the former otherwise.

pyllm's process keeps freed memory as its trainer does (``pyllm.train.device.keep_freed_memory``).
A process of transformers does not, so it runs twice: as its users find it, and with that borrowed.

``mixed`` is float32 weights with bfloat16 products (autocast), as pyllm's trainer and transformers'
do it; ``bfloat16`` is weights, gradients and the optimizer's state in bfloat16, in both. The memory
is the most that a process has during its steps, above what its imports took. Writes
``benchmarks/results/train-step-<date>.json``.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pyllm._checks import check_size
from pyllm._cli import require_writable, run

sys.path.insert(0, str(Path(__file__).resolve().parent))

from _machine import spread

TOLERANCE = {"float32": 1e-4, "mixed": 1e-2, "bfloat16": 2e-2}
"""How far the two losses may lie apart before the first step, as a share: roundings, which bfloat16
has more of; a wrong layer moves a loss further."""
EXPERTS = ("grouped_mm", "batched_mm", "eager")
LARGEST_GATHER = 4 << 30
"""Bytes of experts that ``batched_mm`` copies for the backward; what takes more is not tried."""
LEARNING_RATE = 1e-3
SIDES = ("pyllm", "transformers", "transformers, freed memory kept")

WORKER = """
import sys
sys.path.insert(0, sys.argv[1])
import train_step
train_step.serve(*sys.argv[2:])
"""


@dataclass
class Config:
    """Time training steps beside transformers."""

    presets: tuple[str, ...] = ("moe-158m", "moe-tiny")
    """Which models."""
    dtypes: tuple[Literal["float32", "mixed", "bfloat16"], ...] = ("float32", "mixed", "bfloat16")
    """Of weights and products; mixed: float32 weights under bfloat16 autocast."""
    batch_size: int = 2
    """Sequences in a step."""
    seq_len: int = 512
    """Tokens of each."""
    rounds: int = 11
    """Steps of each program, in turns, after one that is not counted."""
    threads: int = 2
    """Of each program."""
    results: Path = Path(__file__).resolve().parent / "results"
    """Folder of the JSON file."""

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("seq_len", 2), ("rounds", 2), ("threads", 1)):
            check_size(name, getattr(self, name), least, 2**20)


def main(config: Config) -> None:
    """Measure, print, write."""
    import torch
    from _record import Record

    from pyllm.models import preset

    for name in config.presets:
        context = preset(name).max_seq_len
        if config.seq_len > context:
            raise ValueError(
                f"--seq-len must be at most the context of {name} ({context}), got {config.seq_len}"
            )
    try:
        import transformers
    except ImportError:
        raise ValueError(
            "transformers is not installed; pip install 'transformers>=5' does that"
        ) from None
    require_writable(config.results)
    torch.set_num_threads(config.threads)
    record = Record(config.results, "train-step")
    record.add(
        transformers=transformers.__version__,
        threads=config.threads,
        batch_size=config.batch_size,
        seq_len=config.seq_len,
        rounds=config.rounds,
    )
    cases: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        for name in config.presets:
            folders = write_model(name, Path(place))
            for dtype in config.dtypes:
                cases.append({"preset": name, "dtype": dtype, **measure(config, folders, dtype)})
                record.add(cases=cases)
                print(describe_case(cases[-1]), flush=True)
    print(record.path)


def write_model(preset_name: str, place: Path) -> dict[str, str]:
    """Random weights, as the folder that each program loads."""
    import torch

    from pyllm.export import write_hugging_face
    from pyllm.models import Transformer, preset, save_model
    from pyllm.tokenizers import byte_tokenizer

    torch.manual_seed(0)
    model = Transformer(preset(preset_name))
    folders = {side: str(place / f"{preset_name}-{side}") for side in SIDES[:2]}
    save_model(folders["pyllm"], model, byte_tokenizer())
    write_hugging_face(folders["transformers"], model, byte_tokenizer())
    return folders | {SIDES[2]: folders["transformers"]}


@dataclass
class Side:
    """A program with a model and its optimizer."""

    model: Any
    optimizer: Any
    loss: Callable[[Any], Any]
    """Token ids (B, T) to the mean cross-entropy of each with the next."""
    mixed: bool

    def forward(self, ids: Any) -> Any:
        """The loss, a scalar tensor."""
        import torch

        with torch.autocast("cpu", torch.bfloat16, enabled=self.mixed):
            return self.loss(ids)

    def step(self, ids: Any) -> float:
        """One training step; the loss before it."""
        loss = self.forward(ids)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())


def load_side(name: str, folder: str, dtype: str) -> Side:
    """Load a program's model for training."""
    import torch

    weights = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    if name == "pyllm":
        from pyllm.models import load_model
        from pyllm.models.transformer import IGNORE_INDEX

        model: Any = load_model(folder)[0].to(weights).train()

        def loss(ids: Any) -> Any:
            # The last of a row has no next token; transformers' loss leaves it out the same way.
            targets = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=IGNORE_INDEX)
            return model(ids, targets).loss

    else:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=weights).train()

        def loss(ids: Any) -> Any:
            return model(input_ids=ids, labels=ids, use_cache=False).loss

    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    return Side(model, optimizer, loss, dtype == "mixed")


def make_batch(vocab_size: int, batch_size: int, seq_len: int) -> Any:
    """Ids (B, T) that are random but always the same."""
    import torch

    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocab_size, (batch_size, seq_len), generator=generator)


class Worker:
    """A process with one program in it, which does what it is told, one thing at a time."""

    def __init__(self, config: Config, name: str, folder: str, dtype: str) -> None:
        here = str(Path(__file__).resolve().parent)
        sizes = map(str, (config.threads, config.batch_size, config.seq_len))
        self._process = subprocess.Popen(
            [sys.executable, "-c", WORKER, here, name, folder, dtype, *sizes],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, *words: str) -> Any:
        """What :func:`serve` answers to a command.

        Raises:
            RuntimeError: the process failed; it has said why.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            print(*words, file=self._process.stdin, flush=True)
            return json.loads(self._process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):
            raise RuntimeError(f"the process that was to {words[0]} failed") from None

    def stop(self) -> None:
        """End the process, and with it its memory."""
        self._process.communicate()


def serve(name: str, folder: str, dtype: str, threads: str, batch_size: str, seq_len: str) -> None:
    """Answer the commands on stdin, one a line, with a line of JSON each.

    ``loss``: of the tokens; ``step``: train, seconds; ``try NAME``: seconds of forward and backward
    with these experts, or why not; ``use NAME``: these experts from now on; ``memory``: the most
    bytes since ``use``, and those of the imports.
    """
    replies, sys.stdout = sys.stdout, sys.stderr  # what a library prints is no answer
    import torch

    if name == "pyllm":
        import pyllm.models.transformer  # noqa: F401
    else:
        import transformers.models.mixtral.modeling_mixtral  # noqa: F401
    if name != "transformers":
        from pyllm.train.device import keep_freed_memory

        keep_freed_memory()
    torch.set_num_threads(int(threads))
    imports = read_status("VmRSS")
    side = load_side(name, folder, dtype)
    ids = make_batch(side.model.config.vocab_size, int(batch_size), int(seq_len))
    for line in sys.stdin:
        command, *words = line.split()
        answer: Any = None
        if command == "loss":
            answer = float(side.forward(ids).detach())
        elif command == "step":
            start = time.perf_counter()
            side.step(ids)
            answer = time.perf_counter() - start
        elif command == "try":
            answer = try_experts(side, ids, *words)
        elif command == "use":
            if words:
                side.model.set_experts_implementation(*words)
            forget_peak()
        elif command == "memory":
            answer = {"imports": imports, "peak": read_status("VmHWM") - imports}
        print(json.dumps(answer), file=replies, flush=True)


def measure(config: Config, folders: dict[str, str], dtype: str) -> dict[str, Any]:
    """All programs in turns on one model."""
    workers = {name: Worker(config, name, folders[name], dtype) for name in SIDES}
    try:
        first = {name: worker.ask("loss") for name, worker in workers.items()}
        check_same(first, TOLERANCE[dtype])
        trial = {name: workers["transformers"].ask("try", name) for name in EXPERTS}
        timed = {name: value for name, value in trial.items() if isinstance(value, float)}
        experts = min(timed, key=lambda name: timed[name])
        for name, worker in workers.items():
            worker.ask("use", *([] if name == "pyllm" else [experts]))
        times: dict[str, list[float]] = {name: [] for name in SIDES}
        for round_ in range(config.rounds + 1):  # the first makes the optimizers' state
            for name, worker in workers.items():
                seconds = worker.ask("step")
                if round_:
                    times[name].append(seconds)
        memory = {name: worker.ask("memory") for name, worker in workers.items()}
        last = {name: worker.ask("loss") for name, worker in workers.items()}
    finally:
        for worker in workers.values():
            worker.stop()
    step = {name: spread(values) for name, values in times.items()}
    tokens = config.batch_size * config.seq_len
    return {
        "first_loss": first,
        "last_loss": last,
        "experts_trial": trial,
        "experts_implementation": experts,
        "step": step,
        "tokens_per_second": {name: tokens / step[name]["median"] for name in SIDES},
        "ratio": step["transformers"]["median"] / step["pyllm"]["median"],
        "ratio_memory_kept": step[SIDES[2]]["median"] / step["pyllm"]["median"],
        "memory": memory,
    }


def check_same(losses: dict[str, float], tolerance: float) -> None:
    """Do all do the same work?

    Raises:
        RuntimeError: their losses differ.
    """
    ours = losses["pyllm"]
    for name, theirs in losses.items():
        if not abs(ours - theirs) <= tolerance * abs(ours):
            raise RuntimeError(
                f"pyllm's loss {ours} and that of {name} {theirs} differ by more than "
                f"{tolerance:.0e}: the two models are not the same"
            )


def try_experts(side: Side, ids: Any, name: str) -> float | str:
    """Seconds of forward and backward with this implementation of the experts, the better of two
    after one; or why it was not tried."""
    config = side.model.config
    rows = ids.numel() * config.num_experts_per_tok * config.num_hidden_layers
    gathered = 3 * rows * config.hidden_size * config.intermediate_size * side.model.dtype.itemsize
    if name == "batched_mm" and gathered > LARGEST_GATHER:
        return f"not tried: copies {gathered / 2**30:.0f} GiB of experts"
    seconds = []
    try:
        side.model.set_experts_implementation(name)
        for _ in range(3):
            start = time.perf_counter()
            side.forward(ids).backward()
            seconds.append(time.perf_counter() - start)
    except (RuntimeError, ValueError) as error:
        return f"failed: {str(error).splitlines()[0]}"
    finally:
        side.optimizer.zero_grad(set_to_none=True)
    return min(seconds[1:])


def read_status(key: str) -> int:
    """Bytes of this process: ``VmRSS`` now, ``VmHWM`` at most so far; Linux."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{key}:")))


def forget_peak() -> None:
    """Let ``VmHWM`` begin anew."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def describe_case(case: dict[str, Any]) -> str:
    """One line."""
    speed = ", ".join(f"{name} {rate:,.0f}" for name, rate in case["tokens_per_second"].items())
    memory = ", ".join(f"{grew['peak'] / 1e6:,.0f}" for grew in case["memory"].values())
    return (
        f"{case['preset']} {case['dtype']} ({case['experts_implementation']}): {speed} tokens/s; "
        f"ratio {case['ratio']:.2f}, {case['ratio_memory_kept']:.2f} with memory kept; {memory} MB"
    )


if __name__ == "__main__":
    run(main, Config)
