"""How often Triton compiles and times its kernels: not for every number of tokens."""

import os
import subprocess
import sys
import time
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from pyllm.triton_kernels import _tuning, linear_cross_entropy, moe_ffn, rms_norm
from pyllm.triton_kernels._tuning import INTERPRETED, Kernel

from pyllm import ops
from pyllm.ops._registry import face_module
from pyllm.testing import OPERATIONS, check_face
from pyllm.testing.cases.linear_cross_entropy import LINEAR_CROSS_ENTROPY

interpreted = pytest.mark.skipif(not INTERPRETED, reason="only Triton's interpreter runs here")

KERNELS = """
import gc
from pyllm.ops._registry import face_module
from pyllm.triton_kernels._tuning import Kernel
for op in ("attention", "linear_cross_entropy", "moe_ffn", "rms_norm", "rope"):
    face_module(op, "triton")
kernels = [one for one in gc.get_objects() if isinstance(one, Kernel)]
assert len(kernels) > 15, len(kernels)
for kernel in kernels:
    told = {*kernel.pointers, *kernel.lengths}
    for compiled, names in ((kernel.aligned, told), (kernel.ragged, set())):
        looked_at = {
            one.name for one in compiled.params if not (one.is_constexpr or one.do_not_specialize)
        }
        assert looked_at == names, (kernel.name, looked_at)
    assert not {"n_queries", "n_keys", "n_rows", "n_tokens", "n_tiles", "rows"} & told
"""


def test_triton_looks_at_addresses_and_lengths_of_rows_alone() -> None:
    """In a process without the interpreter, which compiles nothing."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KERNELS],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


def test_the_form_for_aligned_tensors_is_taken_for_those_alone() -> None:
    x = torch.zeros(2, 64, dtype=torch.float16)
    kernel = rms_norm.forward_kernel
    arguments = dict.fromkeys(kernel.pointers, x) | {"width": 64, "eps": 0.0}
    assert kernel.suited(arguments) is kernel.aligned
    assert kernel.suited({**arguments, "width": 40}) is kernel.ragged
    assert kernel.suited({**arguments, "y_ptr": x[:, 1:]}) is kernel.ragged


@interpreted
@pytest.mark.parametrize("op", ["linear_cross_entropy", "moe_ffn"])
def test_nothing_is_timed_again_for_another_number_of_tokens(
    op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Any, ...]] = []

    def listen(kernel: Kernel, blocks: Any, grid: Any, key: Any, *rest: Any, **named: Any) -> None:
        seen.append((kernel.name, *(named[name] for name in key)))
        _tuning.launch_product(kernel, blocks, grid, key, *rest, **named)

    module = {"linear_cross_entropy": linear_cross_entropy, "moe_ffn": moe_ffn}[op]
    monkeypatch.setattr(module, "launch_product", listen)
    found = []
    for tokens, words in ((5, 1024), (40, 512)):
        # More rows leave less memory for the words of each.
        monkeypatch.setattr(linear_cross_entropy, "_cut", lambda x, n, words=words: (words, 2))
        sizes = {**OPERATIONS[op].smoke[2], "N": tokens, "V": 1024}
        if op == "moe_ffn":
            del sizes["V"]
        check_face(OPERATIONS[op].case(sizes), module, torch.float32)
        found.append(set(seen))
        seen.clear()
    assert found[0] == found[1]


class _Listening:
    """In place of a kernel, and of its tuner: how it is launched."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.best_config: Any = None

    def suited(self, arguments: dict[str, Any]) -> "_Listening":
        return self

    def start(self, grid: Any, **arguments: Any) -> None:
        self.calls.append(arguments["BLOCK_M"])

    def __getitem__(self, grid: Any) -> Any:
        def run(**arguments: Any) -> None:
            self.calls.append(arguments.get("BLOCK_M", "timed"))
            self.best_config = SimpleNamespace(all_kwargs=lambda: {"BLOCK_M": 99})

        return run


@pytest.fixture
def listening(monkeypatch: pytest.MonkeyPatch) -> _Listening:
    kernel = _Listening()
    monkeypatch.setattr(_tuning, "_best", {})
    monkeypatch.setattr(_tuning, "_tuner", lambda kernel, choices, key: kernel)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return kernel


TWO = (_tuning.Blocks(16, 16, 16, 4, 1), _tuning.SMALL)


def _launch(kernel: Any, choices: Any, large: bool, width: int) -> Any:
    _tuning.launch(kernel, choices, (1,), ("width",), large, width=width, x=torch.ones(1))
    return kernel.calls[-1]


