"""Drawing the next token from its logits."""

import torch
from torch import Tensor

from pyllm.generate.config import SamplingConfig

NUCLEUS_GUESS = 1024
"""Top-p looks at this many tokens first. Sorting all 50,257 takes 3.2 ms on one core, finding the
1,024 largest 0.26 ms, and they almost always hold the nucleus; if not, all are sorted."""


def sample_token(
    logits_BV: Tensor, config: SamplingConfig, generator: torch.Generator | None = None
) -> Tensor:
    """Draw one token for each row: temperature, then top-k, then top-p.

    Exactly ``top_k`` tokens are kept, and the nucleus is the shortest prefix of the tokens, the
    most likely first, whose probability (among those that top-k kept) reaches ``top_p``. Ties go
    to the lower id. A row takes one uniform number, so the same generator gives the same tokens
    on every device.

    Args:
        logits_BV: (B, V) floating point; computed in float32.
        config: the settings; ``seed`` and ``max_new_tokens`` are not used here.
        generator: of the CPU; by default PyTorch's global one. Not used when greedy.

    Returns:
        (B,) int64.

    Raises:
        ValueError: a row holds NaN or +inf, or nothing but -inf.
    """
    largest_B1 = logits_BV.amax(-1, keepdim=True)
    if not bool(largest_B1.isfinite().all()):
        raise ValueError(
            "sample_token: the logits hold NaN or infinity; the model's weights are damaged or "
            "too large for its dtype"
        )
    if config.greedy:
        return logits_BV.argmax(-1)
    # Scaled after the maximum is subtracted: a tiny temperature cannot overflow then.
    scaled_BV = (logits_BV.float() - largest_B1.float()) / config.temperature
    if config.top_k == 0 and config.top_p == 1:
        return _draw(scaled_BV.softmax(-1), generator)
    values_BC, ids_BC = _candidates(scaled_BV, config)
    weights_BC = values_BC.softmax(-1)
    if config.top_p < 1:
        total_B1 = (values_BC if config.top_k else scaled_BV).logsumexp(-1, keepdim=True)
        p_BC = (values_BC - total_B1).exp()
        before_BC = p_BC.cumsum(-1) - p_BC
        before_BC[:, 0] = 0  # the most likely token stays, whatever is lost in rounding
        weights_BC = weights_BC.where(before_BC < config.top_p, 0.0)
    return ids_BC.gather(1, _draw(weights_BC, generator).unsqueeze(1)).squeeze(1)


def _candidates(scaled_BV: Tensor, config: SamplingConfig) -> tuple[Tensor, Tensor]:
    """The tokens to draw from and maybe more, the most likely first: values and ids (B, C)."""
    n_words = scaled_BV.shape[1]
    if config.top_k:
        return _largest(scaled_BV, min(config.top_k, n_words))
    values_BC, ids_BC = _largest(scaled_BV, min(NUCLEUS_GUESS, n_words))
    covered_B = (values_BC.logsumexp(-1) - scaled_BV.logsumexp(-1)).exp()
    if bool((covered_B < config.top_p).any()):
        return _largest(scaled_BV, n_words)
    return values_BC, ids_BC


def _largest(scores_BV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` largest, descending, ties by lower id: a stable sort cut short, but cheaper."""
    if count == scores_BV.shape[1]:
        values_BV, ids_BV = scores_BV.sort(dim=-1, descending=True, stable=True)
        return values_BV, ids_BV
    # topk leaves open which of several equal scores it takes, so only its smallest value is used:
    # everything above it is in, and of its equals as many as there is room for, in order of id.
    edge_B1 = scores_BV.topk(count, dim=-1).values[:, -1:]
    above_BV, equal_BV = scores_BV > edge_B1, scores_BV == edge_B1
    room_B1 = count - above_BV.sum(-1, keepdim=True)
    kept_BV = above_BV | (equal_BV & (equal_BV.cumsum(-1) <= room_B1))
    ids_BC = kept_BV.nonzero()[:, 1].view(-1, count)
    values_BC, order_BC = scores_BV.gather(1, ids_BC).sort(dim=-1, descending=True, stable=True)
    return values_BC, ids_BC.gather(1, order_BC)


def _draw(weights_BC: Tensor, generator: torch.Generator | None) -> Tensor:
    """Invert the cumulative distribution of each row at one uniform number: indices (B,)."""
    cumulative_BC = weights_BC.cumsum(-1)
    total_B1 = cumulative_BC[:, -1:]
    u_B1 = torch.rand(weights_BC.shape[0], 1, generator=generator).to(weights_BC.device)
    # Strictly below the total, which rounding may reach: so the entry found has a weight.
    u_B1 = torch.minimum(u_B1 * total_B1, torch.nextafter(total_B1, torch.zeros_like(total_B1)))
    return torch.searchsorted(cumulative_BC, u_B1, right=True).squeeze(1)
