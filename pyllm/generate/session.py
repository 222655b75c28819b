"""A kv cache and the tokens in it: rows of text written side by side, each token computed once."""

import time
import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from operator import index

import torch
from torch import Tensor

from pyllm._checks import check_size, shown
from pyllm.generate.config import SamplingConfig
from pyllm.generate.device_step import Ahead, ahead_of
from pyllm.generate.native import NativeModel, native_model
from pyllm.generate.sampling import sample_token
from pyllm.layers import KVCache
from pyllm.models import Transformer

USUAL_CONTEXT = 8192
"""Positions that a session has room for unless told otherwise. A published model of 1B parameters
names 131,072, whose keys and values would take 8 GB."""


@dataclass
class Timing:
    """What a text took, its drawing included. Several rows count together."""

    cached_tokens: int = 0
    """Of the prompt, in the cache already."""
    prefill_tokens: int = 0
    """Given to the model several at once: what was new in the prompt, and, each time the context
    was full, the half of it that was kept."""
    prefill_seconds: float = 0.0
    """These steps also draw a token each."""
    decode_tokens: int = 0
    """Given to the model one at a time, as they were drawn."""
    decode_seconds: float = 0.0
    new_tokens: int = 0
    """Drawn in all, the end of a text included."""

    def __str__(self) -> str:
        return (
            f"{self.new_tokens} new tokens; prefill {self.prefill_tokens} tokens "
            f"({self.cached_tokens} more were in the cache) in "
            f"{_speed(self.prefill_tokens, self.prefill_seconds)}; decode {self.decode_tokens} "
            f"tokens in {_speed(self.decode_tokens, self.decode_seconds)}"
        )


def _speed(n_tokens: int, seconds: float) -> str:
    rate = n_tokens / seconds if seconds else 0.0
    return f"{seconds:.3f} s, {rate:.1f} tokens/s"


