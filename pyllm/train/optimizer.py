"""Which parameter is updated by which rule, and the learning rate of each step."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pyllm.models import ModelOutput
from pyllm.train.adamw8bit import is_adamw8bit, kept_by_adamw8bit, make_adamw8bit
from pyllm.train.config import TrainConfig
from pyllm.train.muon import Muon


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warmup, then a cosine down to ``min_lr_ratio`` of the peak; ``step`` from 0."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    span = max(config.max_steps - config.warmup_steps, 1)
    progress = min((step - config.warmup_steps) / span, 1.0)
    low = config.min_lr_ratio
    return config.learning_rate * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress)))


def step_loss(output: ModelOutput, config: TrainConfig) -> Tensor:
    """What a step makes smaller: cross-entropy, and the router's losses by their weights."""
    assert output.loss is not None
    loss = output.loss + config.balance_coef * output.balance_loss
    return loss + config.z_coef * output.z_loss


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Norms, biases, embeddings and routers; and the matrices inside the blocks.

    Weight decay falls on the latter only (decaying a router towards zero undoes its choices), and
    only they go by another rule than AdamW.
    """
    plain: list[nn.Parameter] = []
    matrices: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        inside = name.startswith("blocks.") and parameter.dim() >= 2
        (matrices if inside and not name.endswith("router") else plain).append(parameter)
    return plain, matrices


def make_optimizers(
    model: nn.Module, config: TrainConfig, dtype: torch.dtype = torch.float32
) -> list[Optimizer]:
    """AdamW for everything; or Muon, or AdamW with a state of 8 bits, for the matrices inside the
    blocks, and AdamW for the rest.

    Raises:
        ValueError: 8 bits, and bitsandbytes is not there.
    """
    plain, matrices = split_parameters(model)
    adamw: dict[str, Any] = {"lr": config.learning_rate, "betas": (config.beta1, config.beta2)}
    groups: list[dict[str, Any]] = [{"params": plain, "weight_decay": 0.0}]
    if config.optimizer == "adamw" and matrices:
        groups.append({"params": matrices, "weight_decay": config.weight_decay})
    optimizers: list[Optimizer] = [torch.optim.AdamW(groups, fused=True, **adamw)]
    if config.optimizer == "muon" and matrices:
        optimizers.append(
            Muon(
                matrices,
                lr=config.learning_rate,
                weight_decay=config.weight_decay,
                # float16 has too few exponents for the iterations.
                dtype=torch.bfloat16 if dtype == torch.bfloat16 else torch.float32,
            )
        )
    if config.optimizer == "adamw8bit" and matrices:
        optimizers.append(make_adamw8bit(matrices, weight_decay=config.weight_decay, **adamw))
    return optimizers


def empty_state(optimizer: Optimizer) -> dict[int, dict[str, Tensor]]:
    """What ``optimizer`` keeps for each of its parameters once it has stepped: names, shapes and
    dtypes, of tensors without content (on the device ``meta``)."""
    kind = "adamw"
    if isinstance(optimizer, Muon):
        kind = "muon"
    elif is_adamw8bit(optimizer):
        kind = "adamw8bit"
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    return dict(enumerate(_kept(parameters, kind)))


def drop_half_made_state(
    optimizer: Optimizer, parameters: list[Tensor], updated: list[bool]
) -> None:
    """Where memory ran out while an optimizer made the state of a parameter, let it begin anew."""
    numbers = {p: i for i, p in enumerate(p for g in optimizer.param_groups for p in g["params"])}
    whole = empty_state(optimizer)
    for parameter, done in zip(parameters, updated, strict=True):
        state = optimizer.state.get(parameter)
        if not done and state and not whole[numbers[parameter]].keys() <= state.keys():
            del optimizer.state[parameter]


def kept_state(model: nn.Module, kind: str) -> dict[int, dict[str, Tensor]]:
    """The same of all parameters of ``model``, trained with ``config.optimizer`` of this kind."""
    plain, matrices = split_parameters(model)
    return dict(enumerate([*_kept(plain, "adamw"), *_kept(matrices, kind)]))


def _kept(parameters: Iterable[Tensor], kind: str) -> list[dict[str, Tensor]]:
    kept = []
    for parameter in parameters:
        like = torch.empty_like(parameter, device="meta")
        if kind == "muon":
            kept.append({"momentum_buffer": like})
            continue
        step = torch.empty((), dtype=torch.float32, device="meta")
        if kind == "adamw":
            kept.append({"exp_avg": like, "exp_avg_sq": like, "step": step})
        else:
            kept.append({**kept_by_adamw8bit(like), "step": step})
    return kept
