"""The CUDA kernels on the CPU: races of threads, whether or not they change a result, and memory
outside of the tensors of a launch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pyllm._native import cuda_on_cpu as kernels_are_on_cpu
from pyllm.testing import cuda_on_cpu

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FAULTS = {
    "around_the_block": "a race: a write to what was read",
    "around_the_warp": "a race: a write to what was read",
    "again": "a race: a write to what was read",
    "blocks": "a race: two writes",
    "bytes": "a race: two writes",
    "outside": "memory outside of every tensor",
}

pytestmark = pytest.mark.skipif(not kernels_are_on_cpu(), reason="the kernels are not the CPU's")


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    compiler = cuda_on_cpu.compiler()
    assert compiler is not None
    folder = tmp_path_factory.mktemp("races")
    common = [compiler, *cuda_on_cpu.FLAGS, "-DPYLLM_CUDA_RACES", f"-I{ROOT / 'csrc'}", f"-I{HERE}"]
    watched, host, program = folder / "probe.o", folder / "races.o", folder / "probe"
    source = ["-x", "c++", "-c", str(HERE / "probe_races.cu"), "-o", str(watched)]
    subprocess.run([*common, *cuda_on_cpu.WATCHED, *source], check=True)
    subprocess.run([*common, "-c", str(HERE / "cuda_races.cpp"), "-o", str(host)], check=True)
    subprocess.run([compiler, str(watched), str(host), "-o", str(program)], check=True)
    result = subprocess.run([str(program)], capture_output=True, text=True, check=True)
    lines = (line.partition(": ") for line in result.stdout.splitlines())
    return {name: outcome for name, _, outcome in lines}


@pytest.mark.parametrize("kernel", FAULTS)
def test_a_fault_is_an_exception(printed: dict[str, str], kernel: str) -> None:
    assert printed[f"{kernel} right"] == "nothing"
    assert FAULTS[kernel] in printed[f"{kernel} wrong"]
    assert ("of another block" in printed[f"{kernel} wrong"]) == (kernel == "blocks")


@pytest.mark.slow
def test_no_kernel_has_one() -> None:
    """What runs in every order in test_kernels.py, and what is large enough for loops to turn."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    chosen = [
        str(HERE / "test_kernels.py"),
        "-k",
        "order_of_threads or many_experts or many_tiles_of_keys or several_warps or last_warp",
    ]
    module = cuda_on_cpu.build(ROOT, races=True)
    result = subprocess.run(
        [*command, *chosen],
        cwd=ROOT,
        env={**os.environ, "PYLLM_CUDA_EXTENSION": str(module)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-5000:]