class Session:
    """Rows of tokens that a model writes on, and the kv cache that remembers them.

    :meth:`begin` gives each row a prompt and keeps what it shares with the row's tokens so far: of
    a text that goes on where it ended, only what is new is computed. :meth:`step` then adds a token
    to each row, until none is ``running``. It may be interrupted anywhere (Ctrl-C) and begun anew.

    When a row's context is full, it slides: the second half of it is run again from position 0,
    and the first half is forgotten. So a text may be longer than the context, at the price of one
    prefill for every half context. What every text begins with (``begin_ids``) stays at its front,
    for a model that was trained with it knows no other beginning.

    A prompt longer than the context is cut to its end. Where that loses only what the row had
    before, it slides as above; otherwise ``min(max_new_tokens, context // 2)`` tokens are left free
    for what is to be written, and a warning says what was cut.

    Args:
        model: where it is, is where this runs.
        rows: texts side by side.
        context: most tokens of a row to look back on, at most the model's; by default that, and
            8,192 of a larger one. Memory is taken for all of them, unless the model has a window.
        n_words: draw only the first so many ids, where the tokenizer has fewer than the model.
        begin_ids: a row that begins with these keeps them when it slides.
        kv_cache_dtype: ``auto``, the model's; or ``int8``, see :class:`pyllm.layers.KVCache`.

    Attributes:
        ids: the tokens of each row, prompt and continuation; the ones forgotten are not among them.
        timing: since :meth:`begin`.
        answers: of a conversation: the tokens that were drawn for an answer, by its text.

    Raises:
        ValueError: a size below 1, an unknown dtype, more than the machine's memory.
    """

    def __init__(
        self,
        model: Transformer,
        rows: int = 1,
        context: int | None = None,
        n_words: int | None = None,
        begin_ids: Sequence[int] = (),
        kv_cache_dtype: str = "auto",
    ) -> None:
        longest = model.config.max_seq_len
        if context is not None:
            wanted = check_size("context", context, 1)
        else:  # the cache of a model with a window rolls, and takes the same memory for any length
            wanted = USUAL_CONTEXT if model.config.window is None else longest
        self.model = model
        self.context = min(wanted, longest)
        self.n_words = model.config.vocab_size if n_words is None else n_words
        self.begin_ids = list(begin_ids)
        cache_dtype = pick_cache_dtype(kv_cache_dtype)
        self.cache: KVCache = model.new_cache(rows, self.context, dtype=cache_dtype)
        self.ids: list[list[int]] = [[] for _ in range(rows)]
        self.timing = Timing()
        self.answers: dict[str, list[int]] = {}
        self._left: dict[int, int] = {}  # running row: how many tokens it may still write
        self._ahead: Ahead | None = None

    @property
    def running(self) -> list[int]:
        """The rows that are not at their end."""
        return list(self._left)

    def end(self, row: int) -> None:
        """Write no more on this row."""
        if self._left.pop(row, None) and self._ahead is not None:
            self._ahead.step.stop(row)

    def left(self, row: int) -> int:
        """How many tokens this row may still write."""
        return self._left.get(row, 0)

    def begin(
        self,
        prompts: Sequence[Sequence[int]],
        config: SamplingConfig,
        stop_ids: Collection[int] = (),
    ) -> None:
        """Give every row a prompt of at least one token.

        Args:
            prompts: one for each row.
            config: how to draw. Row ``b`` draws with the seed ``config.seed + b``, so that it
                writes what it would alone with that seed. The stop strings are the caller's.
            stop_ids: each ends a row, and is not added to it. The repetition penalty is not for
                them, nor for ``begin_ids`` at the front: what ends a text often begins it, too,
                and a text whose end is unlikely does not come to it.

        Warns:
            UserWarning: a prompt was cut.

        Raises:
            ValueError: an empty prompt, an id that is not in the vocabulary, not one prompt for
                each row.
        """
        if len(prompts) != len(self.ids):
            raise ValueError(f"expected {len(self.ids)} prompts, one a row, got {len(prompts)}")
        checked = [checked_ids("prompt", self.model, prompt) for prompt in prompts]
        given, checked = checked, self._fitted(checked, config.max_new_tokens)
        self._left = {}
        # Anew for each prompt: somebody may have moved or trained the weights since the last one.
        self._native = native_model(self.model)
        self._ahead = ahead_of(self, self._ahead)
        shared = [self._shared(row, prompt) for row, prompt in enumerate(checked)]
        # A rolling cache cannot always go back, nor go on after an interrupted step.
        shared = self.cache.within_reach(shared)
        # In this order, so that an interruption never leaves a cache that knows more than the ids.
        self.cache.truncate(shared)
        self.ids = checked
        self._config, self._stop_ids = config, frozenset(stop_ids)
        self._generators = [torch.Generator() for _ in checked]
        for row, generator in enumerate(self._generators):
            if config.seed is None:
                generator.seed()
            else:
                generator.manual_seed(config.seed + row)
        self._seen_BV: Tensor | None = None
        if config.repetition_penalty != 1:
            self._seen_BV = torch.zeros(len(checked), self.n_words, dtype=torch.bool)
            for row, ids in enumerate(given):
                told = set(ids[self._n_kept(ids) :]) - self._stop_ids
                self._seen_BV[row, [token for token in told if token < self.n_words]] = True
            self._seen_BV = self._seen_BV.to(self.model.embedding.weight.device)
        if self._ahead is not None:
            self._ahead.begin(config, self._stop_ids, self._generators, self._seen_BV)
        self.timing = Timing(cached_tokens=sum(shared))
        self._left = dict.fromkeys(range(len(checked)), config.max_new_tokens)

    @torch.inference_mode()
    def step(self) -> list[tuple[int, int]]:
        """Run the model once: the token that was added to each row (row, token).

        A row that drew a stop token is not among them, and no longer ``running``.

        Raises:
            ValueError: NaN in the logits.
        """
        start = time.perf_counter()
        rows = self.running
        ahead = self._ahead
        n_tokens, tokens = self._draw(rows) if ahead is None else ahead.draw(self, rows)
        self._count(n_tokens, len(rows), time.perf_counter() - start)
        added = []
        for row, token in zip(rows, tokens, strict=True):
            if token in self._stop_ids:
                del self._left[row]
                continue
            self.ids[row].append(token)
            if self._seen_BV is not None and ahead is None:
                self._seen_BV[row, token] = True
            added.append((row, token))
            self._left[row] -= 1
            if not self._left[row]:
                del self._left[row]
        if ahead is not None:
            ahead.accept(self)
        return added

    def _draw(self, rows: list[int]) -> tuple[int, list[int]]:
        """How many tokens the model was given, and the one that each running row gets."""
        n_tokens, logits_RV = self.new_logits(rows)
        seen_RV = None if self._seen_BV is None else self._seen_BV[rows]
        generators = [self._generators[row] for row in rows]
        return n_tokens, sample_token(logits_RV, self._config, generators, seen_RV).tolist()

    def new_logits(self, rows: list[int]) -> tuple[int, Tensor]:
        """Run what is not in the cache of these rows: how many tokens that was, and the logits
        (R, V) of what follows."""
        new = {row: self._new(row) for row in rows}
        return sum(map(len, new.values())), self._logits(new)

    def _shared(self, row: int, prompt: list[int]) -> int:
        """How many of the prompt's tokens the cache has. The last is run again: what follows it
        was not kept."""
        held = self.ids[row][: self.cache.held(row)]
        return min(_common(held, prompt), len(prompt) - 1)

    def _n_kept(self, ids: list[int]) -> int:
        """How many tokens at the front of a row stay when it slides."""
        count = len(self.begin_ids)
        # Half of a tiny context has no room for them and a token of the text.
        fits = count < max(self.context // 2, 1)
        return count if fits and ids[:count] == self.begin_ids else 0

    def _cut(self, ids: list[int], size: int) -> list[int]:
        """``size`` tokens of a row: those that every text begins with, and its last ones."""
        n_kept = self._n_kept(ids)
        return ids[:n_kept] + ids[len(ids) - (size - n_kept) :]

    def _fitted(self, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
        """The prompts, cut to what the context has room for; warns when that loses new tokens."""
        half = max(self.context // 2, 1)
        room = self.context - min(max_new_tokens, self.context // 2)
        fitted, lost = [], []
        for prompt, held in zip(prompts, self.ids, strict=True):
            if len(prompt) <= self.context:
                fitted.append(prompt)
                continue
            n_new = len(prompt) - _common(held, prompt)
            n_kept = self._n_kept(prompt)
            fitted.append(self._cut(prompt, half if n_new <= half - n_kept else room))
            if n_new > room - n_kept:
                lost.append(len(prompt))
        if lost:
            longest = self.model.config.max_seq_len
            remedy = "shorten it"
            if self.context < longest:
                remedy += f", or give a larger context (the model's is {longest})"
            warnings.warn(
                f"the prompt has {max(lost)} tokens and the model looks back on {self.context}: "
                f"only the last {room} of them are read, with room left for what is written; "
                f"{remedy}",
                stacklevel=3,
            )
        return fitted

    def _new(self, row: int) -> list[int]:
        """The tokens of a row that are not in the cache; makes room for them."""
        if len(self.ids[row]) > self.context:
            lengths = self.cache.lengths.tolist()
            lengths[row] = 0
            self.cache.truncate(lengths)
            self.ids[row] = self._cut(self.ids[row], max(self.context // 2, 1))
        return self.ids[row][self.cache.held(row) :]

    def _logits(self, new: dict[int, list[int]]) -> Tensor:
        """Run new tokens of some rows, and return the logits (R, V) of what follows in these."""
        counts = [len(new.get(row, ())) for row in range(len(self.ids))]
        longest = max(counts)
        padded = [[*new.get(row, ()), *[0] * (longest - count)] for row, count in enumerate(counts)]
        device = self.model.embedding.weight.device
        ids_BT = torch.tensor(padded, device=device)
        real = counts if min(counts) < longest else None
        logits_RV = next_logits(self.model, ids_BT, self.cache, real, self._native)
        return logits_RV[:, : self.n_words]

    def _count(self, n_tokens: int, n_rows: int, seconds: float) -> None:
        timing = self.timing
        # The first step is for the prompt, also where all but one of its tokens were there already.
        if n_tokens > n_rows or not timing.new_tokens:
            timing.prefill_tokens += n_tokens
            timing.prefill_seconds += seconds
        else:
            timing.decode_tokens += n_tokens
            timing.decode_seconds += seconds
        timing.new_tokens += n_rows


def pick_cache_dtype(name: str) -> torch.dtype | None:
    """Of a kv cache: None for ``auto``, which leaves it to the model, or int8.

    Raises:
        ValueError: another name.
    """
    known = {"auto": None, "int8": torch.int8}
    if not isinstance(name, str) or name not in known:
        raise ValueError(f"kv_cache_dtype must be auto or int8, got {shown(name)}")
    return known[name]


def _common(one: list[int], other: list[int]) -> int:
    """How many tokens both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    unlike = (place for place, (mine, yours) in pairs if mine != yours)
    return next(unlike, min(len(one), len(other)))


def next_logits(
    model: Transformer,
    ids_BT: Tensor,
    cache: KVCache,
    counts: Sequence[int] | None = None,
    native: NativeModel | None = None,
) -> Tensor:
    """Run T new tokens and return the logits (R, V) of what follows the last of them.

    Only the last position is projected to the vocabulary: the logits of a prompt of 1,024 tokens
    and 50,257 words would take 0.2 GB. Of the B rows, only the R that have new tokens are.

    Args:
        model: the transformer.
        ids_BT: (B, T) int64.
        cache: appended to.
        counts: how many tokens of each row are real, the others being padding on the right; by
            default all.
        native: of this model, to run there; then the logits are float32.
    """
    if native is not None:
        return native.next_logits(ids_BT, cache, counts)
    x_BTD, _ = model.hidden(ids_BT, cache, counts)
    if counts is None:
        return model.project(x_BTD[:, -1])
    rows = [row for row, count in enumerate(counts) if count]
    last = [counts[row] - 1 for row in rows]
    return model.project(x_BTD[rows, last])


def checked_ids(name: str, model: Transformer, ids: Sequence[int]) -> list[int]:
    """The ids as ints.

    Args:
        name: of the function whose argument they are, for the message.

    Raises:
        ValueError: none, not whole numbers, or not in the model's vocabulary.
    """
    try:
        if any(isinstance(token, bool) for token in ids):
            raise TypeError  # which Python counts among the whole numbers
        checked = [index(token) for token in ids]
    except TypeError:
        raise ValueError(f"{name}: the ids must be whole numbers, got {shown(ids)}") from None
    if not checked:
        raise ValueError(f"{name}: expected at least one token to begin with, got none")
    wrong = [token for token in checked if not 0 <= token < model.config.vocab_size]
    if wrong:
        raise ValueError(
            f"{name}: token {shown(wrong[0])} is not in the model's vocabulary of "
            f"{model.config.vocab_size}"
        )
    return checked
