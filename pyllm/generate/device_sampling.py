"""Drawing the next token where its logits are: nothing of it waits for the device.

The tokens are those of :func:`pyllm.generate.sampling.sample_token` for the same uniform numbers,
but for rounding. The settings are tensors, so that a captured step serves all of them.
"""

from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

from pyllm.generate.config import SamplingConfig
from pyllm.generate.sampling import LIMITS, penalised

Way = Literal["greedy", "whole", "sorted"]
"""How much work drawing is: the likeliest word; one of all; or one of the likeliest, for which they
are put in order."""


def way_of(config: SamplingConfig) -> Way:
    """How tokens are drawn with these settings."""
    if config.greedy:
        return "greedy"
    return "whole" if config.top_k == 0 and config.top_p == 1 else "sorted"


@dataclass(frozen=True)
class DeviceSettings:
    """The numbers of a :class:`SamplingConfig`, (1,) each."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    penalty: Tensor

    @classmethod
    def on(cls, device: torch.device) -> "DeviceSettings":
        """Zeros, to be set."""
        kinds = {"top_k": torch.int64}
        return cls(
            *(
                torch.zeros(1, dtype=kinds.get(field.name, torch.float32), device=device)
                for field in fields(cls)
            )
        )

    def set(self, config: SamplingConfig, n_words: int) -> None:
        """Take over the settings, in place."""
        # One that is 0 or infinite as a float32 would give 0 / 0.
        self.temperature.fill_(min(max(config.temperature, LIMITS.tiny), LIMITS.max))
        self.top_k.fill_(min(config.top_k or n_words, n_words))
        self.top_p.fill_(config.top_p)
        self.min_p.fill_(config.min_p)
        self.penalty.fill_(config.repetition_penalty)


def draw_tokens(
    logits_BV: Tensor,
    way: Way,
    settings: DeviceSettings,
    u_B: Tensor,
    seen_BV: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw one token for each row: repetition penalty, temperature, top-k, top-p, min-p.

    Args:
        logits_BV: (B, V) floating point; computed in float32.
        way: of the settings.
        settings: on the device of the logits.
        u_B: (B,) float32, uniform in [0, 1).
        seen_BV: (B, V) bool, the tokens that the penalty is for, where there is one.

    Returns:
        (B,) int64 tokens, always in the vocabulary, and (B,) bool, false where the logits hold NaN
        or +inf, or nothing but -inf: the token means nothing then.
    """
    logits_BV = logits_BV.float()
    sound_B = logits_BV.amax(-1).isfinite()
    if seen_BV is not None:
        logits_BV = penalised(logits_BV, settings.penalty, seen_BV)
    if way == "greedy":
        return logits_BV.argmax(-1), sound_B
    if way == "whole":
        return _draw(_scaled(logits_BV, settings).exp(), settings, u_B), sound_B
    values_BV, ids_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
    p_BV = _scaled(values_BV, settings).exp()
    rank_V = torch.arange(p_BV.shape[1], device=p_BV.device)
    p_BV = p_BV.where(rank_V < settings.top_k, 0.0)
    total_BV = p_BV.double().cumsum(-1)
    before_BV = (total_BV - p_BV) / total_BV[:, -1:]
    # The most likely token stays, whatever is lost in rounding.
    kept_BV = (before_BV.float() < settings.top_p) | (settings.top_p >= 1) | (rank_V == 0)
    place_B1 = _draw(p_BV.where(kept_BV, 0.0), settings, u_B).unsqueeze(1)
    return ids_BV.gather(1, place_B1).squeeze(1), sound_B


def _scaled(logits_BV: Tensor, settings: DeviceSettings) -> Tensor:
    # After the maximum is subtracted: a tiny temperature cannot overflow then.
    return (logits_BV - logits_BV.amax(-1, keepdim=True)) / settings.temperature


def _draw(weights_BV: Tensor, settings: DeviceSettings, u_B: Tensor) -> Tensor:
    """Invert the cumulative distribution of each row, 1 for the likeliest word, at ``u``."""
    weights_BV = weights_BV.where(weights_BV >= settings.min_p, 0.0)
    # In float64, for a GPU adds in an order that changes from run to run: the same seed would now
    # and then give another word.
    cumulative_BV = weights_BV.double().cumsum(-1)
    u_B1 = u_B.unsqueeze(1) * cumulative_BV[:, -1:]
    place_B1 = torch.searchsorted(cumulative_BV, u_B1, right=True)
    # NaN lies beyond the end, and an index there would stop the device for good.
    return place_B1.squeeze(1).clamp(max=weights_BV.shape[1] - 1)
