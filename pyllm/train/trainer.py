"""The training loop, on one screen: batch, forward, backward, clip, step, log, evaluate, save."""

import math
import random
import time
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from pyllm._memory import is_out_of_memory
from pyllm.data import PackedBatches, TokenFile
from pyllm.evaluate import validation_loss
from pyllm.generate import SamplingConfig, generate_text
from pyllm.models import Transformer, count_flops
from pyllm.tokenizers import Tokenizer
from pyllm.train.checkpoint import Progress, load_checkpoint, save_checkpoint
from pyllm.train.config import TrainConfig
from pyllm.train.device import autocast, give_back_memory, matmul_peak
from pyllm.train.interrupt import held_signals
from pyllm.train.log import RunLog
from pyllm.train.optimizer import (
    drop_half_made_state,
    learning_rate,
    make_optimizers,
    step_loss,
)

MAX_BAD_STEPS_IN_A_ROW = 5
DEAD_AFTER_STEPS = 50


class TrainingError(ValueError):
    """Training cannot go on: the message says why and what to change."""


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and PyTorch's generators."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def first_line(error: BaseException) -> str:
    """Of its message; CUDA's goes on with advice for other programs."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def fixed_batches(file: TokenFile, config: TrainConfig) -> list[tuple[Tensor, Tensor]]:
    """The same validation batches every time: about ``eval_tokens`` tokens of the file."""
    batch_size = min(config.batch_size, max(len(file) // config.seq_len, 1))
    batches = PackedBatches(file, batch_size, min(config.seq_len, len(file)), seed=0)
    per_batch = batch_size * batches.seq_len
    wanted = min(config.eval_tokens, len(file))
    return [batches.batch(index) for index in range(max(wanted // per_batch, 1))]


@dataclass
class Trainer:
    """A model in training.

    Args:
        model: on its device, in float32.
        tokenizer: saved beside the weights, and used for sample stories.
        train_file, valid_file: token files.
        config: the settings.
        folder: the run folder.
        device: of the model.
        dtype: of the matrix products.
    """

    model: Transformer
    tokenizer: Tokenizer
    train_file: TokenFile
    valid_file: TokenFile
    config: TrainConfig
    folder: Path
    device: torch.device
    dtype: torch.dtype

    def __post_init__(self) -> None:
        config = self.config
        self.model.recompute = config.recompute
        self.batches = PackedBatches(
            self.train_file, config.batch_size, config.seq_len, config.seed
        )
        self.valid_batches = fixed_batches(self.valid_file, config)
        self.optimizers = make_optimizers(self.model, config, self.dtype)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.progress = Progress()
        self.settings = {
            "tokenizer": self.tokenizer.hash,
            "training tokens": self.train_file.sidecar.sha256,
            "validation tokens": self.valid_file.sidecar.sha256,
        }
        for name, part in (("model", self.model.config), ("train", config)):
            self.settings |= {f"{name}.{key}": value for key, value in asdict(part).items()}
        self._mark = time.perf_counter()

    def resume(self, name: str = "last") -> None:
        """Go on from the run folder's checkpoint ``last`` or ``best``.

        Raises:
            ValueError: there is none, it is damaged, or it is of another run.
        """
        self.progress = load_checkpoint(
            self.folder / name, self.model, self.optimizers, self.scaler, self.settings
        )

    def train(self, log: RunLog) -> Progress:
        """Train up to ``max_steps``; afterwards ``last`` and ``best`` hold checkpoints.

        Raises:
            TrainingError: the gradient was not finite for several steps in a row; the weights
                in ``last`` are those before them.
            KeyboardInterrupt: after the step in hand and saving ``last``; SystemExit for SIGTERM.
            OSError: the disk is full; ``last`` and ``best`` are as they were.
        """
        config, progress = self.config, self.progress
        flops = 3 * config.batch_size * config.accumulation
        flops *= count_flops(self.model.config, config.seq_len).total
        peak = matmul_peak(self.device, self.dtype)
        self.model.train()
        self._mark = time.perf_counter()
        with held_signals() as interrupted:
            while progress.step < config.max_steps:
                started = time.perf_counter()
                before = self.micro_batch
                metrics = self.step(progress.step)
                if self.micro_batch < before:
                    log.say(self.notice(before))
                progress.step += 1
                seconds = time.perf_counter() - started
                metrics["tok_per_sec"] = config.tokens_per_step / seconds
                metrics["mfu"] = flops / seconds / peak
                last = progress.step == config.max_steps
                if progress.step % config.eval_every == 0 or last:
                    metrics["val_loss"] = self.validate()
                log.row({"step": progress.step} | metrics)
                if config.sample_every and progress.step % config.sample_every == 0 and not last:
                    self.sample(log)
                if metrics.get("val_loss", math.inf) < progress.best_val_loss:
                    progress.best_val_loss = metrics["val_loss"]
                    self.save("best", log)
                stop = interrupted() or self._hopeless(metrics["grad_norm"])
                if progress.step % config.save_every == 0 or last or stop:
                    self.save("last", log)
                if stop:
                    raise stop
        return progress

    @property
    def micro_batch(self) -> int:
        """Sequences that are computed at once: ``batch_size``, or less since memory ran out."""
        return self.progress.micro_batch or self.config.batch_size

    def step(self, step: int) -> dict[str, Any]:
        """One optimiser step; returns its metrics.

        Where memory runs out, the micro-batch is halved and the step done again from its start,
        with the same sequences: the same result, but for rounding and for the balance loss, which
        is one of a micro-batch.

        Raises:
            TrainingError: one sequence at a time does not fit, or the optimizer's update.
        """
        while True:
            try:
                totals, load = self._accumulate(step)
                norm = self._clip()
                break
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                reason = first_line(error)
            self._halve(reason)  # out here: the traceback held the step's tensors
        rate = learning_rate(step, self.config)
        self._update(norm, rate)
        if self.model.config.router_bias and math.isfinite(norm):
            self.model.move_router_bias(load, self.config.bias_rate)
        metrics: dict[str, Any] = {**totals, "grad_norm": norm, "lr": rate}
        metrics["skipped_steps"] = self.progress.skipped_steps
        metrics["micro_batch"] = self.micro_batch
        if load.numel():
            metrics |= self._expert_load(load.cpu())
        return metrics

    def _accumulate(self, step: int) -> tuple[dict[str, float], Tensor]:
        """Forward and backward of all micro-batches: mean losses, and tokens per expert."""
        config = self.config
        totals = {"train_loss": 0.0, "balance_loss": 0.0, "z_loss": 0.0}
        load: Tensor | None = None
        n_pieces = config.accumulation * config.batch_size // self.micro_batch
        for inputs, targets in self._micro_batches(step):
            with autocast(self.device, self.dtype):
                output = self.model(inputs.to(self.device), targets.to(self.device))
            loss = step_loss(output, config)
            self.scaler.scale(loss / n_pieces).backward()
            assert output.loss is not None
            totals["train_loss"] += output.loss.item() / n_pieces
            totals["balance_loss"] += output.balance_loss.item() / n_pieces
            totals["z_loss"] += output.z_loss.item() / n_pieces
            counts = output.tokens_per_expert
            load = counts if load is None else load + counts
        assert load is not None
        return totals, load

    def _micro_batches(self, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        for index in range(self.config.accumulation):
            inputs, targets = self.batches.batch(step * self.config.accumulation + index)
            rows = self.micro_batch
            yield from zip(inputs.split(rows), targets.split(rows), strict=True)

    def _clip(self) -> float:
        """Bring the gradient to its true scale and below the limit; its norm before that."""
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        limit = self.config.grad_clip or math.inf
        parameters = list(self.model.parameters())
        total = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        norm = total.item()
        if norm > limit:  # torch's clip_grad_norm_ multiplies by 1 otherwise: another pass
            torch.nn.utils.clip_grads_with_norm_(parameters, limit, total)
        return norm

    def _update(self, norm: float, rate: float) -> None:
        """Step; a gradient that is not finite is skipped and counted."""
        if math.isfinite(norm):
            self.progress.bad_in_a_row = 0
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = rate
                self._step_whole(optimizer)
        else:
            self.progress.skipped_steps += 1
            # Loss scaling finds its scale by overflowing: those steps are expected.
            if not self.scaler.is_enabled() or self.scaler.get_scale() <= 1:
                self.progress.bad_in_a_row += 1
        self.scaler.update()
        self._forget_gradients()

    def _step_whole(self, optimizer: Optimizer) -> None:
        """Step, and where memory runs out on the way, go on with the parameters that are left.

        The gradients of those that are done are given back first, so there is more room each time.
        """
        left = [p for group in optimizer.param_groups for p in group["params"]]
        halved = False
        while True:
            versions = [p._version for p in left]
            try:
                self.scaler.step(optimizer)
                return
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                reason = first_line(error)
            moved = [p._version != before for p, before in zip(left, versions, strict=True)]
            if halved and not any(moved):
                raise TrainingError(
                    f"out of memory on {self.device.type} in the optimizer's step ({reason}); "
                    f"start a run with {self._remedies()}"
                )
            if not halved and self.micro_batch > 1:
                self._shrink()
            halved = True
            for parameter, done in zip(left, moved, strict=True):
                if done:
                    parameter.grad = None
            drop_half_made_state(optimizer, left, moved)
            left = [p for p, done in zip(left, moved, strict=True) if not done]
            give_back_memory(self.device)

    def _halve(self, reason: str) -> None:
        """Forget what the step has done so far, and compute fewer sequences at a time from now on.

        Raises:
            TrainingError: it was one.
        """
        self._forget_gradients()
        # It may have unscaled gradients that are gone now, and refuses to do so twice.
        scale = self.scaler.state_dict()
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.scaler.is_enabled())
        self.scaler.load_state_dict(scale)
        if self.micro_batch == 1:
            raise TrainingError(
                f"out of memory on {self.device.type} with one sequence of {self.config.seq_len} "
                f"tokens at a time ({reason}); start a run with {self._remedies()}"
            )
        self._shrink()
        give_back_memory(self.device)

    def _shrink(self) -> None:
        rows = range(self.micro_batch // 2, 0, -1)
        self.progress.micro_batch = next(n for n in rows if self.config.batch_size % n == 0)

    def _forget_gradients(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def _remedies(self) -> str:
        config = self.config
        remedies = ["a shorter --train.seq-len", "a smaller --preset"]
        if config.optimizer != "adamw8bit":
            remedies.insert(0, "--train.optimizer adamw8bit")
        if not config.recompute:
            remedies.insert(0, "--train.recompute")
        return ", ".join(remedies[:-1]) + f" or {remedies[-1]}"

    def _hopeless(self, norm: float) -> TrainingError | None:
        progress = self.progress
        if progress.bad_in_a_row < MAX_BAD_STEPS_IN_A_ROW:
            return None
        return TrainingError(
            f"the gradient was not finite ({norm}) for {progress.bad_in_a_row} steps in a row, up "
            f"to step {progress.step}; {self.folder / 'last'} holds the weights before them; start "
            "a run with a lower --train.learning-rate, or with --train.dtype float32"
        )

    def _expert_load(self, load_LE: Tensor) -> dict[str, Any]:
        share_LE = load_LE / load_LE.sum(-1, keepdim=True)
        idle = self.progress.idle_steps or [[0] * load_LE.shape[1]] * load_LE.shape[0]
        idle = [
            [0 if used else steps + 1 for used, steps in zip(*layer, strict=True)]
            for layer in zip(load_LE.tolist(), idle, strict=True)
        ]
        self.progress.idle_steps = idle
        by_bias = self.model.config.router_bias
        remedy = "--train.bias-rate" if by_bias else "--train.balance-coef"
        for layer, steps_E in enumerate(idle):
            for expert, steps in enumerate(steps_E):
                if steps == DEAD_AFTER_STEPS:
                    warnings.warn(
                        f"MoE layer {layer} of 0 to {len(idle) - 1}: expert {expert} got no token "
                        f"for {steps} steps; raise {remedy}",
                        stacklevel=2,
                    )
        ratio = (share_LE.amax(-1) * share_LE.shape[1]).mean().item()
        rounded = [[round(share, 5) for share in layer] for layer in share_LE.tolist()]
        dead = sum(steps >= DEAD_AFTER_STEPS for layer in idle for steps in layer)
        return {"expert_load_max_over_mean": ratio, "dead_experts": dead, "expert_load": rounded}

    def notice(self, before: int) -> str:
        """What to say of a step that found too little memory for ``before`` sequences at a time."""
        n_pieces = self.config.batch_size * self.config.accumulation // self.micro_batch
        return (
            f"step {self.progress.step + 1}: out of memory with {before} sequences at a time; from "
            f"here on {self.micro_batch} at a time, {n_pieces} times a step"
        )

    def validate(self) -> float:
        """Loss on the fixed validation batches, in nats per token."""
        rows = self.micro_batch
        batches = (
            pair
            for inputs, targets in self.valid_batches
            for pair in zip(inputs.split(rows), targets.split(rows), strict=True)
        )
        return validation_loss(self.model, batches, autocast(self.device, self.dtype))

    def sample(self, log: RunLog) -> None:
        """A short story, to the terminal and to ``samples.txt``."""
        log.sample(self.progress.step, self.tell(max_new_tokens=60))

    def tell(self, max_new_tokens: int, seed: int = 0) -> str:
        """Generate a story from an empty context."""
        sampling = SamplingConfig(
            temperature=0.7, top_p=0.9, max_new_tokens=max_new_tokens, seed=seed
        )
        with autocast(self.device, self.dtype) if self.device.type != "cpu" else nullcontext():
            story = generate_text(self.model, self.tokenizer, "", sampling)
        self.model.train()
        return story

    def save(self, name: str, log: RunLog) -> None:
        """Write the checkpoint ``last`` or ``best``."""
        self.progress.logs = log.marks()
        self._count_time()
        save_checkpoint(
            self.folder / name,
            self.model,
            self.tokenizer,
            self.optimizers,
            self.scaler,
            self.progress,
            self.settings,
        )
        self._count_time()

    def _count_time(self) -> None:
        """All of the loop counts as training time: steps, evaluations, samples, checkpoints."""
        now = time.perf_counter()
        self.progress.trained_seconds += now - self._mark
        self._mark = now
