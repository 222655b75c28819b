"""The extension: it builds or says why not, forced instruction sets, one OpenMP runtime."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pyllm._native import cpu_extension

ROOT = Path(__file__).resolve().parent.parent
KERNEL_SOURCES = sorted(
    path
    for path in (ROOT / "csrc" / "cpu").glob("*.cpp")
    if "PYLLM_ISA" in path.read_text(encoding="utf-8") and path.stem != "isa"
)
AVX512_FLAGS = [
    "-mavx2",
    "-mfma",
    "-mavx512f",
    "-mavx512bw",
    "-mavx512dq",
    "-mavx512vl",
    "-mavx512vnni",
    "-mavx512bf16",
]
AMX_FLAGS = [*AVX512_FLAGS, "-mamx-tile", "-mamx-bf16", "-mamx-int8"]
AMX_NAMES = ("decode_step", "int8_linear", "linear_cross_entropy", "moe_ffn")
AMX_SOURCES = [path for path in KERNEL_SOURCES if path.stem in AMX_NAMES]

needs_extension = pytest.mark.skipif(cpu_extension() is None, reason="pyllm._cpu is not built")


def run_python(code: str, *flags: str, cwd: Path = ROOT, **environment: str):
    return subprocess.run(
        [sys.executable, *flags, "-c", code],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, **environment},
    )


@needs_extension
def test_each_supported_isa_can_be_forced() -> None:
    supported = cpu_extension().supported_isas()
    assert "baseline" in supported
    code = "from pyllm._native import cpu_extension; print(cpu_extension().active_isa())"
    for isa in supported:
        result = run_python(code, PYLLM_ISA=isa)
        assert result.stdout.strip() == isa, result.stderr
    assert run_python(code, PYLLM_ISA="").stdout.strip() == supported[-1]


@needs_extension
def test_an_unknown_isa_is_an_error() -> None:
    code = "from pyllm._native import cpu_extension; cpu_extension()"
    result = run_python(code, PYLLM_ISA="sse9")
    assert result.returncode != 0
    assert "ValueError: PYLLM_ISA='sse9' is not an instruction set" in result.stderr
    assert "expected one of: baseline" in result.stderr


@needs_extension
def test_another_build_can_be_named(tmp_path: Path) -> None:
    other = tmp_path / Path(cpu_extension().__file__).name
    shutil.copy(cpu_extension().__file__, other)
    code = "from pyllm._native import cpu_extension; print(cpu_extension().__file__)"
    result = run_python(code, PYLLM_EXTENSION=str(other))
    assert result.stdout.strip() == str(other), result.stderr


def test_another_build_that_does_not_load_is_an_error() -> None:
    code = "from pyllm._native import cpu_extension; cpu_extension()"
    result = run_python(code, PYLLM_EXTENSION="/nowhere/_cpu.so")
    assert result.returncode != 0
    last_line = result.stderr.splitlines()[-1]
    assert last_line.startswith("ValueError: PYLLM_EXTENSION='/nowhere/_cpu.so' does not load as")
    assert "unset PYLLM_EXTENSION for the installed one" in last_line


@needs_extension
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_one_openmp_runtime_in_the_process() -> None:
    code = """
import torch
from pyllm._native import cpu_extension
from pyllm.cpu_kernels.rms_norm import rms_norm_forward
from pyllm.doctor import openmp_runtimes
before = openmp_runtimes()
torch.set_num_threads(2)
rms_norm_forward(torch.ones(4096, 64), torch.ones(64), 1e-5)
torch.ones(512, 512) @ torch.ones(512, 512)
print(before == openmp_runtimes(), len(before), cpu_extension().parallel_backend())
"""
    result = run_python(code)
    assert result.stdout.split() == ["True", "1", "openmp"], result.stdout + result.stderr


@needs_extension
def test_without_torch_loops_run_on_std_threads(tmp_path: Path) -> None:
    """The extension alone: no OpenMP runtime to be found, and the kernel still works."""
    numpy = pytest.importorskip("numpy")
    code = f"""
