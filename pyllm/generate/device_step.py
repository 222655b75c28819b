"""Generation on a GPU: a step and the drawing after it as one CUDA graph, one token ahead of the
host.

Six layers of separate operations take longer to call than to run. A captured step is one call; its
inputs and outputs stay where they are, and which token came, whether a row has ended and where its
next token stands are numbers on the device. The host reads a token while the next step runs.
"""

import warnings
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyllm.generate.config import SamplingConfig
from pyllm.generate.device_sampling import DeviceSettings, Way, draw_tokens, way_of
from pyllm.generate.native import is_plain
from pyllm.generate.sampling import NOT_FINITE
from pyllm.layers import KVCache, StepCache
from pyllm.models import Transformer

if TYPE_CHECKING:
    from pyllm.generate.session import Session

UNIFORM = 128
"""Uniform numbers of each row that are on the device at once."""
ENDED, DAMAGED = -1, -2
"""In place of a token: the row gets none, or its logits are not finite."""
WARM_UP = 2
"""Steps before a capture: kernels are compiled, timed and loaded then, which cannot be captured."""

DEVICES = ("cuda",)
"""Where steps are captured."""

_said: set[str] = set()


class DeviceStep:
    """Steps of one new token a row, drawn on the device. All tensors keep their addresses.

    The numbers that a row draws with are those of its generator on the CPU, as many as drawn so
    far: so a seed writes the same on every device.

    Args:
        model: evaluated where it is.
        cache: of this model; its rows are this object's.
        n_words: the words that may be drawn, the first of the vocabulary.
    """

    def __init__(self, model: Transformer, cache: KVCache, n_words: int) -> None:
        self.model = model
        device, rows = cache.store.device, cache.batch
        self.at = StepCache(cache)
        self.token_B = torch.zeros(rows, dtype=torch.int64, device=device)
        """What the next step reads."""
        self.running_B = torch.zeros(rows, dtype=torch.bool, device=device)
        self.left_B = torch.zeros(rows, dtype=torch.int32, device=device)
        """Tokens that each row may still write."""
        self.out_B = torch.zeros_like(self.token_B)
        """What the host reads: tokens, ``ENDED`` or ``DAMAGED``."""
        self.seen_BV = torch.zeros(rows, n_words, dtype=torch.bool, device=device)
        self.stops_V = torch.zeros(n_words, dtype=torch.bool, device=device)
        self.uniform_BC = torch.zeros(rows, UNIFORM, dtype=torch.float32, device=device)
        self.column_1 = torch.zeros(1, dtype=torch.int64, device=device)
        """Of the uniform numbers, the next."""
        self.settings = DeviceSettings.on(device)
        self._way: Way = "greedy"
        self._penalised = False
        self._generators: Sequence[torch.Generator] = ()
        self._n_drawn = 0

    @property
    def kind(self) -> tuple[Way, bool]:
        """What a captured step is good for, whatever the settings: how it draws, and whether seen
        tokens are penalised."""
        return self._way, self._penalised

    @torch.inference_mode()
    def begin(
        self,
        config: SamplingConfig,
        stop_ids: Collection[int],
        generators: Sequence[torch.Generator],
        seen_BV: Tensor | None,
    ) -> None:
        """Take over how to draw; see :meth:`pyllm.generate.Session.begin`."""
        n_words = len(self.stops_V)
        self._way, self._penalised = way_of(config), seen_BV is not None
        self.settings.set(config, n_words)
        self.stops_V.zero_()
        for stop in stop_ids:
            if stop < n_words:
                self.stops_V[stop] = True
        if seen_BV is not None:
            self.seen_BV.copy_(seen_BV)
        self._generators, self._n_drawn = generators, 0

    @torch.inference_mode()
    def stand(self, left: dict[int, int]) -> None:
        """Take over from the host where the rows stand, and how much the running ones may write."""
        rows = range(len(self.token_B))
        self.at.starts_B.copy_(self.at.cache.lengths)
        self.left_B.copy_(torch.tensor([left.get(row, 0) for row in rows], dtype=torch.int32))
        self.running_B.copy_(self.left_B > 0)

    @torch.inference_mode()
    def stop(self, row: int) -> None:
        """Write no more on this row."""
        self.running_B[row] = False

    def refill(self) -> None:
        """Before each drawing: have new uniform numbers ready where the last ones are used up."""
        if self._way != "greedy" and self._n_drawn % UNIFORM == 0:
            draws = [
                torch.rand(UNIFORM, generator=own, dtype=torch.float32) for own in self._generators
            ]
            self.uniform_BC.copy_(torch.stack(draws))
            self.column_1.zero_()
        self._n_drawn += 1

    def run(self) -> None:
        """One step: the tokens of the running rows in, the next ones out. What is captured."""
        at = self.at
        at.counts_B.copy_(self.running_B)
        logits_BV = self.model.project(self.model.step(self.token_B, at))
        at.starts_B.add_(at.counts_B)
        self.draw(logits_BV)

    def draw(self, logits_BV: Tensor) -> None:
        """Draw a token for each running row, and see whether it ends there."""
        logits_BV = logits_BV[:, : len(self.stops_V)]
        u_B = self.uniform_BC.index_select(1, self.column_1).squeeze(1)
        seen_BV = self.seen_BV if self._penalised else None
        drawn_B, sound_B = draw_tokens(logits_BV, self._way, self.settings, u_B, seen_BV)
        running_B = self.running_B
        self.out_B.copy_(drawn_B.where(sound_B, DAMAGED).where(running_B, ENDED))
        self.token_B.copy_(drawn_B.where(running_B, self.token_B))
        self.column_1.add_(1).remainder_(UNIFORM)
        self.left_B.sub_(running_B.int())
        if seen_BV is not None:
            token_B1 = drawn_B.unsqueeze(1)
            told_B1 = seen_BV.gather(1, token_B1) | running_B.unsqueeze(1)
            seen_BV.scatter_(1, token_B1, told_B1)
        running_B &= sound_B & ~self.stops_V[drawn_B] & (self.left_B > 0)


