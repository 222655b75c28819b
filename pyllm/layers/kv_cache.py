"""The key-value cache: what generation keeps so that each token is computed once.

Contiguous, or rolling: then its memory does not grow with the text. The sequences of a batch may
have different lengths.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from pyllm._checks import check_size, shown
from pyllm._memory import check_memory
from pyllm.layers._checks import check_sizes
from pyllm.ops import kv_append
from pyllm.reference._precision import accumulation_dtype
from pyllm.reference.decode_attention import widened
from pyllm.reference.kv_append import quantize_heads

PIECE = 16
"""New tokens that a rolling cache takes in at once without writing over what the first of them
sees: it has room for so many beside the window. A longer block must look back first."""


class KVCache:
    """Keys and values of every layer for up to ``max_length`` positions of each sequence.

    A rolling cache keeps the first ``sinks`` positions and the last ``window + PIECE - 1``, however
    long the text is (Mistral 7B, arXiv:2310.06825, sec. 2; StreamingLLM, arXiv:2309.17453). Where
    that is no less than ``max_length``, the cache is contiguous all the same.

    Memory: ``2 * n_layers * batch * slots * n_kv_heads * head_dim`` numbers, with ``max_length``
    slots in a contiguous cache. In int8 each position and kv head has a float32 scale besides: with
    heads of 64 channels that is 53% of bfloat16's memory, for an error of about half a percent of
    each key and value. All that is read, goes through these integers, also what a block of new
    tokens sees of itself: so a text gives the same numbers in whatever pieces it comes.

    Args:
        n_layers, batch, max_length, n_kv_heads, head_dim: sizes.
        window: positions a query sees, its own included; None for all.
        sinks: first positions that every query sees although the window would hide them.
        rolling: forget what no query will see again.
        dtype, device: of the stored keys and values; floating point or int8.

    Raises:
        ValueError: a size below 1, sinks below 0, a rolling cache without a window, another dtype,
            more than the machine's memory.
    """

    def __init__(
        self,
        n_layers: int,
        batch: int,
        max_length: int,
        n_kv_heads: int,
        head_dim: int,
        *,
        window: int | None = None,
        sinks: int = 0,
        rolling: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        n_layers, batch, max_length, n_kv_heads, head_dim = check_sizes(
            "kv cache",
            n_layers=n_layers,
            batch=batch,
            max_length=max_length,
            n_kv_heads=n_kv_heads,
            head_dim=head_dim,
        )
        if window is not None:
            (window,) = check_sizes("kv cache", window=window)
        self.max_length = max_length
        """Positions a sequence may have."""
        self.window = window
        """Positions a query sees, or None."""
        self.sinks = check_size("kv cache: sinks", sinks, 0)
        """First positions that stay in sight."""
        n_slots = max_length
        if rolling:
            if window is None:
                raise ValueError("kv cache: a rolling cache needs a window, got None")
            n_slots = min(max_length, self.sinks + window + PIECE - 1)
        self.rolling = n_slots < max_length
        """Are slots used again?"""
        if dtype != torch.int8 and not getattr(dtype, "is_floating_point", False):
            raise ValueError(f"kv cache: dtype must be floating point or int8, got {shown(dtype)}")
        shape = (n_layers, 2, batch, n_slots, n_kv_heads, head_dim)
        quantized = dtype == torch.int8
        if torch.device(device).type == "cpu":
            bytes_of_head = head_dim * dtype.itemsize + (torch.float32.itemsize if quantized else 0)
            check_memory(
                f"a kv cache of {n_slots:,} positions for {batch:,} sequences",
                prod(shape[:-1]) * bytes_of_head,
                "make it shorter or the batch smaller",
            )
        self._store_L2BSGK = torch.zeros(shape, dtype=dtype, device=device)
        self._scales_L2BSG: Tensor | None = None
        if quantized:
            self._scales_L2BSG = torch.zeros(shape[:-1], dtype=torch.float32, device=device)
        self._lengths = [0] * batch
        # Of each layer and sequence, the position from which on no slot was used again.
        self._oldest = [[0] * batch for _ in range(n_layers)]

    @property
    def batch(self) -> int:
        """Sequences side by side."""
        return len(self._lengths)

    def held(self, row: int) -> int:
        """How many positions of this sequence there are."""
        return self._lengths[row]

    @property
    def lengths(self) -> Tensor:
        """(B,) int32 on the CPU: positions of each sequence that every layer has taken in."""
        return torch.tensor(self._lengths, dtype=torch.int32)

    @property
    def length(self) -> int:
        """The longest of the lengths."""
        return max(self._lengths)

    @property
    def is_even(self) -> bool:
        """Are all sequences of one length?"""
        return min(self._lengths) == self.length

    @property
    def nbytes(self) -> int:
        """Memory of the keys and values, and of their scales."""
        scales = 0 if self._scales_L2BSG is None else self._scales_L2BSG.nbytes
        return self._store_L2BSGK.nbytes + scales

    def slots(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, (B, S, G, K), as :func:`pyllm.ops.kv_append` lays them.

        Raises:
            ValueError: there is no such layer.
        """
        n_layers = self._store_L2BSGK.shape[0]
        if not 0 <= layer < n_layers:
            raise ValueError(f"kv cache: layer must be from 0 to {n_layers - 1}, got {layer}")
        k_cache_BSGK, v_cache_BSGK = self._store_L2BSGK[layer]
        return k_cache_BSGK, v_cache_BSGK

    def scales_of(self, layer: int) -> tuple[Tensor | None, Tensor | None]:
        """Those of a layer's keys and values, (B, S, G), as :func:`pyllm.ops.kv_append` has them;
        None where the cache is not int8."""
        if self._scales_L2BSG is None:
            return None, None
        k_scales_BSG, v_scales_BSG = self._scales_L2BSG[layer]
        return k_scales_BSG, v_scales_BSG

    def as_held(self, x_BTGK: Tensor) -> Tensor:
        """New keys or values as an int8 cache will give them back, in their own dtype."""
        q_BTGK, scale_BTG = quantize_heads(x_BTGK)
        return widened(q_BTGK, scale_BTG, accumulation_dtype(x_BTGK.dtype)).to(x_BTGK.dtype)

    def check_window(self, whose: str, window: int | None, sinks: int) -> None:
        """What rolls keeps what one window and its sinks see, and no other.

        Args:
            whose: ``layer`` or ``model``, for the message.

        Raises:
            ValueError: it rolls, with another window or other sinks.
        """
        if self.rolling and (self.window, self.sinks) != (window, sinks):
            raise ValueError(
                f"kv cache: it rolls with a window of {self.window} and {self.sinks} sinks, and "
                f"the {whose} has a window of {window} and {sinks}; make a cache for this model"
            )

    def look_back(self, layer: int, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """What the next positions see of this layer, in order: the sinks, then the window.

        For sequences of one length. A position between the sinks and the window is left out, so
        that a query which follows finds its window, and its sinks, where
        :func:`pyllm.ops.attention` looks for them.

        Args:
            layer: from 0 on.
            dtype: of the result; by default the cache's, float32 for int8.

        Returns:
            Keys and values, (B, P, G, K): views where the cache is contiguous and of that dtype,
            else copies.

        Raises:
            ValueError: no such layer, or sequences of different lengths.
        """
        held = self.slots(layer)
        if not self.is_even:
            raise ValueError(
                f"kv cache: only sequences of one length look back together, got {self._lengths}"
            )
        k_BPGK, v_BPGK = (
            self._seen(cache_BSGK, scales_BSG, dtype)
            for cache_BSGK, scales_BSG in zip(held, self.scales_of(layer), strict=True)
        )
        return k_BPGK, v_BPGK

    def _seen(
        self, cache_BSGK: Tensor, scales_BSG: Tensor | None, dtype: torch.dtype | None
    ) -> Tensor:
        """Keys, or values, that the next positions see."""
        length = self.length
        if not self.rolling:
            cache_BSGK = cache_BSGK[:, :length]
            scales_BSG = None if scales_BSG is None else scales_BSG[:, :length]
        else:
            assert self.window is not None
            ring = cache_BSGK.shape[1] - self.sinks
            first_seen = max(self.sinks, length - self.window + 1)
            places = [
                *range(min(self.sinks, length)),
                *(self.sinks + (seen - self.sinks) % ring for seen in range(first_seen, length)),
            ]
            slots = torch.tensor(places, dtype=torch.int64, device=cache_BSGK.device)
            cache_BSGK = cache_BSGK.index_select(1, slots)
            scales_BSG = None if scales_BSG is None else scales_BSG.index_select(1, slots)
        if scales_BSG is None:
            return cache_BSGK if dtype is None else cache_BSGK.to(dtype)
        dtype = torch.float32 if dtype is None else dtype
        return widened(cache_BSGK, scales_BSG, accumulation_dtype(dtype)).to(dtype)

    def append(
        self,
        layer: int,
        k_BTGK: Tensor,
        v_BTGK: Tensor,
        counts: Sequence[int] | None = None,
        before: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """Write up to T new positions of one layer behind those that the cache holds.

        ``advance`` moves on to the next positions once every layer has written.

        Args:
            layer: from 0 on.
            k_BTGK, v_BTGK: new keys and values, converted to the cache's dtype, or rounded to its
                integers.
            counts: how many of the new tokens are real in each sequence, the others being padding
                on the right; None for all. Those before this call are counted, too.
            before: tokens of the same step that this layer has appended already.

        Returns:
            (B,) int32 starts and counts, as :func:`pyllm.ops.decode_attention` wants them.

        Raises:
            ValueError: no room for so many positions, keys or values of another shape, or ones
                that want a gradient, which would stop at the cache; a step that was not finished
                has written over what the new positions look back to.
        """
        if torch.is_grad_enabled() and (k_BTGK.requires_grad or v_BTGK.requires_grad):
            raise ValueError(
                "kv cache: gradients do not flow through it; use it under torch.inference_mode()"
            )
        k_cache_BSGK, v_cache_BSGK = self.slots(layer)
        batch, n_slots, n_kv_heads, head_dim = k_cache_BSGK.shape
        # One sequence would be written into every row of a larger batch.
        shape = (batch, k_BTGK.shape[1] if k_BTGK.dim() > 1 else "T", n_kv_heads, head_dim)
        if tuple(k_BTGK.shape) != shape or tuple(v_BTGK.shape) != shape:
            raise ValueError(
                f"kv cache: keys and values must have shape ({batch}, T, {n_kv_heads}, "
                f"{head_dim}), got {tuple(k_BTGK.shape)} and {tuple(v_BTGK.shape)}; make a cache "
                "for this batch and this model"
            )
        starts, here = self._claim([layer], k_BTGK.shape[1], counts, before)
        device = k_cache_BSGK.device
        starts_B, counts_B = torch.tensor([starts, here], dtype=torch.int32).to(device)
        self.write(layer, k_BTGK, v_BTGK, starts_B, counts_B)
        return starts_B, counts_B

    def write(
        self, layer: int, k_BTGK: Tensor, v_BTGK: Tensor, starts_B: Tensor, counts_B: Tensor
    ) -> None:
        """Write new positions of one layer where tensors on its device say, see
        :func:`pyllm.ops.kv_append`; what the cache counts on the host does not change."""
        k_cache_BSGK, v_cache_BSGK = self.slots(layer)
        k_scales_BSG, v_scales_BSG = self.scales_of(layer)
        if k_scales_BSG is None:
            dtype = k_cache_BSGK.dtype
            k_BTGK, v_BTGK = k_BTGK.to(dtype), v_BTGK.to(dtype)
        kv_append(
            k_cache_BSGK,
            v_cache_BSGK,
            k_BTGK,
            v_BTGK,
            starts_B,
            counts_B,
            sinks=self.sinks,
            rolling=self.rolling,
            k_scales=k_scales_BSG,
            v_scales=v_scales_BSG,
        )

    def claim(
        self, n_tokens: int, counts: Sequence[int] | None = None, before: int = 0
    ) -> tuple[list[int], list[int]]:
        """Where every layer is to write new positions, for a caller that writes them by itself.

        What :meth:`append` does but for the writing; ``advance`` has to follow.

        Args:
            n_tokens: T.
            counts, before: as :meth:`append` has them.

        Returns:
            The starts and counts of each sequence.

        Raises:
            ValueError: see :meth:`append`.
        """
        return self._claim(range(len(self._oldest)), n_tokens, counts, before)

    @property
    def store(self) -> Tensor:
        """All keys and values, (layers, 2, B, S, G, K), contiguous."""
        return self._store_L2BSGK

    @property
    def scales(self) -> Tensor | None:
        """Of an int8 cache, (layers, 2, B, S, G) float32, contiguous; else None."""
        return self._scales_L2BSG

    def _claim(
        self, layers: Sequence[int], n_tokens: int, counts: Sequence[int] | None, before: int
    ) -> tuple[list[int], list[int]]:
        if counts is None:
            counts = [before + n_tokens] * self.batch
        else:
            counts = self._for_each("kv cache: counts", counts, [self.max_length] * self.batch)
        here = [min(max(count - before, 0), n_tokens) for count in counts]
        starts = [
            length + min(before, count) for length, count in zip(self._lengths, counts, strict=True)
        ]
        ends = [start + count for start, count in zip(starts, here, strict=True)]
        if max(ends) > self.max_length:
            raise ValueError(
                f"kv cache: {max(ends)} positions do not fit into {self.max_length}; "
                "generate fewer tokens or make a larger cache"
            )
        if self.rolling:
            ring = self._store_L2BSGK.shape[3] - self.sinks
            for layer in layers:
                # A step that ended in an exception may have written further than it advanced.
                if before == 0 and self._reach(self._lengths, self._oldest[layer]) != self._lengths:
                    raise ValueError(
                        "kv cache: a step that was not finished has written over what the next one "
                        "looks back to; call truncate(within_reach(lengths)), and run the text "
                        "again where that is 0"
                    )
                pairs = zip(self._oldest[layer], ends, strict=True)
                self._oldest[layer] = [max(oldest, end - ring) for oldest, end in pairs]
        return starts, here

    def advance(self, counts: Any) -> None:
        """Call once per step, after the last layer.

        Args:
            counts: new positions; a number, or one for each sequence.

        Raises:
            ValueError: a negative number, or more than there is room for.
        """
        room = [self.max_length - length for length in self._lengths]
        added = self._for_each("kv cache: the tokens to advance by", counts, room)
        self._lengths = [old + new for old, new in zip(self._lengths, added, strict=True)]

    def truncate(self, lengths: Any) -> None:
        """Forget everything from position ``lengths`` on; a number, or one for each sequence.

        Raises:
            ValueError: it is negative, or more than there is, or a rolling cache has written over
                what the next position would look back to; see :meth:`within_reach`.
        """
        lengths = self._for_each("kv cache: the length to truncate to", lengths, self._lengths)
        oldest = self._oldest_of_all()
        reached = self._reach(lengths, oldest)
        for row, length in enumerate(lengths):
            if length != reached[row]:
                raise ValueError(
                    f"kv cache: it rolls, and what position {length} of sequence {row} looks back "
                    f"to has been written over; truncate to at least "
                    f"{oldest[row] + (self.window or 0) - 1}, or to 0 and run the text again"
                )
        self._oldest = [
            [min(pair) for pair in zip(layer, lengths, strict=True)] for layer in self._oldest
        ]
        self._lengths = lengths

    def within_reach(self, lengths: Any) -> list[int]:
        """The same lengths, one for each sequence, but 0 where ``truncate`` cannot go back so far.

        Raises:
            ValueError: a length is negative, or more than there is.
        """
        lengths = self._for_each("kv cache: the length to truncate to", lengths, self._lengths)
        return self._reach(lengths, self._oldest_of_all())

    def _oldest_of_all(self) -> list[int]:
        return [max(layers) for layers in zip(*self._oldest, strict=True)]

    def _reach(self, lengths: list[int], oldest: list[int]) -> list[int]:
        if not self.rolling:
            return lengths
        assert self.window is not None
        reached = []
        for length, first_held in zip(lengths, oldest, strict=True):
            # The next query sees from here on in the ring; nothing, where that is itself.
            first_seen = max(self.sinks, length - self.window + 1)
            reached.append(0 if first_seen < min(first_held, length) else length)
        return reached

    def _for_each(self, name: str, value: Any, most: list[int]) -> list[int]:
        """A whole number for each sequence, at least 0."""
        if isinstance(value, Tensor):
            value = value.tolist()
        if not isinstance(value, (list, tuple)):
            value = [value] * self.batch
        if len(value) != self.batch:
            raise ValueError(
                f"{name} must be a whole number, or one for each of the {self.batch} sequences, "
                f"got {shown(value)}"
            )
        return [check_size(name, one, 0, limit) for one, limit in zip(value, most, strict=True)]