import importlib.util, sys
import numpy as np
spec = importlib.util.spec_from_file_location("_cpu", {cpu_extension().__file__!r})
cpu = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cpu)
x, w = np.ones((4096, 64), np.float32), np.full(64, 3, np.float32)
y, rstd = np.empty_like(x), np.empty(4096, np.float32)
cpu.rms_norm_forward(
    cpu.DTYPES["float32"], x.ctypes.data, w.ctypes.data, 0.0, y.ctypes.data, rstd.ctypes.data,
    4096, 64, 3,
)
print(cpu.parallel_backend(), (y == 3).all(), "torch" in sys.modules)
"""
    assert numpy is not None
    result = run_python(code, cwd=tmp_path)
    assert result.stdout.split() == ["std::thread", "True", "False"], result.stderr


def package_without_extension(folder: Path) -> None:
    (folder / "pyllm").mkdir()
    for name in ("__init__.py", "_native.py"):
        shutil.copy(ROOT / "pyllm" / name, folder / "pyllm" / name)


@pytest.mark.parametrize(
    ("failure", "reason"), [(None, "it was never built here"), ("c++ gone", "it did not build")]
)
def test_a_missing_extension_warns_once(tmp_path: Path, failure: str | None, reason: str) -> None:
    package_without_extension(tmp_path)
    if failure is not None:
        (tmp_path / "pyllm" / "_build_failure.txt").write_text(failure, encoding="utf-8")
    code = """
import pyllm
from pyllm._native import build_output, cpu_extension, warn_if_missing
warn_if_missing()
print(cpu_extension(), cpu_extension(), build_output())
"""
    # -S keeps the installed pyllm, which has its extension, out of sight.
    result = run_python(code, "-S", "-W", "always", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert result.stdout.split(maxsplit=2) == ["None", "None", f"{failure}\n"], result.stderr
    assert result.stderr.count("pyllm runs without its C++ kernels") == 1
    assert reason in result.stderr
    assert "pip install -e ." in result.stderr


def test_the_build_survives_without_a_compiler(tmp_path: Path) -> None:
    pytest.importorskip("pybind11")
    pytest.importorskip("setuptools")
    if shutil.which("cmake") is None or shutil.which("ninja") is None:
        pytest.skip("cmake and ninja are not on PATH")
    for name in ("setup.py", "CMakeLists.txt", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    package_without_extension(tmp_path)
    (tmp_path / "triton_kernels").mkdir()
    (tmp_path / "triton_kernels" / "__init__.py").touch()
    command = ["setup.py", "-q", "build_ext", "--build-lib", "out", "--build-temp", "temp"]
    result = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "CXX": "/nonexistent"},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert not list((tmp_path / "out" / "pyllm").glob("_cpu*"))
    reason = (tmp_path / "out" / "pyllm" / "_build_failure.txt").read_text(encoding="utf-8")
    assert "/nonexistent" in reason


FAKES = {
    "nvcc": "exit 1",
    "nvidia-smi": "echo 8.6; echo 5.2; echo 8.6",
    # Says what it was asked for, and builds nothing.
    "cmake": 'echo "asked: $*"; exit 1',
}


@pytest.mark.parametrize(
    ("programs", "environment", "architectures"),
    [
        (("nvcc", "nvidia-smi"), {}, "86-real"),
        (("nvcc", "nvidia-smi"), {"PYLLM_CUDA": "0"}, None),
        (("nvcc", "nvidia-smi"), {"PYLLM_CUDA_ARCHS": "75,86"}, "75;86"),
        (("nvcc", "nvidia-smi"), {"PYLLM_CUDA": "1"}, "75-real;80-real;86-real;90"),
        (("nvcc",), {}, None),
        (("nvcc",), {"PYLLM_CUDA": "1", "PYLLM_CUDA_ARCHS": "75"}, "75"),
        (("nvidia-smi",), {}, None),
        (("nvidia-smi",), {"PYLLM_CUDA": "1"}, "nvcc was not found"),
    ],
    ids=str,
)
def test_when_the_cuda_kernels_are_built(
    tmp_path: Path, programs: tuple[str, ...], environment: dict[str, str], architectures: str
) -> None:
    """And whatever comes of it, the install succeeds and the reason is kept."""
    pytest.importorskip("pybind11")
    pytest.importorskip("setuptools")
    if sys.platform == "win32":
        pytest.skip("the fakes are shell scripts")
    if "nvcc" not in programs and Path("/usr/local/cuda/bin/nvcc").exists():
        pytest.skip("there is an nvcc that is found without PATH")
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    package_without_extension(tmp_path)
    (tmp_path / "triton_kernels").mkdir()
    (tmp_path / "triton_kernels" / "__init__.py").touch()
    (tmp_path / "bin").mkdir()
    for name in (*programs, "cmake"):
        fake = tmp_path / "bin" / name
        fake.write_text(f"#!/bin/sh\n{FAKES[name]}\n", encoding="utf-8")
        fake.chmod(0o755)
    command = ["setup.py", "-q", "build_ext", "--build-lib", "out", "--build-temp", "temp"]
    mine = ("PYLLM_CUDA", "CUDA", "PATH")
    others = {name: value for name, value in os.environ.items() if not name.startswith(mine)}
    result = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**others, "PATH": f"{tmp_path / 'bin'}:/bin", **environment},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    failures = tmp_path / "out" / "pyllm"
    assert "asked: --fresh" in (failures / "_build_failure.txt").read_text(encoding="utf-8")
    failure = failures / "_cuda_build_failure.txt"
    if architectures is None:
        assert not failure.exists()
    elif "nvcc" in programs:
        asked = failure.read_text(encoding="utf-8")
        assert f"-DPYLLM_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES={architectures} " in asked
    else:
        assert architectures in failure.read_text(encoding="utf-8")


def test_another_cuda_build_that_does_not_load_is_an_error() -> None:
    code = "from pyllm._native import cuda_extension; cuda_extension()"
    result = run_python(code, PYLLM_CUDA_EXTENSION="/nowhere/_cuda.so")
    assert result.returncode != 0
    last_line = result.stderr.splitlines()[-1]
    assert "PYLLM_CUDA_EXTENSION='/nowhere/_cuda.so' does not load as pyllm._cuda" in last_line


def test_triton_kernels_is_no_top_level_name(tmp_path: Path) -> None:
    """Another project on the package index owns it; ours is pyllm.triton_kernels."""
    code = """
