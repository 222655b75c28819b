"""Which parameter is updated by which rule, and the learning rate of each step."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

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


def make_optimizers(
    model: nn.Module, config: TrainConfig, dtype: torch.dtype = torch.float32
) -> list[Optimizer]:
    """AdamW for everything, or Muon for the matrices inside the blocks and AdamW for the rest.

    Weight decay falls on matrices only: not on norms, biases, embeddings or the router (decaying
    a router towards zero undoes its choices).
    """
    muon, decayed, plain = [], [], []
    for name, parameter in model.named_parameters():
        inside = name.startswith("blocks.") and parameter.dim() >= 2
        if not inside or name.endswith("router"):
            plain.append(parameter)
        elif config.optimizer == "muon":
            muon.append(parameter)
        else:
            decayed.append(parameter)
    groups: list[dict[str, Any]] = [{"params": plain, "weight_decay": 0.0}]
    if decayed:
        groups.append({"params": decayed, "weight_decay": config.weight_decay})
    optimizers: list[Optimizer] = [
        torch.optim.AdamW(
            groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True
        )
    ]
    if muon:
        optimizers.append(
            Muon(
                muon,
                lr=config.learning_rate,
                weight_decay=config.weight_decay,
                # float16 has too few exponents for the iterations.
                dtype=torch.bfloat16 if dtype == torch.bfloat16 else torch.float32,
            )
        )
    return optimizers


def empty_state(optimizer: Optimizer) -> dict[int, dict[str, Tensor]]:
    """What ``optimizer`` keeps for each of its parameters once it has stepped: names, shapes and
    dtypes, of tensors without content (on the device ``meta``)."""
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    names = ["momentum_buffer"] if isinstance(optimizer, Muon) else ["exp_avg", "exp_avg_sq"]
    state = {}
    for index, parameter in enumerate(parameters):
        state[index] = {name: torch.empty_like(parameter, device="meta") for name in names}
        if not isinstance(optimizer, Muon):
            state[index]["step"] = torch.empty((), dtype=torch.float32, device="meta")
    return state
