"""Which settings make a training step fit into a device's memory, at the least cost."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from pyllm.models import ModelConfig
from pyllm.train.config import TrainConfig
from pyllm.train.memory import MemoryEstimate, estimate_memory

CONTEXT = 1 << 29
"""Bytes that CUDA's context, its libraries and the kernels' code take: 0.5 GiB, a guess, not yet
measured on a card."""
FRAGMENTATION = 0.06
"""The share of the rest that PyTorch's allocator may hold in pieces of the wrong size: with blocks
of 2 and 20 MB a guess, not yet measured on a card."""


@dataclass(frozen=True)
class Plan:
    """Settings that fit, or the smallest there are."""

    train: TrainConfig
    """As asked for, with another micro-batch, accumulation, recomputation or optimizer."""
    estimate: MemoryEstimate
    """Of these settings."""
    budget: int
    """Bytes that PyTorch may hold."""

    @property
    def fits(self) -> bool:
        """Is it within the budget?"""
        return self.estimate.total <= self.budget

    @property
    def needed_vram(self) -> int:
        """Bytes of a card that it would fit into."""
        return int(self.estimate.total / (1 - FRAGMENTATION)) + CONTEXT


def usable(free: int) -> int:
    """What tensors may take of ``free`` bytes that the allocator can get."""
    return max(int(free * (1 - FRAGMENTATION)), 0)


def memory_budget(vram: int) -> int:
    """What tensors may take of a card with ``vram`` bytes that nothing else uses."""
    return usable(vram - CONTEXT)


def plan_batch(
    model: ModelConfig,
    train: TrainConfig,
    dtype: torch.dtype,
    budget: int,
    device: str = "cuda",
    memory: int | None = None,
) -> Plan:
    """The largest micro-batch that fits; ``batch_size`` x ``accumulation`` stays what it is.
    ``memory`` as :func:`pyllm.train.memory.estimate_memory` has it.

    A step's peak, as a function of the micro-batch, is the largest of several straight lines (one
    for each moment): it only grows, so halving the list of divisors finds the place.
    """
    sequences = train.batch_size * train.accumulation
    sizes = [rows for rows in range(1, sequences + 1) if sequences % rows == 0]

    def plan(rows: int) -> Plan:
        chosen = replace(train, batch_size=rows, accumulation=sequences // rows)
        return Plan(chosen, estimate_memory(model, chosen, dtype, device, memory), budget)

    best = plan(sizes[0])
    low, high = 0, len(sizes) - 1
    while best.fits and low < high:
        middle = (low + high + 1) // 2
        tried = plan(sizes[middle])
        if tried.fits:
            best, low = tried, middle
        else:
            high = middle - 1
    return best


def plan_training(
    model: ModelConfig,
    train: TrainConfig,
    dtype: torch.dtype,
    budget: int,
    device: str = "cuda",
    memory: int | None = None,
) -> Plan:
    """What to change so that a step fits, in the order of what it costs.

    First a smaller micro-batch, down to one sequence: the same operations on fewer rows. Only then
    recomputation, a third more of them; only then the 8-bit optimizer, which rounds. The sequences
    of a step are those asked for. If nothing fits, the plan that needs least.
    """
    plans = []
    for chosen in _choices(train):
        plan = plan_batch(model, chosen, dtype, budget, device, memory)
        if plan.fits:
            return plan
        plans.append(plan)
    return min(plans, key=lambda plan: plan.estimate.total)


def _choices(train: TrainConfig) -> Iterator[TrainConfig]:
    for optimizer in dict.fromkeys((train.optimizer, "adamw8bit")):
        for recompute in (False, True):
            yield replace(train, optimizer=optimizer, recompute=recompute)
