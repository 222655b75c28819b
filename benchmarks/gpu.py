"""Everything a GPU can tell in ten minutes, under the memory of a small card.

    python benchmarks/gpu.py

Trains moe-158m-gpt on TinyStories with GPT-2's vocabulary under a cap, times decoding, and then,
without the cap: the experts beside ``grouped_mm``, ScatterMoE and Liger, attention beside
PyTorch's, ``int8_linear`` beside the bandwidth, decoding of moe-158m beside its floor and what
memory that takes, and every operation on every face. Writes
``benchmarks/results/gpu-<card>-<date>.json`` after each part. ``--device cpu --toy`` runs the same
code at toy size; with ``TRITON_INTERPRET=1 PYLLM_FACE=triton`` the Triton kernels, interpreted.
"""

import os
import re
import statistics
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pyllm._checks import check_size, is_finite, shown
from pyllm._cli import require_writable, run

if TYPE_CHECKING:
    import torch

    from pyllm.data import TokenFile
    from pyllm.models import ModelConfig
    from pyllm.tokenizers import Tokenizer
    from pyllm.train import TrainConfig, Trainer

HERE = Path(__file__).resolve().parent
SHARED = Path(os.environ.get("PYLLM_SHARED_DATA") or HERE.parents[1] / "shared" / "data")
PROBE_STEPS = 20


@dataclass
class Config:
    """Train, decode and time operations on a GPU."""

    data: Path = SHARED / "tinystories" / "train.txt"
    """Text to train on."""
    valid: Path = SHARED / "tinystories" / "valid.txt"
    """Text to validate on."""
    gpt2_folder: Path = SHARED / "tokenizer"
    """Folder with gpt2_vocab.bpe and gpt2_encoder.json."""
    device: Literal["cuda", "mps", "cpu"] = "cuda"
    """Where to run."""
    minutes: float = 4.0
    """Of training; how many steps that is, is found from the first 20. All else takes five more."""
    memory_gib: float = 3.4
    """Most memory PyTorch may allocate on a CUDA device; the context comes on top."""
    optimizer: Literal["adamw", "muon"] = "muon"
    """As in train_moe.py."""
    batch_size: int = 8
    """Sequences in a micro-batch; halved for as long as memory does not suffice."""
    toy: bool = False
    """Toy sizes on embedded stories: to see that everything works."""
    results: Path = HERE / "results"
    """Folder of the JSON file."""
    out: str = ""
    """Folder for token files and so on; empty: runs/gpu-<date>-<time>."""

    def __post_init__(self) -> None:
        if not is_finite(self.minutes) or self.minutes < 0:
            raise ValueError(f"minutes must be at least 0, got {shown(self.minutes)}")
        if not is_finite(self.memory_gib) or self.memory_gib <= 0:
            raise ValueError(f"memory_gib must be above 0, got {shown(self.memory_gib)}")
        check_size("batch_size", self.batch_size, 1, 2**31 - 1)


def main(config: Config) -> None:
    """Measure part by part."""
    sys.path.insert(0, str(HERE))
    from _record import Record

    from pyllm.models import choose_device
    from pyllm.train.run import default_folder

    device = choose_device(config.device)
    require_writable(config.results)
    folder = Path(config.out or default_folder("gpu"))
    facts = describe(device, config)
    card = re.sub(r"[^a-z0-9]+", "-", facts["name"].lower()).strip("-")
    record = Record(config.results, f"gpu-{card}{'-toy' if config.toy else ''}")
    # Names rather than paths: the file is committed, and paths are this machine's own.
    settings = {"data": config.data.name, "valid": config.valid.name}
    for name in ("minutes", "memory_gib", "optimizer", "batch_size", "toy"):
        settings[name] = getattr(config, name)
    record.add(device=facts, settings=settings)
    print(f"device: {facts}")
    trained, trainer = train(config, device, folder)
    record.add(training=trained)
    record.add(decode=[] if trainer is None else decode(trainer, config.toy))
    del trainer
    parts(record, device.type, config.toy)
    record.add(operations=operations(device, config.toy))
    print(record.path)


def parts(record: Any, device: str, toy: bool) -> None:
    """Ours beside the peers. One that fails must not cost the others' figures."""
    import _gpu_parts as found

    found.lift_cap(device)
    copied = found.bandwidth(device, toy)
    record.add(bandwidth=copied, cap_after_training=None)
    top = copied["bytes_per_second"]
    calls = {
        "decode_beside_floor": lambda: found.decode_beside_floor(device, toy, top),
        "memory": lambda: found.memory(device, toy),
        "int8_linear": lambda: found.int8_row(device, toy, top),
        "experts": lambda: found.experts(device, toy),
        "attention": lambda: found.attention_beside_sdpa(device, toy),
    }
    for name, call in calls.items():
        started = time.perf_counter()
        try:
            result: Any = call()
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {error}"}
            print(name, result, flush=True)
        record.add(**{name: result, f"{name}_took": time.perf_counter() - started})


