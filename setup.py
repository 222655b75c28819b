"""Builds ``pyllm._cpu`` with CMake. Everything else about the package is in pyproject.toml.

A machine without a working C++ compiler still gets a working install: the build writes what went
wrong to ``pyllm/_build_failure.txt``, and the first ``import pyllm`` warns with it.
"""

import os
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
FAILURE_FILE = "_build_failure.txt"
FAILURE_LINES = 15


class CMakeBuild(build_ext):
    """One CMake project makes the extension; a failure is recorded, not raised."""

    def run(self) -> None:
        in_place = self.inplace  # the base class resets it while it builds
        super().run()
        extension = self.extensions[0]
        built = Path(self.build_lib) / self.get_ext_filename(extension.name)
        if in_place:
            self._sync_to_sources(built)

    def build_extension(self, extension: Extension) -> None:
        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        failure_file = target.parent / FAILURE_FILE
        failure_file.unlink(missing_ok=True)
        try:
            self._run_cmake(target)
        except (OSError, subprocess.CalledProcessError) as error:
            output = getattr(error, "output", None) or str(error)
            lines = [line for line in output.splitlines() if line.strip()]
            failure_file.write_text("\n".join(lines[:FAILURE_LINES]) + "\n", encoding="utf-8")
            # `optional` makes setuptools print this as a warning and go on.
            raise CompileError(f"pyllm._cpu was not built:\n{output}") from error

    def _run_cmake(self, target: Path) -> None:
        build = Path(self.build_temp).resolve()
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
        ]
        for command in (configure, ["cmake", "--build", str(build)]):
            result = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            print(result.stdout, flush=True)
            result.check_returncode()  # CalledProcessError carries the output
        if not target.exists():
            raise FileNotFoundError(f"CMake finished but {target.name} is not there")

    def _sync_to_sources(self, built: Path) -> None:
        """After an editable install the checkout shows this build's outcome, not an older one's."""
        package = ROOT / "pyllm"
        failure_file = built.parent / FAILURE_FILE
        if failure_file.exists():
            (package / built.name).unlink(missing_ok=True)
            (package / FAILURE_FILE).write_bytes(failure_file.read_bytes())
        else:
            (package / FAILURE_FILE).unlink(missing_ok=True)


setup(
    # `triton_kernels` is another project's name on the package index, so that folder is installed
    # inside this package (see package-dir in pyproject.toml).
    packages=[*find_packages(include=["pyllm", "pyllm.*"]), "pyllm.triton_kernels"],
    ext_modules=[Extension("pyllm._cpu", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
)