class Ahead:
    """Draws the tokens of a session on its device, and reads them one step late.

    While the host looks at a token, the device runs the next step with it already; rows that ended
    by it stand still there.

    Args:
        session: whose model, cache and rows these are. It is not kept: the two would hold each
            other, and their memory would wait for the garbage collector.
        capture: makes a callable that repeats ``step.run``; by default a CUDA graph.
    """

    def __init__(
        self,
        session: "Session",
        capture: Callable[[DeviceStep], Callable[[], None]] | None = None,
    ) -> None:
        self.weights = weights_of(session.model)
        self.step = DeviceStep(session.model, session.cache, session.n_words)
        self._capture = capture_graph if capture is None else capture
        self._captured: dict[tuple[Way, bool], Callable[[], None]] = {}
        self._pending: Reading | None = None
        """What was asked for after the last token that the host knows."""
        self._then: Reading | None = None
        """The same, while the host does not know whether that token ended its row."""
        self._onward: list[int] = []
        self._readings = [Reading(self.step.out_B) for _ in range(2)]
        device = self.step.out_B.device
        # Graphs and events belong to the current device, which need not be the model's.
        self._guard: AbstractContextManager[object] = (
            torch.cuda.device(device) if device.type == "cuda" else nullcontext()
        )

    def begin(
        self,
        config: SamplingConfig,
        stop_ids: Collection[int],
        generators: Sequence[torch.Generator],
        seen_BV: Tensor | None,
    ) -> None:
        """Forget what is being drawn, and take over new settings."""
        self._pending = None
        self.step.begin(config, stop_ids, generators, seen_BV)

    def draw(self, session: "Session", rows: list[int]) -> tuple[int, list[int]]:
        """How many tokens the model was given, and the one that each running row gets.

        Raises:
            ValueError: NaN in the logits.
        """
        with self._guard:
            return self._draw(session, rows)

    def _draw(self, session: "Session", rows: list[int]) -> tuple[int, list[int]]:
        n_tokens, pending = len(rows), self._pending
        self._pending = self._then = None
        if pending is None:
            _step_back(session)
            n_tokens, logits_RV = session.new_logits(rows)
            pending = self._first(session, rows, logits_RV)
        self._onward = [row for row in rows if session.left(row) > 1]
        # A row that is about to slide is run by the host, once it knows its tokens.
        if self._onward and all(len(session.ids[row]) < session.context for row in self._onward):
            counts = [int(row in self._onward) for row in range(session.cache.batch)]
            session.cache.claim(1, counts)
            self._then = self._next()
        else:
            self._onward = []
        tokens = pending.read()
        if DAMAGED in (tokens[row] for row in rows):
            raise ValueError(NOT_FINITE)
        return n_tokens, [tokens[row] for row in rows]

    def accept(self, session: "Session") -> None:
        """Of the rows that were run ahead, those that go on have their last token in the cache."""
        running = session.running
        taken = [row for row in self._onward if row in running]
        if taken:
            # In this order: an interruption leaves a cache that knows too little, not too much.
            self._pending = self._then
            session.cache.advance([int(row in taken) for row in range(session.cache.batch)])

    def _first(self, session: "Session", rows: list[int], logits_RV: Tensor) -> "Reading":
        """Draw from the logits of a prompt."""
        step = self.step
        step.stand({row: session.left(row) for row in rows})
        step.refill()
        logits_BV = logits_RV
        if len(rows) < len(step.token_B):
            logits_BV = logits_RV.new_zeros(len(step.token_B), logits_RV.shape[1])
            logits_BV[rows] = logits_RV
        step.draw(logits_BV)
        return self._read()

    def _next(self) -> "Reading":
        """Run the model on the tokens that were drawn last."""
        replay = self._captured.get(self.step.kind)
        if replay is None:
            replay = self._captured[self.step.kind] = self._capture(self.step)
        self.step.refill()
        replay()
        return self._read()

    def _read(self) -> "Reading":
        self._readings.reverse()
        self._readings[0].begin()
        return self._readings[0]