def test_what_is_timed(listening: _Listening, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large work that has a choice, once, and not for the first time while a graph is captured."""
    capturing = False
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    assert _launch(listening, TWO, False, 8) == 16
    assert _launch(listening, TWO[:1], True, 8) == 16
    capturing = True
    assert _launch(listening, TWO, True, 8) == 16
    capturing = False
    assert _launch(listening, TWO, True, 8) == "timed"
    assert _launch(listening, TWO, True, 8) == 99
    assert _launch(listening, TWO, False, 8) == 16  # the same bits as before
    capturing = True
    assert _launch(listening, TWO, True, 8) == 99
    assert _launch(listening, TWO, True, 24) == 16


def test_one_thread_times_at_a_time(listening: _Listening) -> None:
    """The backwards of two cards have a thread each; a tuner keeps its call in itself."""
    inside, most = 0, 0

    class Tuner(_Listening):
        def __getitem__(self, grid: Any) -> Any:
            run = super().__getitem__(grid)

            def slowly(**arguments: Any) -> None:
                nonlocal inside, most
                inside += 1
                most = max(most, inside)
                time.sleep(0.05)
                run(**arguments)
                inside -= 1

            return slowly

    kernel = Tuner()
    widths = (8, 16, 24)
    threads = [Thread(target=_launch, args=(kernel, TWO, True, width)) for width in widths]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert kernel.calls == ["timed"] * 3 and most == 1


def test_timing_is_of_the_card_and_not_of_the_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card of two clocks: launching takes 40 microseconds, what is launched takes 5."""
    host = card = 0.0

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            nonlocal card
            card = max(card, host)
            self.at = card

        def elapsed_time(self, other: "Event") -> float:
            return 1e3 * (other.at - self.at)

        def synchronize(self) -> None:
            nonlocal host
            host = max(host, self.at)

    def work(seconds: float) -> None:
        nonlocal card
        card = max(card, host) + seconds

    def call() -> None:
        nonlocal host
        host += 40e-6
        work(5e-6)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: work(cycles / 2e9))
    monkeypatch.setattr(time, "perf_counter", lambda: host)
    assert _tuning.milliseconds(call) == [pytest.approx(5e-3)]


@interpreted
def test_padded_words_of_a_slab_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last slab ends in no multiple of 16: beyond it lie the zeros that the kernels read."""
    monkeypatch.setattr(linear_cross_entropy, "_cut", lambda x, n: (256, 2))
    for words in (257, 271, 272, 500):
        sizes = {"N": 20, "D": 24, "V": words, "ignored": "some"}
        check_face(LINEAR_CROSS_ENTROPY.case(sizes), linear_cross_entropy, torch.float32)


@pytest.mark.gpu
def test_timing_takes_no_memory() -> None:
    """Triton's own stopwatch takes 256 MB, which a training step may not have left."""
    x = torch.ones(1024, 1024, device="cuda")
    before = torch.cuda.max_memory_allocated()
    (took,) = _tuning.milliseconds(lambda: x.add_(1.0))
    assert 0 < took < 1000
    assert torch.cuda.max_memory_allocated() == before


@pytest.mark.gpu
def test_another_number_of_tokens_compiles_nothing() -> None:
    """Not one more than the two forms of each kernel: 1 and multiples of 16 are like the rest."""
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("Triton has dropped this card")
    kernels = (
        *(face_module("attention", "triton").forward_kernel, rms_norm.forward_kernel),
        *(rms_norm.backward_kernel, face_module("rope", "triton").turn_kernel),
    )

    def compiled() -> int:
        forms = [form for kernel in kernels for form in (kernel.aligned, kernel.ragged)]
        return sum(len(cache[0]) for form in forms for cache in form.device_caches.values())

    def call(tokens: int) -> None:
        q = torch.randn(1, tokens, 2, 64, device="cuda", dtype=torch.float16, requires_grad=True)
        table = torch.randn(tokens, 32, device="cuda")
        y = ops.rope(ops.rms_norm(q, torch.ones_like(q[0, 0, 0]), face="triton"), table, table)
        ops.attention(y, y, y, window=None if tokens < 20 else 16, sinks=tokens % 3, face="triton")
        y.float().sum().backward()

    call(33)
    before = compiled()
    for tokens in (1, 2, 16, 17, 48, 512, 1025):
        call(tokens)
    assert compiled() == before
