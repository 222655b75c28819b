"""``pytest -m gpu``: every face of every operation on the card, by the same declarations.

Then what only a card can show: streams, captured graphs, compiled doors, the memory of a small
card, and that bad input leaves the device usable. Generation is in ``tests/generate/test_gpu.py``.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pyllm import ops
from pyllm.ops import _registry
from pyllm.ops._registry import available_faces, choose_face, face_module
from pyllm.testing import OPERATIONS, OpCase, check_door, check_face
from pyllm.testing.check import expectations, run_face
from pyllm.testing.suite import faces_on

pytestmark = pytest.mark.gpu

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FACES = [
    (op, face)
    for op in OPERATIONS
    for face in faces_on("cuda", available_faces(op))
    if _registry.serves(op, face, "cuda")
]
COMPILED = [pair for pair in FACES if pair[1] in ("cuda", "triton")]
"""Those that are kernels: they take no host's time between launches."""
CAP = int(3.4 * 2**30)
"""What PyTorch may allocate on a card of 4 GiB: the context takes the rest."""
SECONDS = 5.0
"""Of cases in one test, beside the first one; and three times as long for what Triton compiles.
The hostile cases alone are 1,800 compilations of its kernels."""
BEGIN = time.monotonic()
LAST_SECONDS = 60
"""Of what this process has (``--gpu-minutes``), for the first case of each test alone."""


@pytest.fixture(autouse=True)
def sound_device() -> Iterator[None]:
    """TF32 would give products ten bits of mantissa, and no budget for float32 covers that. After
    each test the device still works: an error of a kernel stays with a process for good."""
    torch.set_float32_matmul_precision("highest")
    yield
    torch.cuda.synchronize()
    assert torch.ones(3, device="cuda").sum().item() == 3


def has_bf16(dtype: torch.dtype) -> bool:
    return dtype != torch.bfloat16 or torch.cuda.is_bf16_supported(False)


def serves(face: Any, inputs: dict[str, Any]) -> bool:
    """Would the door hand this call to the face?"""
    unserved = getattr(face, "unserved", None)
    return unserved is None or unserved("forward", *inputs.values()) is None


@pytest.fixture
def in_time(
    request: pytest.FixtureRequest, record_left_out: Callable[[str, int], None]
) -> Callable[..., Iterator[OpCase]]:
    """The first case, and the next ones for as long as there is time; the rest is counted."""

    def chosen(cases: Iterable[OpCase], face: str | None = None) -> Iterator[OpCase]:
        waiting = list({case.label: case for case in cases}.values())
        seconds = SECONDS if face in ("cuda", "reference", "torch") else 3 * SECONDS
        in_all = 60 * request.config.getoption("--gpu-minutes")
        end = min(time.monotonic() + seconds, BEGIN + in_all - LAST_SECONDS)
        while waiting:
            yield waiting.pop(0)
            if waiting and time.monotonic() > end:
                record_left_out(request.node.name, len(waiting))
                return

    return chosen


def smoke_first(op: str) -> list[OpCase]:
    """All hostile cases, those ahead that were chosen to find most."""
    return [*OPERATIONS[op].smoke_cases, *OPERATIONS[op].hostile_cases]


def small_cases(op: str, face: str, dtype: torch.dtype, device: str = "cuda") -> list[OpCase]:
    """The smoke cases that the face serves."""
    module, cases = face_module(op, face), OPERATIONS[op].smoke_cases
    found = [case for case in cases if serves(module, case.make_inputs(dtype, device))]
    if not found:
        pytest.skip(f"{face} serves no case of {op} in {dtype}")
    return found


def one_case(op: str, face: str, dtype: torch.dtype, device: str = "cuda") -> OpCase:
    """Of the small cases the one with most work: the first of many operations has no rows, and
    nothing to launch."""

    def numbers(case: OpCase) -> int:
        values = case.make_inputs(dtype).values()
        return sum(value.numel() for value in values if isinstance(value, Tensor))

    return max(small_cases(op, face, dtype, device), key=numbers)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "face"), FACES)