def _step_back(session: "Session") -> None:
    """After an interruption: what follows a row's last token was drawn, but never read."""
    cache = session.cache
    known = [min(cache.held(row), len(ids) - 1) for row, ids in enumerate(session.ids)]
    if known != cache.lengths.tolist():
        cache.truncate(cache.within_reach(known))


class Reading:
    """A copy of a tensor on its way to the host.

    Args:
        source: small; copied anew each time.
    """

    def __init__(self, source: Tensor) -> None:
        self._source = source
        self._event = torch.cuda.Event() if source.is_cuda else None
        self._host = torch.empty(
            source.shape, dtype=source.dtype, pin_memory=self._event is not None
        )

    def begin(self) -> None:
        """Copy what it holds once all that was asked of the device before is done."""
        self._host.copy_(self._source, non_blocking=True)
        if self._event is not None:
            self._event.record()

    def read(self) -> list[int]:
        """Wait for it."""
        if self._event is not None:
            self._event.synchronize()
        return self._host.tolist()


def ahead_of(session: "Session", before: Ahead | None) -> Ahead | None:
    """What draws on the session's device; None where the host does.

    That is on a GPU, for a model as it is written: hooks, experts elsewhere and autocast are the
    host's matter, and a warning says so once.

    Args:
        session: about to begin.
        before: of the same session; kept while the weights are where they were.
    """
    model = session.model
    device = model.embedding.weight.device.type
    if device not in DEVICES:
        return None
    reason = None
    if torch.is_autocast_enabled(device):
        reason = "autocast is on"
    elif not is_plain(model):
        reason = "the model has hooks, parts of another kind, or experts elsewhere"
    if reason is not None:
        say_once(f"generation runs its operations one by one: {reason}")
        return None
    if before is not None and before.weights == weights_of(model):
        return before
    return Ahead(session)


def weights_of(model: Transformer) -> list[tuple[int, torch.dtype]]:
    """Where all weights are: a captured step reads them there."""
    state = (*model.state_dict().values(), *model.buffers())
    return [(tensor.data_ptr(), tensor.dtype) for tensor in state]


def capture_graph(step: DeviceStep) -> Callable[[], None]:
    """``step.run`` as one CUDA graph; the method itself, and a warning, where it cannot be one."""
    running_B, column_1 = step.running_B.clone(), step.column_1.clone()
    step.running_B.zero_()  # so that nothing is written
    graph = torch.cuda.CUDAGraph()
    mode = torch.cuda.get_sync_debug_mode()
    current = torch.cuda.current_stream()
    stream = _capture_stream(torch.cuda.current_device(), current.cuda_stream)
    stream.wait_stream(current)
    try:
        with torch.cuda.stream(stream):
            for number in range(WARM_UP):
                # What waits for the device is found here, where it harms nothing yet.
                _watch_for_waits("error" if number else mode)
                step.run()
        _watch_for_waits(mode)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            step.run()
        found: Callable[[], None] = graph.replay
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        say_once(f"a step of generation is no CUDA graph, and so slower: {reason}")
        found = step.run
    finally:
        _watch_for_waits(mode)
        torch.cuda.current_stream().wait_stream(stream)
        step.running_B.copy_(running_B)
        step.column_1.copy_(column_1)
    return found


@cache
def _capture_stream(device: int, callers: int) -> torch.cuda.Stream:
    """One for all captures that a stream asks for: PyTorch keeps a workspace of cuBLAS for every
    stream that has multiplied matrices, 32 MiB on Hopper and 8 on others, until the process ends.
    Graphs that share one must not run at once, as those of two streams may."""
    return torch.cuda.Stream(device)


def _watch_for_waits(mode: str | int) -> None:
    """``torch.cuda.set_sync_debug_mode``, which says at its first call that it is a prototype."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype", UserWarning)
        torch.cuda.set_sync_debug_mode(mode)


def say_once(message: str) -> None:
    """Warn, the first time in this process."""
    if message not in _said:
        _said.add(message)
        warnings.warn(message, stacklevel=3)
