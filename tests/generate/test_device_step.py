"""The step that a GPU captures, run as it is on the CPU: the numbers and tokens of the other path.

What only a GPU shows (the capture itself, the order of its streams) is in ``tests/test_gpu.py``.
"""

import functools
import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from pyllm.generate import (
    SamplingConfig,
    Session,
    device_step,
    measure,
    next_logits,
    session,
    time_decode,
)
from pyllm.generate.device_step import UNIFORM, Ahead, DeviceStep, capture_graph
from pyllm.layers import StepCache
from pyllm.models import ModelConfig, Transformer, quantize_model

from .small import SMALL, make_model
from .test_native import FAMILY, make

GREEDY = SamplingConfig(greedy=True, max_new_tokens=12)
CONFIG = ModelConfig(**SMALL)
MODELS = {
    "contiguous": CONFIG,
    "rolling": replace(CONFIG, window=5, attention_sinks=2),
    "gpt": replace(CONFIG, norm="layer", position="learned", activation="gelu"),
}
RAGGED = [[3], [5, 1, 4, 1, 5, 9, 2, 6], [11, 12], [7] * 20, [60, 61, 62]]
WAYS = {
    "greedy": replace(GREEDY, max_new_tokens=40),
    "penalised": SamplingConfig(greedy=True, repetition_penalty=1.7, max_new_tokens=30),
    "whole": SamplingConfig(seed=5, temperature=1.5, top_p=1.0, min_p=0.02, max_new_tokens=40),
    "sorted": SamplingConfig(seed=6, temperature=1.3, top_p=0.9, max_new_tokens=40),
    "all of it": SamplingConfig(
        seed=9, top_k=20, top_p=0.95, min_p=0.05, repetition_penalty=1.4, max_new_tokens=40
    ),
}


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sessions draw on their device, one token ahead; without a GPU nothing is captured."""

    def found(one: Session, before: Ahead | None) -> Ahead:
        return Ahead(one, lambda step: step.run) if before is None else before

    monkeypatch.setattr(session, "ahead_of", found)


def write(
    one: Session, prompts: list[list[int]], config: SamplingConfig, stops: Any = ()
) -> list[list[int]]:
    """The tokens that each row added."""
    added: list[list[int]] = [[] for _ in prompts]
    one.begin(prompts, config, stops)
    while one.running:
        for row, token in one.step():
            added[row].append(token)
    return added


def both(monkeypatch: pytest.MonkeyPatch, run: Callable[[], Any]) -> tuple[Any, Any]:
    """What ``run`` gives ahead of the host, and what step by step."""
    ahead = run()
    with monkeypatch.context() as patch:
        patch.setattr(session, "ahead_of", lambda one, before: None)
        return ahead, run()


def steps(model: Transformer, dtype: torch.dtype | None) -> list[tuple[Tensor, Tensor]]:
    """Logits of the rows that run, from the ordinary path and from the step's, token by token."""
    caches = [model.new_cache(3, dtype=dtype) for _ in range(2)]
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(model.config.vocab_size, (3, 12), generator=generator)
    for cache in caches:
        next_logits(model, prompt, cache, [12, 1, 7])
    at, pairs = StepCache(caches[1]), []
    for number in range(12):
        counts = [1, int(number % 3 > 0), int(number < 9)]
        ids = torch.randint(model.config.vocab_size, (3,), generator=generator)
        at.starts_B.copy_(caches[1].lengths)
        at.counts_B.copy_(torch.tensor(counts))
        found = model.project(model.step(ids, at))
        caches[1].claim(1, counts)
        caches[1].advance(counts)
        rows = [row for row, count in enumerate(counts) if count]
        pairs.append((next_logits(model, ids.unsqueeze(1), caches[0], counts), found[rows]))
    return pairs


