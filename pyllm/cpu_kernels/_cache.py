"""What the launchers that address a kv cache share; the doors make the same checks."""

from torch import Tensor

LARGEST_POSITION = 2**31 - 1
"""Positions are int32."""


def ring_of(n_slots: int, sinks: int, rolling: bool) -> int:
    """Slots that a rolling cache uses in turn; 0 for a contiguous one."""
    return n_slots - sinks if rolling else 0


def require_positions(
    op: str, starts_B: Tensor, counts_B: Tensor, n_tokens: int, n_slots: int, rolling: bool
) -> int:
    """Where the new tokens of each row of the batch stand, and that there is room for them.

    Returns:
        The longest row after them: the largest ``start + count``.

    Raises:
        ValueError: a negative start, a count that is not between 0 and ``n_tokens``, or more
            positions than there are slots (in a rolling cache: than int32 has).
    """
    starts, counts = starts_B.tolist(), counts_B.tolist()
    if not starts:
        return 0
    if min(counts) < 0 or max(counts) > n_tokens:
        raise ValueError(
            f"{op}: counts must be between 0 and {n_tokens}, got values from {min(counts)} to "
            f"{max(counts)}"
        )
    if min(starts) < 0:
        raise ValueError(f"{op}: starts must not be negative, got {min(starts)}")
    end = max(start + count for start, count in zip(starts, counts, strict=True))
    room = LARGEST_POSITION if rolling else n_slots
    if end > room:
        what = "positions there are" if rolling else "slots of the cache"
        raise ValueError(f"{op}: starts + counts must not exceed the {room} {what}, got {end}")
    return end