def describe(device: "torch.device", config: Config) -> dict[str, Any]:
    """Name and size of the device; caps what PyTorch may allocate on it."""
    import torch

    if device.type != "cuda":
        return {"name": device.type}
    properties = torch.cuda.get_device_properties(device)
    share = config.memory_gib * 2**30 / properties.total_memory
    if share < 1:
        torch.cuda.set_per_process_memory_fraction(share)
    return {
        "name": properties.name,
        "total_memory": properties.total_memory,
        "allocator_cap": min(share, 1.0) * properties.total_memory,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
    }


def prepare(
    config: Config, folder: Path
) -> tuple["ModelConfig", "TrainConfig", "Tokenizer", "TokenFile", "TokenFile", list[str]]:
    """Model and training settings, tokenizer, token files, validation stories."""
    from pyllm.data import read_texts, write_stories, write_tokens
    from pyllm.models import preset
    from pyllm.tokenizers import Tokenizer, train_bpe
    from pyllm.train import TRAIN_PRESETS

    model, training = preset("moe-158m-gpt"), TRAIN_PRESETS["moe-158m-gpt"]
    if config.toy:
        texts, valid = list(write_stories(100, 0)), list(write_stories(4, 0, "valid"))
        tokenizer = train_bpe(texts, 300)
        model = replace(model, vocab_size=300, n_layers=2, d_model=32, n_heads=2, n_kv_heads=2)
        model = replace(model, d_ff=32, n_experts=4)
        training = replace(training, seq_len=32, eval_tokens=512, warmup_steps=2)
        tokens_per_step = 512
    else:
        valid = list(read_texts(config.valid))
        texts = read_texts(config.data)
        tokenizer = Tokenizer.from_gpt2(
            config.gpt2_folder / "gpt2_vocab.bpe", config.gpt2_folder / "gpt2_encoder.json"
        )
        training = replace(training, seq_len=512, warmup_steps=100)
        tokens_per_step = 16_384
    sequences = tokens_per_step // training.seq_len
    batch_size = min(config.batch_size, sequences)
    training = replace(
        training,
        batch_size=batch_size,
        accumulation=max(sequences // batch_size, 1),
        optimizer=config.optimizer,
        device=config.device,
    )
    train_file = write_tokens(texts, tokenizer, folder / "tokens" / "train.bin")
    valid_file = write_tokens(valid, tokenizer, folder / "tokens" / "valid.bin")
    return model, training, tokenizer, train_file, valid_file, valid


def train(
    config: Config, device: "torch.device", folder: Path
) -> tuple[dict[str, Any], "Trainer | None"]:
    """Train for ``minutes``; what it cost and what it gave, and the trainer with its model."""
    import torch

    from pyllm.evaluate import bits_per_byte
    from pyllm.generate import peak_memory_bytes
    from pyllm.models import Transformer
    from pyllm.train import Trainer, TrainingError
    from pyllm.train.device import autocast, choose_dtype
    from pyllm.train.trainer import seed_everything

    (folder / "tokens").mkdir(parents=True, exist_ok=True)
    model_config, training, tokenizer, train_file, valid_file, valid = prepare(config, folder)
    dtype = choose_dtype(training.dtype, device)
    end = time.perf_counter() + config.minutes * 60
    seed_everything(training.seed)
    model = Transformer(model_config).to(device)
    trainer = Trainer(model, tokenizer, train_file, valid_file, training, folder, device, dtype)
    try:
        seconds, losses, skipped = train_steps(trainer, end - time.perf_counter())
    except TrainingError as error:  # the other parts still have something to tell
        print(error)
        return {"error": str(error), "settings": asdict(training)}, None
    # Read before the validation, which keeps nothing for a backward but takes larger batches.
    peak = peak_memory_bytes(device)
    try:
        bpb = bits_per_byte(model, tokenizer, valid, autocast(device, dtype))
        scores = {"val_loss": trainer.validate(), "val_bpb": bpb.value, "val_bytes": bpb.bytes}
    except torch.cuda.OutOfMemoryError as error:  # what was trained and timed is kept all the same
        scores = {"val_loss": None, "val_bpb": None, "validation_error": str(error)}
    settled = seconds[1:] if len(seconds) > 2 else seconds
    low, middle, high = statistics.quantiles(settled, n=4)
    result = {
        "model": asdict(model_config),
        "settings": asdict(training) | {"max_steps": len(losses)},
        "micro_batch": trainer.micro_batch,
        "estimated_memory": estimated(trainer),
        "dtype": str(dtype).removeprefix("torch."),
        "steps": len(losses),
        "step_seconds": {"median": middle, "lower_quartile": low, "upper_quartile": high},
        "tokens_per_second": training.tokens_per_step / middle,
        "peak_memory": peak,
        "peak_reserved": torch.cuda.max_memory_reserved() if device.type == "cuda" else None,
        "skipped_steps": skipped,
        "train_loss": {"every": 10, "values": losses[::10], "last": losses[-1]},
        **scores,
    }
    shown = ("steps", "tokens_per_second", "peak_memory", "val_loss", "val_bpb")
    print("training:", {name: result[name] for name in shown})
    return result, trainer


def estimated(trainer: "Trainer") -> dict[str, int]:
    """What scripts/plan_memory.py would have said of the peak, to be read beside it."""
    from pyllm.train.memory import estimate_memory

    rows = trainer.micro_batch
    accumulation = trainer.config.batch_size * trainer.config.accumulation // rows
    settings = replace(trainer.config, batch_size=rows, accumulation=accumulation)
    estimate = estimate_memory(trainer.model.config, settings, trainer.dtype, trainer.device.type)
    return asdict(estimate) | {"total": estimate.total}


def train_steps(trainer: "Trainer", budget: float) -> tuple[list[float], list[float], int]:
    """Seconds and losses of as many steps as fit into ``budget`` seconds, at least the probe's.

    The clock chooses the number of steps once, after the probe; the schedule is then that of a
    run of so many steps. The probe lies in the warmup, which does not depend on their number.
    """
    seconds: list[float] = []
    losses: list[float] = []
    total, skipped = PROBE_STEPS, 0
    trainer.model.train()
    while len(losses) < total:
        started = time.perf_counter()
        before = trainer.micro_batch
        metrics = trainer.step(len(losses))
        if trainer.micro_batch < before:
            print(trainer.notice(before))
        trainer.progress.step += 1
        seconds.append(time.perf_counter() - started)
        losses.append(metrics["train_loss"])
        skipped = metrics["skipped_steps"]
        if len(losses) == PROBE_STEPS:
            left = budget - sum(seconds)
            total += max(int(left / statistics.median(seconds)), 0)
            trainer.config = replace(trainer.config, max_steps=total)
            print(f"{statistics.median(seconds):.3f} s a step: {total} steps")
        elif len(losses) % 100 == 0:
            print(f"step {len(losses)}/{total}  loss {losses[-1]:.3f}", flush=True)
    return seconds, losses, skipped


def decode(trainer: "Trainer", toy: bool) -> list[dict[str, Any]]:
    """Latency of a token at batch 1, in half precision and in float32, and the memory."""
    import torch

    from pyllm.generate import peak_memory_bytes, time_decode

    device = trainer.device
    half = torch.bfloat16 if trainer.dtype == torch.float32 else trainer.dtype
    trainer.optimizers.clear()
    prompt, new = (8, 8) if toy else (128, 128)
    found = []
    for dtype in (torch.float32, half):  # in this order: the weights are rounded only once
        model = trainer.model.eval().to(dtype)
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        times = time_decode(model, 1, prompt, new)
        low, high = times.quartiles
        found.append(
            {
                "dtype": str(dtype).removeprefix("torch."),
                "prompt_tokens": prompt,
                "prefill_seconds": times.prefill,
                "median": times.median,
                "lower_quartile": low,
                "upper_quartile": high,
                "fastest": min(times.steps),
                "slowest": max(times.steps),
                "peak_memory": peak_memory_bytes(device),
            }
        )
        print("decode:", found[-1])
    return found


def operations(device: "torch.device", toy: bool) -> list[dict[str, Any]]:
    """Forward and backward of each operation on each face, as ``benchmarks/ops.py`` times them."""
    import torch
    from ops import DTYPES, time_case

    from pyllm.testing import OPERATIONS

    names = ["fp32"] if toy else ["fp32", "fp16"]
    if device.type == "cuda" and torch.cuda.is_bf16_supported(False):
        names.append("bf16")
    found = []
    for operation in OPERATIONS.values():
        bench = {"tiny": operation.tiny} if toy else operation.bench
        for name in names:
            for label, sizes in bench.items():
                case = operation.case(sizes)
                row: dict[str, Any] = {"op": case.op, "name": label, "dtype": name}
                row["sizes"] = dict(case.sizes)
                try:
                    seconds = 0.01 if toy else 0.1
                    row["rows"] = time_case(case, DTYPES[name], device.type, seconds, cold=False)
                except Exception as error:  # one that fails must not cost the others' figures
                    row["error"] = f"{type(error).__name__}: {error}"
                found.append(row)
                print("operation:", row, flush=True)
    return found


if __name__ == "__main__":
    run(main, Config)
