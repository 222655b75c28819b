"""Builds ``pyllm._cpu`` and ``pyllm._cuda`` with CMake. All else is in pyproject.toml.

A machine without a working C++ compiler still gets a working install: the build writes what went
wrong to ``pyllm/_build_failure.txt``, and the first ``import pyllm`` warns with it.

``pyllm._cuda`` is built where there are nvcc and a card, or where ``PYLLM_CUDA=1`` says so (``0``
forbids it), for the architectures in ``PYLLM_CUDA_ARCHS`` ("75,86"). Where that fails, what went
wrong is in ``pyllm/_cuda_build_failure.txt``, which ``python -m pyllm.doctor`` shows.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
FAILURE_FILES = {
    "pyllm._cpu": "_build_failure.txt",
    "pyllm._cuda": "_cuda_build_failure.txt",
}
FAILURE_LINES = 15
ALL_ARCHITECTURES = "75-real;80-real;86-real;90"
"""The last one as PTX, too, which later cards compile for themselves."""
OLDEST = 75


def nvcc() -> str | None:
    """The CUDA compiler; None where there is none."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    places = [os.environ.get("CUDACXX"), "nvcc"]
    places += [f"{home}/bin/nvcc" for home in [*homes, "/usr/local/cuda"] if home]
    return next((found for place in places if place and (found := shutil.which(place))), None)


def cards() -> list[str]:
    """The architectures of the cards here that the kernels can run on, such as ``86-real``."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        result = subprocess.run(query, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    found = {line.strip().replace(".", "") for line in result.stdout.splitlines()}
    fitting = sorted(int(name) for name in found if name.isdigit() and int(name) >= OLDEST)
    return [f"{name}-real" for name in fitting] if result.returncode == 0 else []


def cuda_architectures() -> str | None:
    """What to build ``pyllm._cuda`` for, as CMake wants it; None: not at all."""
    wish = os.environ.get("PYLLM_CUDA", "")
    if wish not in ("", "0", "1"):
        print(f"PYLLM_CUDA={wish!r} is ignored; expected 0 or 1")
    if wish == "0":
        return None
    own = cards() if wish != "1" and nvcc() is not None else []
    if wish != "1" and not own:
        return None
    asked = os.environ.get("PYLLM_CUDA_ARCHS", "").replace(",", ";")
    return asked or ";".join(own) or ALL_ARCHITECTURES


class CMakeBuild(build_ext):
    """One CMake project makes the extensions; a failure is recorded, not raised."""

    def run(self) -> None:
        in_place = self.inplace  # the base class resets it while it builds
        super().run()
        if in_place:
            for name in FAILURE_FILES:
                self._sync_to_sources(name)

    def build_extension(self, extension: Extension) -> None:
        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        failure_file = target.parent / FAILURE_FILES[extension.name]
        failure_file.unlink(missing_ok=True)
        try:
            self._run_cmake(extension.name, target)
        except (OSError, subprocess.CalledProcessError) as error:
            output = getattr(error, "output", None) or str(error)
            lines = [line for line in output.splitlines() if line.strip()]
            failure_file.write_text("\n".join(lines[:FAILURE_LINES]) + "\n", encoding="utf-8")
            # `optional` makes setuptools print this as a warning and go on.
            raise CompileError(f"{extension.name} was not built:\n{output}") from error

    def _run_cmake(self, name: str, target: Path) -> None:
        build = Path(self.build_temp).resolve()
        options = []
        if name == "pyllm._cuda":
            build /= "cuda"
            options = ["-DPYLLM_CUDA=ON", f"-DCMAKE_CUDA_ARCHITECTURES={ARCHITECTURES}"]
            compiler = nvcc()
            if compiler is None:
                raise FileNotFoundError("nvcc was not found on PATH, in CUDA_HOME or CUDACXX")
            options.append(f"-DCMAKE_CUDA_COMPILER={compiler}")
        build.mkdir(parents=True, exist_ok=True)
        library = target.parent if os.name != "nt" else f"$<1:{target.parent}>"
        configure = [
            "cmake",
            "--fresh",  # an isolated build's own cmake and ninja move with every install
            "-S",
            str(ROOT),
            "-B",
            str(build),
            "-G",
            "Ninja",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={library}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            *options,
        ]
        for command in (configure, ["cmake", "--build", str(build)]):
            result = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            print(result.stdout, flush=True)
            result.check_returncode()  # CalledProcessError carries the output
        if not target.exists():
            raise FileNotFoundError(f"CMake finished but {target.name} is not there")

    def _sync_to_sources(self, name: str) -> None:
        """After an editable install the checkout shows this build's outcome, not an older one's."""
        built = Path(self.build_lib) / self.get_ext_filename(name)
        package, failure_file = ROOT / "pyllm", built.parent / FAILURE_FILES[name]
        wanted = any(extension.name == name for extension in self.extensions)
        if not wanted or failure_file.exists():
            (package / built.name).unlink(missing_ok=True)
        if wanted and failure_file.exists():
            (package / FAILURE_FILES[name]).write_bytes(failure_file.read_bytes())
        else:
            (package / FAILURE_FILES[name]).unlink(missing_ok=True)


ARCHITECTURES = cuda_architectures()
NAMES = ["pyllm._cpu"] + ["pyllm._cuda"] * (ARCHITECTURES is not None)

setup(
    # `triton_kernels` is another project's name on the package index, so that folder is installed
    # inside this package (see package-dir in pyproject.toml).
    packages=[*find_packages(include=["pyllm", "pyllm.*"]), "pyllm.triton_kernels"],
    ext_modules=[Extension(name, sources=[], optional=True) for name in NAMES],
    cmdclass={"build_ext": CMakeBuild},
)
