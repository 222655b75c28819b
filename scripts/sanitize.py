"""Builds the C++ kernels with sanitizers and runs their tests: python scripts/sanitize.py."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from pyllm._cli import run

ROOT = Path(__file__).resolve().parent.parent

REPORTED = 99
"""The exit code of a process that a sanitizer ended; pytest has none like it."""

REPORT = re.compile(r"ERROR: AddressSanitizer|ThreadSanitizer: |runtime error: ")
SHOWN_LINES, SHOWN_COLUMNS, SHOWN_NAMES = 20, 160, 10

# What runs no C++ kernel, or starts a Python of its own whose output nobody would see.
EVERYTHING = (
    "not reference and not torch and not triton and not mutant and not compile and not inductor "
    "and not fake and not opcheck and not test_faces"
)
# For ThreadSanitizer, under which they take longest: small cases share their work as well.
WITHOUT_LIFE_SIZE = f"{EVERYTHING} and not test_life_size"
# Every instruction set is compiled from the same lines: the fastest runs all of the tests.
SMOKE = "cpu and (test_door or test_layout or test_deterministic)"


@dataclass
class Config:
    """Memory errors, undefined behaviour and data races in the C++ kernels."""

    sanitizer: Positional[Literal["both", "address", "thread"]] = "both"
    """address (with undefined behaviour), thread, or one after the other."""

    quick: bool = False
    """For CI: one instruction set, and of the cases of each test one of five. Five, so that the
    four dtypes of a shape take turns."""


def main(config: Config) -> int:
    """0 where nothing was reported, else 1.

    Raises:
        ValueError: this machine lacks what the build needs.
    """
    chosen = ("address", "thread") if config.sanitizer == "both" else (config.sanitizer,)
    compiler = find_compiler()
    runtimes = {name: find_runtime(compiler, name) for name in chosen}
    clean = [check(name, compiler, runtime, config.quick) for name, runtime in runtimes.items()]
    return 0 if all(clean) else 1


def check(sanitizer: str, compiler: str, runtime: str, quick: bool) -> bool:
    """Build, show that the planted faults are seen, run the tests; was nothing else reported?"""
    start = time.perf_counter()
    folder = ROOT / "build" / f"sanitize-{sanitizer}"
    # Threads share the work in the same way whatever the instruction set, and the sanitizer follows
    # wide vectors best.
    extension = build(sanitizer, compiler, folder, one_isa=quick or sanitizer == "thread")
    environment = {**os.environ, **settings(extension)}
    say(sanitizer, f"built in {time.perf_counter() - start:.0f} s")

    command = [*launcher(compiler, runtime), sys.executable, "-m"]
    misuse = [*command, "pyllm.testing.misuse", sanitizer]
    output = subprocess.run(misuse, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    print(output.stdout, end="", flush=True)
    if output.returncode != 0:
        say(sanitizer, "it does not see what was planted, so the tests would show nothing")
        return False

    *others, fastest = [line.partition(":")[0] for line in output.stdout.splitlines()]
    everything = WITHOUT_LIFE_SIZE if sanitizer == "thread" else EVERYTHING
    for isa, tests in [(fastest, everything), *((isa, SMOKE) for isa in others)]:
        log = folder / f"tests-{isa}.log"
        with log.open("w", encoding="utf-8") as file:
            code = subprocess.run(
                [*command, "pytest", *pytest_arguments(tests, quick)],
                cwd=ROOT,
                env={**environment, "PYLLM_ISA": isa},
                stdout=file,
                stderr=subprocess.STDOUT,
            ).returncode
        problem, summary = judge(code, log.read_text(encoding="utf-8", errors="replace"))
        say(sanitizer, f"{isa}: {problem or summary}")
        if problem:
            say(sanitizer, f"NOT clean; all of the output: {log.relative_to(ROOT)}")
            return False
    say(sanitizer, f"clean, in {time.perf_counter() - start:.0f} s with the build")
    return True


def pytest_arguments(tests: str, quick: bool) -> list[str]:
    """Only Python's own output is captured: pytest would swallow a report with the rest."""
    plugins = ["-p", "no:faulthandler", "-p", "no:cacheprovider"]
    return [
        "tests/ops",
        "tests/cpu_kernels",
        "-k",
        tests,
        "-v",
        "--capture=sys",
        "--tb=line",
        f"--every={5 if quick else 1}",
    ] + plugins


def judge(code: int, output: str) -> tuple[str, str]:
    """What is wrong ("" for nothing), and the outcome of the tests in a line."""
    last_line = output.rstrip().rpartition("\n")[2]
    passed = int((re.findall(r"(\d+) passed", last_line) or [0])[0])
    summary = f"{passed} tests passed"
    report = REPORT.search(output)
    if report:
        running = re.findall(r"^\S+::\S+", output[: report.start()], re.MULTILINE)
        where = f"while {running[-1]} ran" if running else "before the first test"
        begin = output.rfind("\n", 0, report.start()) + 1
        return "\n".join([f"a report, {where}:", *shortened(output[begin:])]), summary
    if code != 0:
        names = re.findall(r"^(\S+::.*) FAILED", output, re.MULTILINE)
        failed = f"; failed: {'; '.join(names[:SHOWN_NAMES])}" if names else ""
        return f"pytest ended with exit code {code}: {last_line[:SHOWN_COLUMNS]}{failed}", summary
    if not passed:
        return "no test ran", summary
    return "", summary