def test_face(op: str, face: str, dtype: torch.dtype, in_time: Any) -> None:
    if not has_bf16(dtype) and face in ("triton", "cuda"):
        pytest.skip("this card has no bfloat16")
    module = face_module(op, face)
    for case in in_time(smoke_first(op), face):
        if serves(module, case.make_inputs(dtype, "cuda")):
            check_face(case, module, dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "face"), FACES)
def test_door(op: str, face: str, dtype: torch.dtype, in_time: Any) -> None:
    if not has_bf16(dtype) and face in ("triton", "cuda"):
        pytest.skip("this card has no bfloat16")
    for case in in_time(small_cases(op, face, dtype), face):
        check_door(case, getattr(ops, op), face, dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPERATIONS)
@pytest.mark.filterwarnings("ignore:.*which is slower:UserWarning")  # said once, and right
def test_the_door_finds_a_face_for_everything(op: str, dtype: torch.dtype, in_time: Any) -> None:
    for case in in_time(smoke_first(op)):
        check_door(case, getattr(ops, op), None, dtype, "cuda")


@pytest.mark.parametrize(("op", "face"), COMPILED)
def test_life_size(op: str, face: str) -> None:
    """The sizes of real models, those the benchmark times."""
    module = face_module(op, face)
    for sizes in OPERATIONS[op].bench.values():
        case = OPERATIONS[op].case(sizes)
        for dtype in (torch.float32, torch.float16):
            if serves(module, case.make_inputs(dtype, "cuda")):
                check_face(case, module, dtype, "cuda")
            expectations.cache_clear()  # gigabytes
            torch.cuda.empty_cache()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPERATIONS)