from importlib.util import find_spec
top = find_spec("triton_kernels")
print(find_spec("pyllm.triton_kernels") is not None, top and top.submodule_search_locations)
"""
    result = run_python(code, cwd=tmp_path)
    inside, top_level = result.stdout.split(maxsplit=1)
    assert inside == "True", "pyllm is not installed: pip install -e '.[test]'"
    assert str(ROOT) not in top_level


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="several instruction sets: x86-64 only")
@pytest.mark.parametrize(
    ("isa", "source"),
    [("avx512", source) for source in KERNEL_SOURCES] + [("amx", source) for source in AMX_SOURCES],
    ids=lambda value: value.stem if isinstance(value, Path) else value,
)
def test_instruction_sets_share_no_code(isa: str, source: Path, tmp_path: Path) -> None:
    """No weak symbol in a kernel's object: the linker keeps one copy of those, of any set."""
    compiler, nm = shutil.which("c++"), shutil.which("nm")
    if compiler is None or nm is None:
        pytest.skip("c++ and nm are not on PATH")
    target = tmp_path / "kernel.o"
    definitions = ["-DPYLLM_X86_ISAS", "-DPYLLM_AMX", f"-DPYLLM_ISA={isa}", "-DNDEBUG"]
    sets = AMX_FLAGS if isa == "amx" else AVX512_FLAGS
    flags = ["-std=c++17", "-O3", "-fPIC", "-fopenmp-simd", *sets, *definitions]
    subprocess.run(
        [compiler, *flags, f"-I{ROOT / 'csrc'}", "-c", str(source), "-o", str(target)], check=True
    )
    symbols = subprocess.run([nm, "-C", str(target)], capture_output=True, text=True, check=True)
    shared = [line for line in symbols.stdout.splitlines() if line[17:18] in "VWuvw"]
    assert not shared, "\n".join(shared)
    assert any(f" T pyllm::{isa}::" in line for line in symbols.stdout.splitlines())