def shortened(report: str) -> list[str]:
    """The first lines; of the stack, only what is ours."""
    lines = [line for line in report.splitlines() if "csrc/cpu" in line or " #" not in line]
    return [line[:SHOWN_COLUMNS] for line in lines[:SHOWN_LINES]]


def say(sanitizer: str, line: str) -> None:
    """A line of the summary, at once."""
    print(f"{sanitizer}: {line}", flush=True)


def find_compiler() -> str:
    """The path of g++.

    Raises:
        ValueError: not here.
    """
    compiler = shutil.which("g++")
    if compiler is None or sys.platform != "linux":
        raise ValueError(
            f"the sanitizers need Linux and g++, and this is {platform.system()} "
            f"{'without' if compiler is None else 'with'} g++; on Debian and Ubuntu: "
            "sudo apt install g++"
        )
    return compiler


def find_runtime(compiler: str, sanitizer: str) -> str:
    """The path of the library that must be in the process before any other.

    Raises:
        ValueError: the compiler has none.
    """
    name = {"address": "libasan.so", "thread": "libtsan.so"}[sanitizer]
    path = library(compiler, name)
    if not Path(path).is_file():
        raise ValueError(
            f"{compiler} has no {name}; install the sanitizers of its version (Debian and Ubuntu: "
            "with g++; Fedora: libasan libubsan libtsan)"
        )
    return path


def library(compiler: str, name: str) -> str:
    """The path of a library of the compiler; the name alone where it has none."""
    command = [compiler, f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def build(sanitizer: str, compiler: str, folder: Path, one_isa: bool) -> Path:
    """The extension, built by the same CMake project as the installed one, into ``folder``.

    Raises:
        ValueError: the tools are missing, or the build fails.
    """
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    cmake = shutil.which("cmake", path=tools)
    try:
        import pybind11
    except ModuleNotFoundError:
        cmake = None
    if cmake is None or shutil.which("ninja", path=tools) is None:
        raise ValueError("the build needs cmake, ninja and pybind11: pip install -e '.[test]'")
    folder.mkdir(parents=True, exist_ok=True)
    configure = [cmake, "--fresh", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja"]
    configure += [
        f"-DPYLLM_SANITIZE={sanitizer}",
        f"-DPYLLM_ONE_ISA={'ON' if one_isa else 'OFF'}",
        "-DCMAKE_BUILD_TYPE=Debug",
        f"-DCMAKE_CXX_COMPILER={compiler}",
        f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={folder}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    ]
    for command in (configure, [cmake, "--build", str(folder)]):
        result = subprocess.run(
            command,
            env={**os.environ, "PATH": tools},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if result.returncode != 0:
            print(result.stdout, flush=True)
            raise ValueError(f"the {sanitizer} build failed, as the lines above say")
    return folder / f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"


def settings(extension: Path) -> dict[str, str]:
    """Environment variables for a Python whose pyllm has this extension."""
    ended = f"exitcode={REPORTED}:halt_on_error=1"
    return {
        "PYLLM_EXTENSION": str(extension),
        # No CUDA kernels compiled for the CPU: tests/conftest.py does not build them then.
        "PYLLM_CUDA_EXTENSION": "",
        # Python itself never frees what it has made once.
        "ASAN_OPTIONS": f"{ended}:detect_leaks=0",
        "UBSAN_OPTIONS": f"{ended}:print_stacktrace=1",
        "TSAN_OPTIONS": ended,
        # Torch's own threads are not of interest, and what orders them cannot be seen.
        "OMP_NUM_THREADS": "1",
        # So that the name of the test is in the log when the process ends in its middle.
        "PYTHONUNBUFFERED": "1",
    }


def launcher(compiler: str, runtime: str) -> list[str]:
    """What goes before the command, so that the runtime comes into its process first.

    The runtimes keep their notes at fixed addresses, where an address space that is randomised by
    more than 28 bits, as on newer Linux kernels, may have put something else: setarch turns that
    off where it may. It must not have the runtime itself, hence `env`.
    """
    fixed = ["setarch", platform.machine(), "-R"]
    if not shutil.which("setarch") or subprocess.run([*fixed, "true"]).returncode != 0:
        fixed = []
    # Exceptions pass through the runtime, which looks for the C++ library when it starts.
    return [*fixed, "env", f"LD_PRELOAD={runtime} {library(compiler, 'libstdc++.so.6')}"]


if __name__ == "__main__":
    run(main, Config)
