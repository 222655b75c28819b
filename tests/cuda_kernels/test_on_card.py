"""The CUDA kernels on a card: streams, CUDA graphs, errors that do not stick. `pytest -m gpu`."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pyllm._native import cuda_extension, cuda_on_cpu
from pyllm.ops import available_faces, decode_attention, rms_norm
from pyllm.ops._registry import face_module
from pyllm.testing import OPERATIONS, OpCase
from pyllm.testing.declaration import as_tuple

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        cuda_extension() is None or cuda_on_cpu(), reason="pyllm._cuda is not built for a card"
    ),
]

OPS = [op for op in OPERATIONS if "cuda" in available_faces(op)]


def _case(op: str) -> OpCase:
    """The largest of the small cases with work in it."""
    return OPERATIONS[op].smoke_cases[2]


def _forward(op: str, dtype: torch.dtype) -> Callable[[], tuple[Tensor, ...]]:
    """A call that can be made again and again, on inputs that stay where they are."""
    case = _case(op)
    inputs = case.make_inputs(dtype, "cuda")
    function = getattr(face_module(op, "cuda"), f"{op}_forward")

    def call() -> tuple[Tensor, ...]:
        outputs = as_tuple(function(*inputs.values()))
        written = case.operation.given(case.operation.mutates, inputs)
        return (*(inputs[name] for name in written), *outputs)

    return call


def _bits(values: tuple[Tensor, ...]) -> list[Tensor]:
    return [value.nan_to_num(0.5).cpu() for value in values]


@pytest.mark.parametrize("op", OPS)
def test_the_same_bits_every_time(op: str) -> None:
    call = _forward(op, torch.float16)
    first = _bits(call())
    for _ in range(10):
        assert all(torch.equal(a, b) for a, b in zip(_bits(call()), first, strict=True))


@pytest.mark.parametrize("op", OPS)
def test_a_kernel_waits_for_what_is_on_its_stream(op: str) -> None:
    """On a stream of its own, behind work that takes long: nothing runs on the default stream."""
    call = _forward(op, torch.float16)
    first = _bits(call())
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()  # so that its memory is there: cudaMalloc may wait for the device
        stream.synchronize()
        torch.cuda._sleep(200_000_000)  # a tenth of a second
        values = call()
        assert not stream.query(), "the launch waited for the card"
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(_bits(values), first, strict=True))


@pytest.mark.parametrize("op", OPS)
def test_a_cuda_graph_captures_it(op: str) -> None:
    call = _forward(op, torch.float16)
    first = _bits(call())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        values = call()
    for value in values:
        if value.dtype.is_floating_point and not OPERATIONS[op].mutates:
            value.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(_bits(values), first, strict=True))


def test_a_launch_that_is_refused_leaves_no_error() -> None:
    native, x = cuda_extension(), torch.randn(4, 8, device="cuda")
    stream = torch.cuda.current_stream().cuda_stream
    for _ in range(2):
        with pytest.raises(ValueError, match="cannot be launched"):
            native.rms_norm_forward(0, 0, 0, 0.0, 0, 0, 2**45, 8, stream)
    weight = torch.ones(8, device="cuda")
    y = rms_norm(x, weight, face="cuda")
    torch.cuda.synchronize()
    torch.testing.assert_close(y, rms_norm(x, weight, face="reference"))


@pytest.mark.parametrize("wrong", [-1, 3, 2**31 - 1])
def test_an_index_out_of_range_leaves_no_error(wrong: int) -> None:
    x = torch.randn(5, 8, device="cuda")
    experts = torch.tensor([[0, 1], [2, 0], [1, wrong], [2, 1], [0, 0]], device="cuda")
    rows = torch.ops.pyllm.moe_dispatch_forward(x, experts, 3, "cuda")[0]
    torch.cuda.synchronize()
    assert rows[9].isnan().all() and rows[:9].isfinite().all()


def test_a_position_outside_of_the_cache_leaves_no_error() -> None:
    q, (k, v) = torch.randn(1, 1, 2, 8), torch.randn(2, 1, 6, 1, 8)
    at = torch.tensor([2**30], dtype=torch.int32), torch.tensor([1], dtype=torch.int32)
    y = decode_attention(*(each.cuda() for each in (q, k, v, *at)), face="cuda")
    torch.cuda.synchronize()
    assert y.isnan().all()


def test_a_card_says_that_nothing_stands_in_the_way() -> None:
    assert cuda_extension().obstacle() == ""


def test_it_needs_no_more_than_results_and_scratch() -> None:
    """All memory is torch's, so that its peak says what is needed."""
    x = torch.randn(4096, 2048, device="cuda", dtype=torch.float16)
    weight = torch.ones(2048, device="cuda")
    rms_norm(x, weight, face="cuda")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y = rms_norm(x, weight, face="cuda")
    assert torch.cuda.max_memory_allocated() - before <= y.nbytes + 2**20
