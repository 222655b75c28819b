"""What ``benchmarks/gpu.py`` measures of training under the memory of a small card."""

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from pyllm.data import TokenFile, read_texts, write_stories, write_tokens
from pyllm.evaluate import bits_per_byte
from pyllm.generate import peak_memory_bytes, time_decode
from pyllm.models import ModelConfig, Transformer, preset
from pyllm.tokenizers import Tokenizer, train_bpe
from pyllm.train import TRAIN_PRESETS, TrainConfig, Trainer, TrainingError
from pyllm.train.device import autocast, choose_dtype
from pyllm.train.memory import estimate_memory
from pyllm.train.trainer import seed_everything

Keep = Callable[..., None]

PROBE_STEPS = 20
CURVE = 10
"""Validations on the way."""
AFTERWARDS = 30.0
"""Seconds for the validation text and for decoding, once the steps are over."""


def train_and_decode(
    config: Any, device: torch.device, end: float, folder: Path, keep: Keep
) -> None:
    """Train within the minutes of ``config`` and before ``end``, then decode with that model."""
    cap = None
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        cap = min(config.memory_gib * 2**30, total)
        torch.cuda.set_per_process_memory_fraction(cap / total)
    trained, trainer = train(config, device, end, folder, keep)
    keep(training={**trained, "memory_cap": cap})
    keep(decode=[] if trainer is None else decode(trainer, config.toy))


def prepare(
    config: Any, folder: Path
) -> tuple[ModelConfig, TrainConfig, Tokenizer, TokenFile, TokenFile, list[str]]:
    """Model and training settings, tokenizer, token files, validation stories."""
    model, training = preset("moe-158m-gpt"), TRAIN_PRESETS["moe-158m-gpt"]
    if config.toy:
        texts, valid = write_stories(100, 0), list(write_stories(4, 0, "valid"))
        texts = list(texts)
        tokenizer = train_bpe(texts, 300)
        model = replace(model, vocab_size=300, n_layers=2, d_model=32, n_heads=2, n_kv_heads=2)
        model = replace(model, d_ff=32, n_experts=4)
        training = replace(training, seq_len=32, eval_tokens=512, warmup_steps=2)
        tokens_per_step = 512
    else:
        valid = list(read_texts(config.valid))
        files = [config.data, *([config.more_data] if config.more_data.is_file() else [])]
        texts = itertools.chain.from_iterable(map(read_texts, files))
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
    (folder / "tokens").mkdir(parents=True, exist_ok=True)
    train_file = write_tokens(texts, tokenizer, folder / "tokens" / "train.bin")
    valid_file = write_tokens(valid, tokenizer, folder / "tokens" / "valid.bin")
    return model, training, tokenizer, train_file, valid_file, valid


def train(
    config: Any, device: torch.device, end: float, folder: Path, keep: Keep
) -> tuple[dict[str, Any], Trainer | None]:
    """Train for ``minutes``; what it cost and what it gave, and the trainer with its model."""
    started = time.monotonic()
    model_config, training, tokenizer, train_file, valid_file, valid = prepare(config, folder)
    dtype = choose_dtype(training.dtype, device)
    prepared = time.monotonic()
    end = min(end - AFTERWARDS, prepared + config.minutes * 60)
    seed_everything(training.seed)
    model = Transformer(model_config).to(device)
    trainer = Trainer(model, tokenizer, train_file, valid_file, training, folder, device, dtype)
    steps = Steps(trainer, end, keep)
    try:
        steps.run()
    except TrainingError as error:  # the other parts still have something to tell
        print(error)
        told = {"error": str(error), "settings": asdict(training), **steps.found()}
        return told, None
    result = {
        "model": asdict(model_config),
        "settings": asdict(training) | {"max_steps": len(steps.losses)},
        "estimated_memory": estimated(trainer),
        "dtype": str(dtype).removeprefix("torch."),
        "training_tokens": len(train_file),
        "preparing_seconds": prepared - started,
        **steps.found(),
    }
    keep(training=result)
    scores: dict[str, Any]
    try:
        bpb = bits_per_byte(model, tokenizer, valid, autocast(device, dtype))
        scores = {"val_loss": trainer.validate(), "val_bpb": bpb.value, "val_bytes": bpb.bytes}
    except torch.cuda.OutOfMemoryError as error:  # what was trained and timed is kept all the same
        scores = {"val_loss": None, "val_bpb": None, "validation_error": str(error)}
    result |= scores
    shown = ("steps", "tokens_per_second", "peak_memory", "peak_reserved", "val_loss", "val_bpb")
    print("training:", {name: result[name] for name in shown}, flush=True)
    return result, trainer


