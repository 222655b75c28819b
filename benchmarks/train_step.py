"""How long a training step takes, beside transformers on the same weights, in one run.

    pip install 'transformers>=5'
    python benchmarks/train_step.py

A step is forward, backward and a fused AdamW, on the same tokens in both programs, which take
turns. transformers gets the weights through pyllm's export, as a Mixtral, and runs its experts in
whichever of its implementations a trial finds fastest. Before anything is timed, both must give one
loss. Neither has a balance loss or a clipped gradient: transformers defines the former otherwise.

``mixed`` is float32 weights with bfloat16 products (autocast), as pyllm's trainer and transformers'
do it; ``bfloat16`` is weights, gradients and the optimizer's state in bfloat16, in both. The memory
is that of a process of its own, above what its imports take. Writes
``benchmarks/results/train-step-<date>.json``.
"""

import json
import statistics
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

TOLERANCE = {"float32": 1e-4, "mixed": 1e-2, "bfloat16": 2e-2}
"""How far the two losses may lie apart before the first step, as a share: roundings, which bfloat16
has more of; a wrong layer moves a loss further."""
EXPERTS = ("grouped_mm", "batched_mm", "eager")
LARGEST_GATHER = 4 << 30
"""Bytes of experts that ``batched_mm`` copies for the backward; what takes more is not tried."""
LEARNING_RATE = 1e-3
SIDES = ("pyllm", "transformers")

CHILD = """
import json, sys
sys.path.insert(0, sys.argv[1])
import train_step
print(json.dumps(train_step.grown(*sys.argv[2:])))
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
    """Of both programs."""
    memory: bool = True
    """Measure the memory as well?"""
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
    """Random weights, as a folder of each program's."""
    import torch

    from pyllm.export import write_hugging_face
    from pyllm.models import Transformer, preset, save_model
    from pyllm.tokenizers import byte_tokenizer

    torch.manual_seed(0)
    model = Transformer(preset(preset_name))
    folders = {side: str(place / f"{preset_name}-{side}") for side in SIDES}
    save_model(folders["pyllm"], model, byte_tokenizer())
    write_hugging_face(folders["transformers"], model, byte_tokenizer())
    return folders


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


def measure(config: Config, folders: dict[str, str], dtype: str) -> dict[str, Any]:
    """Both programs in turns on one model."""
    sides = {name: load_side(name, folders[name], dtype) for name in SIDES}
    vocab_size = sides["pyllm"].model.config.vocab_size
    ids = make_batch(vocab_size, config.batch_size, config.seq_len)
    first = {name: float(side.forward(ids).detach()) for name, side in sides.items()}
    check_same(first, TOLERANCE[dtype])
    trial = choose_experts(sides["transformers"], ids)
    times: dict[str, list[float]] = {name: [] for name in SIDES}
    for round_ in range(config.rounds + 1):  # the first makes the optimizers' state
        for name, side in sides.items():
            start = time.perf_counter()
            side.step(ids)
            if round_:
                times[name].append(time.perf_counter() - start)
    last = {name: float(side.forward(ids).detach()) for name, side in sides.items()}
    found: dict[str, Any] = {
        "first_loss": first,
        "last_loss": last,
        "experts_trial": trial,
        "experts_implementation": sides["transformers"].model.config._experts_implementation,
        "step": {name: spread(values) for name, values in times.items()},
    }
    tokens = config.batch_size * config.seq_len
    found["tokens_per_second"] = {name: tokens / found["step"][name]["median"] for name in SIDES}
    found["ratio"] = found["step"]["transformers"]["median"] / found["step"]["pyllm"]["median"]
    if config.memory:
        del sides
        found["memory"] = {
            name: measure_memory(config, name, folders[name], dtype, found) for name in SIDES
        }
    return found


def check_same(losses: dict[str, float], tolerance: float) -> None:
    """Do both do the same work?

    Raises:
        RuntimeError: their losses differ.
    """
    ours, theirs = losses["pyllm"], losses["transformers"]
    if not abs(ours - theirs) <= tolerance * abs(ours):
        raise RuntimeError(
            f"pyllm's loss {ours} and transformers' {theirs} differ by more than {tolerance:.0e}: "
            "the two models are not the same"
        )


def choose_experts(side: Side, ids: Any) -> dict[str, float | str]:
    """Set the implementation of the experts whose forward and backward is fastest, the better of
    two; seconds of each, or why it was not tried."""
    found: dict[str, float | str] = {}
    config = side.model.config
    rows = ids.numel() * config.num_experts_per_tok * config.num_hidden_layers
    item = side.model.dtype.itemsize
    gathered = 3 * rows * config.hidden_size * config.intermediate_size * item
    for name in EXPERTS:
        if name == "batched_mm" and gathered > LARGEST_GATHER:
            found[name] = f"not tried: copies {gathered / 2**30:.0f} GiB of experts"
            continue
        side.model.set_experts_implementation(name)
        seconds = []
        try:
            for _ in range(3):  # the first warms up
                start = time.perf_counter()
                side.forward(ids).backward()
                seconds.append(time.perf_counter() - start)
        except (RuntimeError, ValueError) as error:
            found[name] = f"failed: {str(error).splitlines()[0]}"
        side.optimizer.zero_grad(set_to_none=True)
        if name not in found:
            found[name] = min(seconds[1:])
    timed = {name: value for name, value in found.items() if isinstance(value, float)}
    side.model.set_experts_implementation(min(timed, key=lambda name: timed[name]))
    return found


def measure_memory(
    config: Config, name: str, folder: str, dtype: str, found: dict[str, Any]
) -> dict[str, int]:
    """Bytes of a process that trains with one of the two."""
    here = str(Path(__file__).resolve().parent)
    sizes = (config.threads, config.batch_size, config.seq_len)
    words = [name, folder, dtype, found["experts_implementation"], *map(str, sizes)]
    output = subprocess.check_output([sys.executable, "-c", CHILD, here, *words], text=True)
    grew: dict[str, int] = json.loads(output.splitlines()[-1])
    return grew


def grown(
    name: str, folder: str, dtype: str, experts: str, threads: str, batch: str, length: str
) -> dict[str, int]:
    """How far this process grows over three steps; ``imports`` is what it had before."""
    import torch

    if name == "transformers":
        import transformers.models.mixtral.modeling_mixtral  # noqa: F401
    else:
        import pyllm.models.transformer  # noqa: F401
    torch.set_num_threads(int(threads))
    start = peak()
    side = load_side(name, folder, dtype)
    if name == "transformers":
        side.model.set_experts_implementation(experts)
    ids = make_batch(side.model.config.vocab_size, int(batch), int(length))
    for _ in range(3):
        side.step(ids)
    return {"imports": start, "peak": peak() - start}


def peak() -> int:
    """The most memory this process has had, in bytes; Linux."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM:")))


def spread(times: list[float]) -> dict[str, float]:
    """Median and quartiles, in seconds."""
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high, "calls": len(times)}


def describe_case(case: dict[str, Any]) -> str:
    """One line."""
    speed = case["tokens_per_second"]
    line = (
        f"{case['preset']} {case['dtype']}: {speed['pyllm']:,.0f} tokens/s, transformers "
        f"({case['experts_implementation']}) {speed['transformers']:,.0f}, ratio "
        f"{case['ratio']:.2f}"
    )
    if "memory" in case:
        peaks = [f"{case['memory'][name]['peak'] / 2**20:,.0f} MiB" for name in SIDES]
        line += f"; memory {' and '.join(peaks)}"
    return line


if __name__ == "__main__":
    run(main, Config)