def test_card_and_processor_draw_the_same_inputs(op: str, dtype: torch.dtype) -> None:
    case = OPERATIONS[op].smoke_cases[2]
    here, there = case.make_inputs(dtype), case.make_inputs(dtype, "cuda")
    for name, value in here.items():
        if isinstance(value, torch.Tensor):
            # What no query sees of a cache is NaN.
            torch.testing.assert_close(there[name].cpu(), value, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("op", OPERATIONS)
def test_mutants(op: str, record_mutant: Callable[[str, str, bool], None]) -> None:
    """Every planted fault is seen on the card, too. In a process of its own: one that indexes
    beyond a tensor ends the device for it, is seen by that, and the next ones go on in another."""
    names = [mutant.name for mutant in OPERATIONS[op].mutants]
    first = 0
    while first < len(names):
        command = [sys.executable, str(Path(__file__).with_name("gpu_mutants.py")), op, str(first)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        for row in told:
            record_mutant(op, row["mutant"], row["killed"])
            assert row["killed"], f"{op}: no case catches the mutant {row['mutant']!r} on the card"
        first += len(told)
        if first < len(names):
            assert "CUDA error" in done.stderr, done.stderr
            record_mutant(op, names[first], True)
            first += 1


@pytest.mark.parametrize(("op", "face"), COMPILED)
def test_deterministic(op: str, face: str) -> None:
    """The same bits over ten runs, forward and backward."""
    case = one_case(op, face, torch.float16)
    sizes = [OPERATIONS[op].case(sizes) for sizes in OPERATIONS[op].bench.values()]
    for one in (case, sizes[0]):
        inputs = one.make_inputs(torch.float16, "cuda")
        if not serves(face_module(op, face), inputs):
            continue
        upstreams = expectations(one, torch.float16, "cuda", 0)[2]
        first = run_face(one, face_module(op, face), inputs, upstreams)
        for _ in range(10):
            again = run_face(one, face_module(op, face), inputs, upstreams)
            for have, want in ((again.outputs, first.outputs), (again.gradients, first.gradients)):
                for name, value in have.items():
                    assert torch.equal(value, want[name]), name
    expectations.cache_clear()


@pytest.mark.parametrize(("op", "face"), COMPILED)
def test_kernels_run_on_the_stream_of_the_caller(op: str, face: str) -> None:
    """While the default stream is busy: they neither wait for it nor run there."""
    case, module = one_case(op, face, torch.float16), face_module(op, face)
    upstreams = expectations(case, torch.float16, "cuda", 0)[2]
    inputs = case.make_inputs(torch.float16, "cuda")
    expected = run_face(case, module, inputs, upstreams)  # compiled, and tuned
    side, busy = torch.cuda.Stream(), torch.cuda.Event()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):  # so that its memory is there: cudaMalloc may wait for the device
        run_face(case, module, inputs, upstreams)
    torch.cuda.synchronize()
    torch.cuda._sleep(2 * 10**9)  # a second or so
    busy.record()
    with torch.cuda.stream(side):
        got = run_face(case, module, inputs, upstreams)
    side.synchronize()
    assert not busy.query(), "the default stream was waited for"
    for have, want in ((got.outputs, expected.outputs), (got.gradients, expected.gradients)):
        for name, value in have.items():
            assert torch.equal(value, want[name]), name
    torch.cuda.synchronize()


@pytest.mark.parametrize(("op", "face"), COMPILED)
def test_every_forward_can_be_captured(op: str, face: str) -> None:
    """As one CUDA graph, which then reads what its inputs hold at the time."""
    operation = OPERATIONS[op]
    case, module = one_case(op, face, torch.float16), face_module(op, face)
    function = getattr(module, f"{op}_forward")
    inputs = case.make_inputs(torch.float16, "cuda")
    other = case.make_inputs(torch.float16, "cuda", seed=1)
    given = operation.fresh(inputs)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            operation.forward_outputs(function, operation.fresh(inputs))
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = operation.forward_outputs(function, given)
    for source in (inputs, other):
        for name, value in given.items():
            if isinstance(value, Tensor):
                value.copy_(source[name])
        graph.replay()
        expected = operation.forward_outputs(function, operation.fresh(source))
        for got, want in zip(captured, expected, strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("op", OPERATIONS)
@pytest.mark.filterwarnings("default")  # the compiler's, such as of the TF32 that is not wanted
def test_compiled_doors(op: str) -> None:
    """Through inductor: one graph without breaks, and right."""
    pytest.importorskip("triton", reason="inductor needs triton on a card")
    if torch.cuda.get_device_capability() < (7, 0):
        pytest.skip("inductor needs a newer card")
    from torch._inductor import config

    torch.compiler.reset()
    case = OPERATIONS[op].case(OPERATIONS[op].tiny)
    compiled = torch.compile(getattr(ops, op), fullgraph=True)
    with config.patch(compile_threads=1):  # else a process for each core, of each of these
        check_door(case, compiled, None, torch.float32, "cuda")


def test_triton_is_chosen_where_it_runs() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("Triton has dropped this card")
    for op in ("rms_norm", "moe_ffn", "attention", "linear_cross_entropy", "rope"):
        if face_module(op, "triton") is not None:
            assert choose_face(op, "cuda", None).split(",")[0] == "triton", op


TRAIN = """
import sys, torch
from pyllm.models import Transformer, preset
total = torch.cuda.get_device_properties(0).total_memory
cap = int(sys.argv[1])
torch.cuda.set_per_process_memory_fraction(min(cap / total, 1.0))
torch.manual_seed(0)
model = Transformer(preset("moe-158m-gpt")).to("cuda")
model.recompute = True
model.train()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=False)
scaler = torch.amp.GradScaler("cuda", init_scale=256.0)
ids = torch.randint(50_257, (4, 513), device="cuda")
losses = []
for _ in range(4):
    with torch.autocast("cuda", dtype=torch.float16):
        out = model(ids[:, :-1], ids[:, 1:])
    scaler.scale(out.loss + 0.01 * out.balance_loss).backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    losses.append(out.loss.item())
assert losses[-1] < losses[0], losses
print(torch.cuda.max_memory_reserved())
"""


@pytest.mark.filterwarnings("ignore:.*which is slower:UserWarning")
def test_a_card_of_four_gibibytes_trains_the_large_mixture() -> None:
    """AdamW in float32, half precision, recomputation, chunked loss: the same batch four times."""
    expectations.cache_clear()
    torch.cuda.empty_cache()  # of a card that has no more than this
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, str(CAP)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) <= CAP


def tiny(op: str, dtype: torch.dtype = torch.float16) -> dict[str, Any]:
    return OPERATIONS[op].case(OPERATIONS[op].tiny).make_inputs(dtype, "cuda")


@pytest.mark.parametrize("op", OPERATIONS)
def test_tensors_on_two_devices_are_refused(op: str) -> None:
    inputs = tiny(op)
    names = [name for name, value in inputs.items() if isinstance(value, Tensor)]
    for name in names if len(names) > 1 else ():
        with pytest.raises(ValueError, match="one device was expected"):
            OPERATIONS[op].call(getattr(ops, op), {**inputs, name: inputs[name].cpu()}, None)


def shifted(value: Tensor) -> Tensor:
    """The same values one element further on: no address that a vector load could take."""
    wide = value.new_empty(value.numel() + 1)
    place = wide[1:].view(value.shape)
    return place.copy_(value)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
@pytest.mark.parametrize(("op", "face"), FACES)
def test_misaligned_tensors_give_the_right_result(
    op: str, face: str, dtype: torch.dtype, in_time: Any
) -> None:
    for case in in_time(small_cases(op, face, dtype), face):
        check_door(case, getattr(ops, op), face, dtype, "cuda", change=shifted)


@pytest.mark.parametrize(("op", "face"), FACES)
def test_strided_tensors_give_the_right_result(op: str, face: str, in_time: Any) -> None:
    def spread(value: Tensor) -> Tensor:
        wide = value.new_empty(*value.shape[:-1], 2 * value.shape[-1]) if value.dim() else value
        return wide[..., ::2].copy_(value) if value.dim() else value

    for case in in_time(small_cases(op, face, torch.float32), face):
        check_door(case, getattr(ops, op), face, torch.float32, "cuda", change=spread)


@pytest.mark.parametrize("op", ["moe_ffn", "attention", "rms_norm", "linear_cross_entropy"])
@pytest.mark.filterwarnings("ignore:.*which is slower:UserWarning")
def test_a_dtype_that_the_card_lacks_falls_back(op: str) -> None:
    if has_bf16(torch.bfloat16):
        pytest.skip("this card has bfloat16")
    for case in OPERATIONS[op].smoke_cases:
        check_door(case, getattr(ops, op), None, torch.bfloat16, "cuda")


@pytest.mark.parametrize(("op", "face"), FACES)
def test_no_rows(op: str, face: str) -> None:
    """An empty batch: no launch without blocks, which is an error that stays."""
    operation = OPERATIONS[op]
    rows = next((axis for axis in ("N", "B") if axis in operation.tiny), None)
    if rows is None:
        pytest.skip("no axis of rows")
    case = operation.case({**operation.tiny, rows: 0})
    if serves(face_module(op, face), case.make_inputs(torch.float16, "cuda")):
        check_door(case, getattr(ops, op), face, torch.float16, "cuda")


def test_an_error_in_an_argument_leaves_the_device_usable() -> None:
    x = torch.ones(3, 8, device="cuda")
    for bad in (torch.ones(7, device="cuda"), torch.ones(8)):
        with pytest.raises(ValueError, match="rms_norm"):
            ops.rms_norm(x, bad)
    assert torch.equal(ops.rms_norm(x, torch.ones(8, device="cuda"), 0.0), x)