def estimated(trainer: Trainer) -> dict[str, int]:
    """What scripts/plan_memory.py would have said of the peak, to be read beside it."""
    rows = trainer.micro_batch
    accumulation = trainer.config.batch_size * trainer.config.accumulation // rows
    settings = replace(trainer.config, batch_size=rows, accumulation=accumulation)
    estimate = estimate_memory(trainer.model.config, settings, trainer.dtype, trainer.device.type)
    return asdict(estimate) | {"total": estimate.total}


class Steps:
    """As many steps as fit before ``end``, at least the probe's unless that is long over.

    The clock chooses their number once, after the probe; the schedule is then that of a run of so
    many steps. The probe lies in the warmup, which does not depend on their number. Peaks of memory
    are those after the probe: in it Triton compiles and times its kernels, and the micro-batch is
    halved until it fits.
    """

    def __init__(self, trainer: Trainer, end: float, keep: Keep) -> None:
        self.trainer = trainer
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.val_losses: list[tuple[int, float]] = []
        self._end, self._keep = end, keep
        self._metrics: dict[str, Any] = {}
        self._probe_peaks: dict[str, int | None] = {}

    def run(self) -> None:
        """Take the steps.

        Raises:
            TrainingError: memory does not suffice for one sequence.
        """
        trainer, total = self.trainer, PROBE_STEPS
        cuda = trainer.device.type == "cuda"
        trainer.model.train()
        while len(self.losses) < total:
            if time.monotonic() > self._end and len(self.losses) >= (3 if cuda else PROBE_STEPS):
                break
            started = time.perf_counter()
            before = trainer.micro_batch
            self._metrics = trainer.step(len(self.losses))
            if trainer.micro_batch < before:
                print(trainer.notice(before))
            trainer.progress.step += 1
            self.seconds.append(time.perf_counter() - started)
            self.losses.append(self._metrics["train_loss"])
            if len(self.losses) == PROBE_STEPS:
                self._probe_peaks = self._peaks()
                if cuda:
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
                middle = statistics.median(self.seconds)
                left = self._end - time.monotonic()
                total += max(int(left / middle * 0.97), 0)  # the rest for validations
                trainer.config = replace(trainer.config, max_steps=total)
                print(f"{middle:.3f} s a step: {total} steps", flush=True)
            elif len(self.losses) > PROBE_STEPS and len(self.losses) % max(total // CURVE, 1) == 0:
                # Of the same micro-batches, and without what a backward needs: no new peak.
                self.val_losses.append((len(self.losses), trainer.validate()))
                trainer.model.train()
                print(f"step {len(self.losses)}/{total}: {self.val_losses[-1][1]:.3f}", flush=True)
                self._keep(training=self.found())

    def found(self) -> dict[str, Any]:
        """What is known so far."""
        settled = (
            self.seconds[PROBE_STEPS:] if len(self.seconds) > 2 * PROBE_STEPS else self.seconds
        )
        if len(settled) < 2:
            return {"steps": len(self.losses)}
        low, middle, high = statistics.quantiles(settled, n=4)
        return {
            "steps": len(self.losses),
            "micro_batch": self.trainer.micro_batch,
            "step_seconds": {"median": middle, "lower_quartile": low, "upper_quartile": high},
            "tokens_per_second": self.trainer.config.tokens_per_step / middle,
            **self._peaks(),
            "while_tuning": self._probe_peaks,
            "skipped_steps": self._metrics["skipped_steps"],
            "train_loss": {"every": 10, "values": self.losses[::10], "last": self.losses[-1]},
            "val_losses": self.val_losses,
        }

    def _peaks(self) -> dict[str, int | None]:
        device = self.trainer.device
        reserved = torch.cuda.max_memory_reserved() if device.type == "cuda" else None
        return {"peak_memory": peak_memory_bytes(device), "peak_reserved": reserved}


def decode(trainer: Trainer, toy: bool) -> list[dict[str, Any]]:
    """Latency of a token at batch 1, in half precision and in float32, and the memory."""
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
        print("decode:", found[-1], flush=True)
    return found
