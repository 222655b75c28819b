"""Drawing the next token from its logits."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pyllm.generate.config import SamplingConfig

NUCLEUS_GUESS = 1024
"""Top-p looks at this many tokens first. Sorting all 50,257 takes 3.2 ms on one core, finding the
1,024 largest 0.26 ms, and they almost always hold the nucleus; if not, all are sorted."""

LIMITS = torch.finfo(torch.float32)


def sample_token(
    logits_BV: Tensor,
    config: SamplingConfig,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    seen_BV: Tensor | None = None,
) -> Tensor:
    """Draw one token for each row: repetition penalty, temperature, top-k, top-p, min-p.

    That is the order of Hugging Face's ``generate``. Exactly ``top_k`` tokens are kept, and the
    nucleus is the shortest prefix of the tokens, the most likely first, whose probability (among
    those that top-k kept) reaches ``top_p``. Ties go to the lower id. Of these, the tokens stay
    whose probability is at least ``min_p`` times the largest. A row takes one uniform number, so
    the same generator gives the same tokens on every device.

    Args:
        logits_BV: (B, V) floating point; computed in float32.
        config: the settings; ``seed``, ``stop`` and ``max_new_tokens`` are not used here.
        generator: of the CPU, one for all rows or one for each; by default PyTorch's global one.
            Not used when greedy.
        seen_BV: (B, V) bool, the tokens that the penalty is for; needed when there is one.

    Returns:
        (B,) int64.

    Raises:
        ValueError: not (B, V) floating point with a word in it; a row holds NaN or +inf (also as
            float32), or nothing but -inf; a penalty without ``seen_BV``, or one of another shape;
            not one generator for each row.
    """
    logits_BV = _checked(logits_BV, config, generator, seen_BV)
    if seen_BV is not None:
        logits_BV = _penalised(logits_BV, config.repetition_penalty, seen_BV)
    if config.greedy:
        return logits_BV.argmax(-1)
    # One that is 0 or infinite as a float32 would give 0 / 0.
    temperature = min(max(config.temperature, LIMITS.tiny), LIMITS.max)
    # Scaled after the maximum is subtracted: a tiny temperature cannot overflow then.
    scaled_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)) / temperature
    if config.top_k == 0 and config.top_p == 1:
        return _draw(_weights(scaled_BV, config.min_p), generator)
    # Put in order before they are scaled, which may round two of them to one.
    ids_BC = _candidates(logits_BV, scaled_BV, config)
    values_BC = scaled_BV.gather(1, ids_BC)
    weights_BC = _weights(values_BC, config.min_p)
    if config.top_p < 1:
        total_B1 = (values_BC if config.top_k else scaled_BV).logsumexp(-1, keepdim=True)
        p_BC = (values_BC - total_B1).exp()
        before_BC = p_BC.cumsum(-1) - p_BC
        kept_BC = before_BC < config.top_p
        kept_BC[:, 0] = True  # the most likely token stays, whatever is lost in rounding
        weights_BC = weights_BC.where(kept_BC, 0.0)
    return ids_BC.gather(1, _draw(weights_BC, generator).unsqueeze(1)).squeeze(1)


def _checked(
    logits_BV: Tensor,
    config: SamplingConfig,
    generator: torch.Generator | Sequence[torch.Generator] | None,
    seen_BV: Tensor | None,
) -> Tensor:
    """The logits in float32; see :func:`sample_token` for what is refused."""
    if logits_BV.dim() != 2 or not logits_BV.shape[1] or not logits_BV.is_floating_point():
        raise ValueError(
            "sample_token: the logits must be floating point of shape (rows, words), got "
            f"{logits_BV.dtype} {tuple(logits_BV.shape)}"
        )
    if isinstance(generator, Sequence) and len(generator) != len(logits_BV):
        raise ValueError(
            f"sample_token: expected one generator for each of {len(logits_BV)} rows, got "
            f"{len(generator)}"
        )
    if config.repetition_penalty != 1 and seen_BV is None:
        raise ValueError("sample_token: a repetition penalty needs seen_BV, the tokens so far")
    if seen_BV is not None and (seen_BV.shape != logits_BV.shape or seen_BV.dtype != torch.bool):
        raise ValueError(
            f"sample_token: seen_BV must be bool of shape {tuple(logits_BV.shape)}, got "
            f"{seen_BV.dtype} {tuple(seen_BV.shape)}"
        )
    logits_BV = logits_BV.float()
    if not bool(logits_BV.amax(-1).isfinite().all()):
        raise ValueError(
            "sample_token: the logits hold NaN or infinity; the model's weights are damaged or "
            "too large for its dtype"
        )
    return logits_BV


def _penalised(logits_BV: Tensor, penalty: float, seen_BV: Tensor) -> Tensor:
    """Seen tokens made less likely by a penalty above 1, more likely by one below.

    CTRL (arXiv:1909.05858, sec. 4.1) divides every logit; a negative one would grow by that, so
    it is multiplied, as Hugging Face does.
    """
    moved_BV = torch.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty)
    # A masked word stays masked, and no other becomes so.
    moved_BV = moved_BV.clamp(LIMITS.min, LIMITS.max).where(logits_BV.isfinite(), logits_BV)
    return moved_BV.where(seen_BV, logits_BV)


def _weights(scaled_BC: Tensor, min_p: float) -> Tensor:
    """The odds of words whose scaled logits are given, 1 for the likeliest (it has 0)."""
    weights_BC = scaled_BC.exp()
    return weights_BC.where(weights_BC >= min_p, 0.0)


def _candidates(logits_BV: Tensor, scaled_BV: Tensor, config: SamplingConfig) -> Tensor:
    """The ids (B, C) of the tokens to draw from and maybe more, the most likely first."""
    n_words = logits_BV.shape[1]
    if config.top_k:
        return _largest(logits_BV, min(config.top_k, n_words))
    ids_BC = _largest(logits_BV, min(NUCLEUS_GUESS, n_words))
    covered_B = (scaled_BV.gather(1, ids_BC).logsumexp(-1) - scaled_BV.logsumexp(-1)).exp()
    if bool((covered_B < config.top_p).any()):
        return _largest(logits_BV, n_words)
    return ids_BC


def _largest(scores_BV: Tensor, count: int) -> Tensor:
    """The ids of the ``count`` largest, descending, ties by lower id: a stable sort cut short."""
    if count == scores_BV.shape[1]:
        return scores_BV.argsort(dim=-1, descending=True, stable=True)
    # topk leaves open which of several equal scores it takes, so only its smallest value is used:
    # everything above it is in, and of its equals as many as there is room for, in order of id.
    edge_B1 = scores_BV.topk(count, dim=-1).values[:, -1:]
    above_BV, equal_BV = scores_BV > edge_B1, scores_BV == edge_B1
    room_B1 = count - above_BV.sum(-1, keepdim=True)
    kept_BV = above_BV | (equal_BV & (equal_BV.cumsum(-1) <= room_B1))
    ids_BC = kept_BV.nonzero()[:, 1].view(-1, count)
    order_BC = scores_BV.gather(1, ids_BC).argsort(dim=-1, descending=True, stable=True)
    return ids_BC.gather(1, order_BC)


def _draw(
    weights_BC: Tensor, generator: torch.Generator | Sequence[torch.Generator] | None
) -> Tensor:
    """Invert the cumulative distribution of each row at one uniform number: indices (B,)."""
    cumulative_BC = weights_BC.cumsum(-1)
    total_B1 = cumulative_BC[:, -1:]
    if isinstance(generator, Sequence):
        u_B1 = torch.stack([torch.rand(1, generator=own) for own in generator])
    else:
        u_B1 = torch.rand(weights_BC.shape[0], 1, generator=generator)
    u_B1 = u_B1.to(weights_BC.device)
    # Strictly below the total, which rounding may reach: so the entry found has a weight.
    u_B1 = torch.minimum(u_B1 * total_B1, torch.nextafter(total_B1, torch.zeros_like(total_B1)))
    return torch.searchsorted(cumulative_BC, u_B1, right=True).squeeze(1)