def error(pair: tuple[Tensor, Tensor]) -> float:
    expected, got = pair
    assert got.shape == expected.shape
    return float((got - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name", FAMILY)
@torch.inference_mode()
def test_the_whole_family(name: str) -> None:
    """Ragged rows, some of which stand still, through rolling and contiguous caches."""
    assert max(map(error, steps(make(FAMILY[name]), None))) < 3e-6


@pytest.mark.parametrize("name", ["mixture", "gpt", "sinks"])
@torch.inference_mode()
def test_an_int8_cache(name: str) -> None:
    assert max(map(error, steps(make(FAMILY[name]), torch.int8))) < 3e-6


@pytest.mark.parametrize("cache", [None, torch.int8], ids=["float", "int8"])
@pytest.mark.parametrize("name", ["mixture", "gpt", "shared"])
@torch.inference_mode()
def test_int8_weights(name: str, cache: torch.dtype | None) -> None:
    model = quantize_model(make(FAMILY[name]))
    assert max(map(error, steps(model, cache))) < 3e-6


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_sessions_write_the_same(name: str, way: str, ahead: None, monkeypatch: Any) -> None:
    """Ragged prompts whose context is full before they end, each row with a seed of its own."""
    model = make_model(MODELS[name])
    one, other = both(monkeypatch, lambda: write(Session(model, 5), RAGGED, WAYS[way]))
    assert one == other
    assert {len(row) for row in one} == {WAYS[way].max_new_tokens}
    assert len({tuple(row) for row in one}) == 5


@pytest.mark.parametrize("dtype", ["auto", "int8"])
def test_quantised_models_write_the_same(dtype: str, ahead: None, monkeypatch: Any) -> None:
    model = quantize_model(make_model(CONFIG))
    run = lambda: write(Session(model, 2, kv_cache_dtype=dtype), RAGGED[:2], GREEDY)  # noqa: E731
    one, other = both(monkeypatch, run)
    assert one == other


@pytest.mark.parametrize("way", ["greedy", "all of it"])
def test_rows_end_at_their_stop_tokens(way: str, ahead: None, monkeypatch: Any) -> None:
    """While the host reads the stop token, the row stands still on the device, and the others go
    on; what the cache counts is what it holds."""
    model = make_model(MODELS["rolling"])
    free = write(Session(model, 5), RAGGED, WAYS[way])
    stops = {free[1][4], free[3][9]}

    def run() -> Any:
        one = Session(model, 5)
        added = write(one, RAGGED, WAYS[way], stops)
        return added, one.ids, one.timing.new_tokens, one.timing.decode_tokens

    one, other = both(monkeypatch, run)
    assert one == other
    assert len({len(row) for row in one[0]}) > 1


def test_more_tokens_than_uniform_numbers_at_once(ahead: None, monkeypatch: Any) -> None:
    model = make_model(replace(CONFIG, max_seq_len=512))
    config = replace(WAYS["sorted"], max_new_tokens=2 * UNIFORM + 3)
    one, other = both(monkeypatch, lambda: write(Session(model), [[3, 1]], config))
    assert one == other


def test_a_seed_writes_the_same_and_none_another(ahead: None) -> None:
    model = make_model(CONFIG)
    config = WAYS["sorted"]
    assert write(Session(model), [[3]], config) == write(Session(model), [[3]], config)
    one = Session(model)
    assert write(one, [[3]], config) == write(one, [[3]], config)
    other = [write(one, [[3]], replace(config, seed=seed)) for seed in (7, None, None)]
    assert len({tuple(rows[0]) for rows in other}) == 3


def test_a_text_goes_on_where_it_ended(ahead: None, monkeypatch: Any) -> None:
    """The same session, prompt after prompt, with settings that change and a full context."""
    model = make_model(MODELS["rolling"])

    def run() -> Any:
        one, texts = Session(model, 2), []
        ids = [[5], [6, 7]]
        for turn, way in enumerate([*WAYS, *WAYS]):
            config = replace(WAYS[way], max_new_tokens=7)
            texts.append(write(one, [[*row, 20 + turn] for row in ids], config, {9}))
            ids = [list(row) for row in one.ids]
        return texts, one.timing.cached_tokens, one.timing.prefill_tokens

    one, other = both(monkeypatch, run)
    assert one[0] == other[0]
    # The last token drawn may be in the cache already, where the other path has not run it yet.
    assert abs(one[1] - other[1]) <= 2


def test_end_takes_a_row_out_at_once(ahead: None, monkeypatch: Any) -> None:
    model = make_model(CONFIG)

    def run() -> Any:
        one, told = Session(model, 3), []
        one.begin(RAGGED[:3], WAYS["sorted"])
        for number in range(6):
            told.append(one.step())
            if number == 2:
                one.end(1)
                one.end(1)
        lengths = one.cache.lengths.tolist()
        return told, one.running, [len(ids) for ids in one.ids], lengths

    one, other = both(monkeypatch, run)
    assert one[:3] == other[:3]
    ahead_of_host = [a - b for a, b in zip(one[3], other[3], strict=True)]
    assert ahead_of_host == [1, 1, 1]  # and of tokens that the ids hold
    assert [held <= n for held, n in zip(one[3], one[2], strict=True)] == [True] * 3


def test_an_interrupted_step_can_be_repeated(ahead: None, monkeypatch: Any) -> None:
    model = make_model(MODELS["rolling"])

    def run(interrupted: bool) -> list[list[int]]:
        one = Session(model, 2)
        one.begin(RAGGED[:2], GREEDY)
        for number in range(4):
            one.step()
            if interrupted and number % 2:
                with monkeypatch.context() as patch:
                    place = (
                        "pyllm.generate.device_step.Reading.read",
                        "pyllm.generate.session.Session._count",
                    )[number // 2]
                    patch.setattr(place, _interrupt)
                    with pytest.raises(KeyboardInterrupt):
                        one.step()
        while one.running:
            one.step()
        return one.ids

    assert run(True) == run(False)


def _interrupt(*arguments: Any) -> None:
    raise KeyboardInterrupt


def test_logits_that_are_not_finite_are_refused(ahead: None) -> None:
    model = make_model(CONFIG)
    one = Session(model, 2)
    one.begin(RAGGED[:2], WAYS["sorted"])
    one.step()
    with torch.no_grad():
        model.final_norm.weight.fill_(float("nan"))
    one.step()  # this one had been drawn before
    with pytest.raises(ValueError, match="logits hold NaN or infinity"):
        one.step()
    with pytest.raises(ValueError, match="logits hold NaN or infinity"):
        one.step()
    with torch.no_grad():
        model.final_norm.weight.fill_(1.0)
    assert write(one, RAGGED[:2], GREEDY) == write(Session(model, 2), RAGGED[:2], GREEDY)


def test_the_words_of_a_smaller_tokenizer(ahead: None, monkeypatch: Any) -> None:
    model = make_model(CONFIG)
    run = lambda: write(Session(model, 1, n_words=11), [[3]], WAYS["all of it"], {70})  # noqa: E731
    one, other = both(monkeypatch, run)
    assert one == other and max(one[0]) < 11


def test_a_context_of_one_token(ahead: None, monkeypatch: Any) -> None:
    model = make_model(replace(CONFIG, max_seq_len=1))
    one, other = both(monkeypatch, lambda: write(Session(model), [[5]], GREEDY))
    assert one == other and len(one[0]) == 12


class FakeCuda:
    """What a capture calls, without a card: says in which order, and fails where it is told to."""

    def __init__(self, fails: str = "") -> None:
        self.calls: list[str] = []
        self.fails = fails
        self.streams = 0

    def called(self, name: str) -> None:
        self.calls.append(name)
        if self.fails and name.startswith(self.fails):
            raise RuntimeError(f"{name}: not here\nand more")

    def CUDAGraph(self) -> Any:
        return SimpleNamespace(replay=lambda: self.called("replay"))

    def get_sync_debug_mode(self) -> int:
        return 0

    def set_sync_debug_mode(self, mode: int | str) -> None:
        # The card's own says so once in a process, an error under pytest.
        warnings.warn("Synchronization debug mode is a prototype feature and so on", stacklevel=2)
        self.calls.append(f"mode {mode}")

    def current_device(self) -> int:
        return 0

    def Stream(self, device: int) -> Any:
        self.streams += 1
        return self.current_stream()

    def current_stream(self) -> Any:
        return SimpleNamespace(wait_stream=lambda other: None, cuda_stream=0)

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        self.called("warm-up")
        yield

    @contextmanager
    def graph(self, graph: Any, **settings: Any) -> Iterator[None]:
        self.called("capture")
        yield


@pytest.mark.parametrize("fails", ["", "warm-up", "capture"])
@torch.inference_mode()
def test_a_capture_leaves_all_as_it_was(fails: str, monkeypatch: Any) -> None:
    """Its steps write nothing and draw nothing; where it fails, the step is run as it is."""
    cuda = FakeCuda(fails)
    monkeypatch.setattr(device_step, "_said", set())
    # As it is before the first capture of a process, and without a trace of the streams here.
    streams = functools.cache(device_step._capture_stream.__wrapped__)
    monkeypatch.setattr(device_step, "_capture_stream", streams)
    one = Session(make_model(CONFIG), 2)
    step = DeviceStep(one.model, one.cache, 67)
    step.begin(WAYS["greedy"], (), [], None)
    step.stand({0: 5})
    before = {name: value.clone() for name, value in tensors(step).items()}
    kept = one.cache.store.clone()
    monkeypatch.setattr(torch, "cuda", cuda)
    with pytest.warns(UserWarning, match="no CUDA graph") if fails else nullcontext():
        found = capture_graph(step)
    for name, value in tensors(step).items():
        assert name == "out_B" or torch.equal(value, before[name]), name
    assert torch.equal(one.cache.store, kept)
    assert cuda.calls[-1] == "mode 0"
    if fails:
        assert found == step.run
        capture_graph(step)  # a second warning would be an error
        assert cuda.streams == 1  # PyTorch keeps cuBLAS's workspace of each one
    else:
        assert cuda.calls == ["warm-up", "mode 0", "mode error", "mode 0", "capture", "mode 0"]
        found()
        assert cuda.calls[-1] == "replay"


def tensors(step: DeviceStep) -> dict[str, Tensor]:
    found = {name: value for name, value in vars(step).items() if isinstance(value, Tensor)}
    return {**found, "starts_B": step.at.starts_B}


def test_what_cannot_be_captured_is_said_once(monkeypatch: Any) -> None:
    monkeypatch.setattr(device_step, "DEVICES", ("cpu",))
    monkeypatch.setattr(device_step, "_said", set())
    monkeypatch.setattr(device_step, "capture_graph", lambda step: step.run)
    model = make_model(CONFIG)
    plain = write(Session(model), [[3]], GREEDY)
    hook = model.blocks[0].register_forward_hook(lambda *_: None)
    one = Session(model)
    with pytest.warns(UserWarning, match="one by one: the model has hooks"):
        one.begin([[3]], GREEDY)
    assert write(one, [[3]], GREEDY) == plain  # a second warning would be an error
    hook.remove()
    autocast = torch.autocast("cpu", dtype=torch.bfloat16)
    with autocast, pytest.warns(UserWarning, match="one by one: autocast is on"):
        one.begin([[3]], GREEDY)
    assert write(one, [[3]], GREEDY) == plain


def test_a_step_is_captured_once_for_each_way_of_drawing(monkeypatch: Any) -> None:
    captured = []

    def capture(step: DeviceStep) -> Callable[[], None]:
        captured.append(step.kind)
        return step.run

    monkeypatch.setattr(device_step, "DEVICES", ("cpu",))
    monkeypatch.setattr(device_step, "capture_graph", capture)
    model = make_model(CONFIG)
    one = Session(model)
    for way in ("greedy", "sorted", "whole", "penalised", "all of it", "greedy", "sorted"):
        write(one, [[3]], WAYS[way])
    assert captured == [
        ("greedy", False),
        ("sorted", False),
        ("whole", False),
        ("greedy", True),
        ("sorted", True),
    ]
    write(one, [[3]], replace(WAYS["sorted"], temperature=0.5, top_p=0.5, top_k=3))
    assert len(captured) == 5
    model.embedding.weight = torch.nn.Parameter(model.embedding.weight.detach().clone())
    write(one, [[3]], GREEDY)  # the weights have moved
    assert len(captured) == 6


def test_decoding_is_timed_on_the_path_it_takes(ahead: None, monkeypatch: Any) -> None:
    monkeypatch.setattr(measure, "DEVICES", ("cpu",))
    monkeypatch.setattr(measure, "_run", None)
    times = time_decode(make_model(CONFIG), 2, 5, 6)
    assert (times.batch, times.prompt_tokens, len(times.steps)) == (2, 5, 6)
    assert min(times.prefill, *times.steps) > 0


def test_a_session_goes_with_its_last_reference(ahead: None) -> None:
    """Its cache and graphs are most of the memory: they do not wait for the garbage collector."""
    gc.disable()
    try:
        one = Session(make_model(CONFIG))
        write(one, [[3]], GREEDY)
        last = weakref.ref(one)
        del one
        assert last() is None
    finally:
        gc.enable()


def test_another_default_dtype_changes_nothing(ahead: None) -> None:
    """Uniform numbers of 8 bits would leave most words of a tail out."""
    model = make_model(CONFIG)
    expected = write(Session(model, 2), RAGGED[:2], WAYS["sorted"])
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        one = Session(model, 2)
        assert write(one, RAGGED[:2], WAYS["sorted"]) == expected
        assert one._ahead is not None
        uniform_BC = one._ahead.step.uniform_BC
        assert not torch.equal(uniform_BC, uniform_BC.bfloat16().float())
    finally:
        torch.set_default_dtype(before)
