"""Every CUDA file compiled for every card the project names, on a machine without one."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CAPABILITIES = (75, 80, 86, 89, 90)
TWO_CARDS = (75, 90)
"""The oldest and the latest: what is compiled without ``--all-cards``."""
STATIC_SHARED = 48 * 1024
"""Bytes of static shared memory that a block may have on any card."""
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
NVCC = shutil.which("nvcc")
TENSOR_CORES = {"int8_linear_tensor": {"IMMA.16832.S8.S8", "HMMA.16816.F32", "HMMA.16816.F32.BF16"}}
"""Instructions of tensor cores in the file for sm_80 and later; no other file has any."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(NVCC is None, reason="nvcc is not on PATH"),
]
_KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for 'sm_(?P<capability>\d+)'"
    r".*?(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r".*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)
_TENSOR_CORES = re.compile(r"\b[IH]MMA(?:\.[A-Z0-9]+)+")


def _cuobjdump() -> str | None:
    """CUDA's own, or the one that Triton brings."""
    found = shutil.which("cuobjdump")
    triton = importlib.util.find_spec("triton")
    if found is None and triton is not None and triton.origin is not None:
        brought = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        found = str(brought) if brought.exists() else None
    return found


CUOBJDUMP = _cuobjdump()


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_no_spills_and_shared_memory_fits(
    source: Path, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    cards = CAPABILITIES if pytestconfig.getoption("--all-cards") else TWO_CARDS
    targets = [f"-gencode=arch=compute_{one},code=sm_{one}" for one in cards]
    strict = ["-Werror", "all-warnings", "-Xptxas", "-v"]
    flags = ["-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", "--threads", "2", *strict, *targets]
    command = [str(NVCC), *flags, "-c", str(source), "-o", str(tmp_path / "kernel.o")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    kernels = [match.groupdict() for match in _KERNEL.finditer(result.stdout + result.stderr)]
    assert {int(kernel["capability"]) for kernel in kernels} == set(cards)
    for kernel in kernels:
        what = f"{kernel['name']} on sm_{kernel['capability']}"
        assert (kernel["stores"], kernel["loads"]) == ("0", "0"), f"{what} spills registers"
        shared = re.search(r"(\d+) bytes smem", kernel["rest"])
        assert shared is None or int(shared.group(1)) <= STATIC_SHARED, what
    for one in cards if CUOBJDUMP is not None else ():
        command = [CUOBJDUMP, "-sass", "-arch", f"sm_{one}", str(tmp_path / "kernel.o")]
        code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        expected = TENSOR_CORES.get(source.stem, set()) if one >= 80 else set()
        assert set(_TENSOR_CORES.findall(code)) == expected, f"tensor cores of sm_{one}"


def test_a_call_without_a_driver_is_an_error(tmp_path: Path) -> None:
    """The extension builds and loads where there is no card; a launch there says what is wrong."""
    if shutil.which("cmake") is None or shutil.which("ninja") is None:
        pytest.skip("cmake and ninja are not on PATH")
    if shutil.which("nvidia-smi") is not None:
        pytest.skip("there is a driver here")
    import pybind11

    configure = ["cmake", "-S", str(ROOT), "-B", str(tmp_path), "-G", "Ninja", "-DPYLLM_CUDA=ON"]
    configure += [
        "-DCMAKE_CUDA_ARCHITECTURES=75-real",
        f"-DCMAKE_CUDA_COMPILER={NVCC}",
        f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={tmp_path}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    ]
    for command in (configure, ["cmake", "--build", str(tmp_path)]):
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
    built = list(tmp_path.glob("_cuda*"))
    code = """
from pyllm._native import cuda_extension
native = cuda_extension()
assert not native.ON_CPU
print(native.obstacle())
native.rms_norm_forward(0, 16, 16, 0.0, 16, 16, 0, 8, 0)
for rows in (2**45, 3):
    try:
        native.rms_norm_forward(0, 16, 16, 0.0, 16, 16, rows, 8, 0)
    except (ValueError, RuntimeError) as error:
        print(error)
"""
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYLLM_CUDA_EXTENSION": str(built[0])},
        capture_output=True,
        text=True,
    )
    obstacle, too_large, no_driver = result.stdout.splitlines()
    assert obstacle == "CUDA driver version is insufficient for CUDA runtime version"
    assert "x 1 x 1 blocks of 128 threads cannot be launched" in too_large
    assert "rms_norm_forward: CUDA driver version is insufficient" in no_driver