CROSS_COMPILERS = ("aarch64-linux-gnu-g++", "aarch64-linux-gnu-g++-12", "aarch64-linux-gnu-g++-14")


@pytest.mark.slow
@pytest.mark.parametrize("source", KERNEL_SOURCES, ids=lambda path: path.stem)
def test_kernels_compile_for_arm64(source: Path, tmp_path: Path) -> None:
    """The baseline is plain C++: no header of x86, and no warning elsewhere, either."""
    compiler = next(filter(None, map(shutil.which, CROSS_COMPILERS)), None)
    if compiler is None:
        pytest.skip("no compiler for arm64 on PATH: apt install g++-aarch64-linux-gnu")
    flags = ["-std=c++17", "-O3", "-fPIC", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"]
    strict = ["-Wall", "-Wextra", "-Werror", "-DPYLLM_ISA=baseline", f"-I{ROOT / 'csrc'}"]
    target = tmp_path / "kernel.o"
    result = subprocess.run(
        [compiler, *flags, *strict, "-c", str(source), "-o", str(target)],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert target.read_bytes()[18:20] == b"\xb7\x00"  # e_machine of ELF: EM_AARCH64


@pytest.mark.slow
def test_an_arm64_build_runs_on_an_emulator(tmp_path: Path) -> None:
    """int8_linear and rms_norm on whole numbers, whose sums any processor gets right."""
    compiler = next(filter(None, map(shutil.which, CROSS_COMPILERS)), None)
    emulator = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if compiler is None or emulator is None:
        pytest.skip("no compiler for arm64, or no qemu-aarch64 (apt install qemu-user), on PATH")
    main = tmp_path / "main.cpp"
    main.write_text(ARM64_PROGRAM, encoding="utf-8")
    names = ("int8_linear", "rms_norm", "parallel")
    sources = [str(ROOT / "csrc" / "cpu" / f"{name}.cpp") for name in names]
    flags = ["-std=c++17", "-O3", "-fopenmp-simd", "-DPYLLM_ISA=baseline", f"-I{ROOT / 'csrc'}"]
    program = str(tmp_path / "main")
    command = [compiler, *flags, "-static", str(main), *sources, "-ldl", "-o", program]
    subprocess.run(command, check=True, capture_output=True)
    result = subprocess.run([emulator, program], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "equal\n"), result.stderr


ARM64_PROGRAM = """
#include <cmath>
#include <cstdio>
#include <vector>
#include "cpu/kernels.h"
int main() {
  const int rows = 7, width = 130, features = 9;
  std::vector<float> x(rows * width), scale(features, 0.5f), y(rows * features), r(rows);
  std::vector<signed char> weight(features * width);
  for (int i = 0; i < rows * width; ++i) x[i] = i % width == 0 ? 127 : (i * 37) % 255 - 127;
  for (int i = 0; i < features * width; ++i) weight[i] = (i * 91) % 256 - 128;
  bool equal = true;
  pyllm::baseline::int8_linear(pyllm::DType::float32, true, x.data(), weight.data(), scale.data(),
                               y.data(), rows, features, width, 1);
  for (int n = 0; n < rows; ++n) {
    for (int f = 0; f < features; ++f) {
      int sum = 0;
      for (int d = 0; d < width; ++d) sum += int(x[n * width + d]) * weight[f * width + d];
      equal = equal && y[n * features + f] == 0.5f * sum;
    }
  }
  std::vector<float> ones(width, 1), normed(rows * width);
  pyllm::baseline::rms_norm_forward(pyllm::DType::float32, x.data(), ones.data(), 0.0,
                                    normed.data(), r.data(), rows, width, 1);
  for (int n = 0; n < rows; ++n) {
    double mean = 0;
    for (int d = 0; d < width; ++d) mean += double(x[n * width + d]) * x[n * width + d] / width;
    for (int d = 0; d < width; ++d) {
      const double expected = x[n * width + d] / std::sqrt(mean);
      equal = equal && std::fabs(normed[n * width + d] - expected) < 1e-5;
    }
  }
  std::puts(equal ? "equal" : "different");
}
"""
