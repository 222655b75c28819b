"""The header that executes CUDA C++ on the CPU: what it computes, and which faults it sees."""

import subprocess
from pathlib import Path

import pytest
import torch

from pyllm.testing import cuda_on_cpu

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    compiler = cuda_on_cpu.compiler()
    if compiler is None:
        pytest.skip("no C++ compiler, or not Linux")
    program = tmp_path_factory.mktemp("probe") / "probe"
    command = [compiler, *cuda_on_cpu.FLAGS, f"-I{CSRC}", f"-I{HERE}"]
    subprocess.run([*command, "-x", "c++", str(HERE / "probe.cu"), "-o", str(program)], check=True)
    result = subprocess.run([str(program)], capture_output=True, text=True, check=True)
    return result.stdout.splitlines()


def numbers(printed: list[str], name: str) -> list[list[int]]:
    return [[int(word) for word in line.split()[1:]] for line in printed if line.split()[0] == name]


def test_a_missing_barrier_shows_with_the_order_of_threads(printed: list[str]) -> None:
    right = list(range(63, -1, -1))
    assert numbers(printed, "with") == [right] * 3
    assert right not in numbers(printed, "without")


def test_shared_memory_is_poisoned_before_each_block(printed: list[str]) -> None:
    assert numbers(printed, "stale") == [[64]]


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("half_way", "24 of 64 threads have ended, 40 wait at the barrier probe.cu:"),
        ("two_barriers", "threads of a block wait at different barriers"),
        ("not_all_lanes", "31 in a collective of their warp: the others never come"),
        ("not_in_the_mask", "a lane is not in the mask of its own collective"),
        ("from_outside", "a shuffle reads lane 9, which is not in the mask"),
        ("two_collectives", "lanes of one mask are in different collectives"),
        ("misaligned", "a vector of 16 bytes at a misaligned address"),
        ("copy_misaligned", "a vector of 16 bytes at a misaligned address"),
        ("two_products", "lanes of one mask are in different collectives"),
        ("too_much_shared", "more than 48 KiB of shared memory"),
        ("static_and_dynamic", "nothing"),
        ("both_shared", "more than 48 KiB of shared memory"),
        ("no_warp", "blocks of 40 threads cannot be launched"),
        ("no_blocks", "an invalid configuration"),
        ("many_blocks", "an invalid configuration"),
        ("many_threads", "an invalid configuration"),
        ("much_shared", "more than 64 KiB of shared memory"),
    ],
)
def test_a_fault_is_an_exception(printed: list[str], kernel: str, message: str) -> None:
    (line,) = (line for line in printed if line.startswith(kernel))
    assert message in line


def test_collectives(printed: list[str]) -> None:
    (found,) = numbers(printed, "collectives")
    lanes = range(32)
    assert found[:32] == [lane ^ 5 for lane in lanes]
    assert found[32:64] == [lane - 3 if lane >= 3 else lane for lane in lanes]
    assert found[64:96] == [lane + 3 if lane % 8 < 5 else lane for lane in lanes]
    assert found[96:128] == [lane // 8 * 8 + 1 for lane in lanes]
    assert found[128:160] == [sum(1 << lane for lane in lanes if lane % 3 == 0)] * 32
    same = [sum(1 << other for other in lanes if other // 10 == lane // 10) for lane in lanes]
    assert [value % 2**32 for value in found[160:192]] == same
    # -128 * 2 - 1 * 3 + 127 * 4 + 1 * 5
    assert found[192:224] == [254 + lane for lane in lanes]
    assert found[224:] == [lane ^ 1 for lane in lanes]


@pytest.mark.parametrize(("name", "depth"), [("product8", 32), ("product16", 16)])
def test_tensor_cores_have_the_fragments_of_the_manual(
    printed: list[str], name: str, depth: int
) -> None:
    for row in numbers(printed, name):
        left, right, product = torch.tensor(row).split([16 * depth, 8 * depth, 16 * 8])
        assert torch.equal(left.view(16, depth) @ right.view(8, depth).T, product.view(16, 8))


def test_a_copy_is_there_after_the_wait_and_the_barrier(printed: list[str]) -> None:
    """The second group, of zeros, comes after the wait for all groups."""
    right = [0, 0, 0, *range(125, 0, -1), -1, 0]
    assert numbers(printed, "copied") == [right] * 3
    assert numbers(printed, "copied_unwaited") == [[-1] * 129 + [0]] * 3
    assert right not in numbers(printed, "copied_unsynchronised")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_arithmetic_rounds_once(printed: list[str], dtype: torch.dtype) -> None:
    """Against float64, in which sums and products of two such numbers, and nearly all of three, are
    exact, rounded by Python's integers."""
    rows = torch.tensor(numbers(printed, str(dtype).removeprefix("torch.")))
    a, b, c, total, product, quotient, fused = rows.to(torch.int16).view(dtype).unbind(1)
    wide = {name: value.double() for name, value in (("a", a), ("b", b), ("c", c))}
    assert_rounded(total, [(wide["a"], wide["b"])], dtype)
    assert torch.equal(product, (a.float() * b.float()).to(dtype))
    assert torch.equal(quotient.nan_to_num(7.0), (a.float() / b.float()).to(dtype).nan_to_num(7.0))
    assert_rounded(fused, [(wide["a"] * wide["b"], wide["c"])], dtype)


def assert_rounded(got: torch.Tensor, terms: list, dtype: torch.dtype) -> None:
    """No neighbour of `got` is closer to the exact sum."""
    from fractions import Fraction

    ((left, right),) = terms
    largest = Fraction(torch.finfo(dtype).max)
    upper = torch.nextafter(got, torch.full_like(got, float("inf")))
    lower = torch.nextafter(got, torch.full_like(got, float("-inf")))
    columns = (left.tolist(), right.tolist(), got.tolist(), lower.tolist(), upper.tolist())
    for x, y, value, below, above in zip(*columns, strict=True):
        exact = Fraction(x) + Fraction(y)
        if abs(value) == float("inf"):
            assert abs(exact) >= largest
            continue
        error = abs(Fraction(value) - exact)
        for neighbour in (below, above):
            if abs(neighbour) != float("inf"):
                assert error <= abs(Fraction(neighbour) - exact), (x, y, value)
