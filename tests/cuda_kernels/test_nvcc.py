"""Every CUDA file compiled for every card the project names, on a machine without one."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path

import pybind11
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
    pytest.mark.skipif(
        None in (shutil.which("cmake"), shutil.which("ninja")),
        reason="cmake and ninja are not on PATH",
    ),
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


def _build(folder: Path, cards: tuple[int, ...]) -> str:
    """The extension as ``pip install`` builds it, for these cards; returns what the compiler said.

    All of it once, in one test, since compiling takes minutes.
    """
    configure = ["cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", "-DPYLLM_CUDA=ON"]
    configure += [
        "-DCMAKE_CUDA_ARCHITECTURES=" + ";".join(f"{card}-real" for card in cards),
        "-DCMAKE_CUDA_FLAGS=-Werror all-warnings -Xptxas -v",
        f"-DCMAKE_CUDA_COMPILER={NVCC}",
        f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={folder}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    ]
    said = ""
    for command in (configure, ["cmake", "--build", str(folder)]):
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
        said += result.stdout + result.stderr
    return said


def _check_memory(said: str, cards: tuple[int, ...]) -> None:
    kernels = [match.groupdict() for match in _KERNEL.finditer(said)]
    assert {int(kernel["capability"]) for kernel in kernels} == set(cards)
    assert len(kernels) == said.count("Compiling entry function")
    for kernel in kernels:
        what = f"{kernel['name']} on sm_{kernel['capability']}"
        assert (kernel["stores"], kernel["loads"]) == ("0", "0"), f"{what} spills registers"
        shared = re.search(r"(\d+) bytes smem", kernel["rest"])
        assert shared is None or int(shared.group(1)) <= STATIC_SHARED, what


def _check_tensor_cores(folder: Path, cards: tuple[int, ...]) -> None:
    objects = {path.name.split(".")[0]: path for path in folder.rglob("*.cu.o")}
    assert set(objects) == {path.stem for path in SOURCES}
    for (name, path), card in product(objects.items(), cards if CUOBJDUMP is not None else ()):
        command = [CUOBJDUMP, "-sass", "-arch", f"sm_{card}", str(path)]
        code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        expected = TENSOR_CORES.get(name, set()) if card >= 80 else set()
        assert set(_TENSOR_CORES.findall(code)) == expected, f"tensor cores of sm_{card} in {name}"


def _check_call_without_driver(extension: Path) -> None:
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
        env={**os.environ, "PYLLM_CUDA_EXTENSION": str(extension)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    obstacle, too_large, no_driver = result.stdout.splitlines()
    assert obstacle == "CUDA driver version is insufficient for CUDA runtime version"
    assert "x 1 x 1 blocks of 128 threads cannot be launched" in too_large
    assert "rms_norm_forward: CUDA driver version is insufficient" in no_driver


def test_the_extension_for_cards(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    """No warnings, no spills, shared memory that fits, tensor cores where they are meant; and
    where there is no card it loads, and a launch says what is wrong."""
    cards = CAPABILITIES if pytestconfig.getoption("--all-cards") else TWO_CARDS
    _check_memory(_build(tmp_path, cards), cards)
    _check_tensor_cores(tmp_path, cards)
    if shutil.which("nvidia-smi") is None:
        (extension,) = tmp_path.glob("_cuda*.so")
        _check_call_without_driver(extension)
