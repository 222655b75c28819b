"""Builds the CUDA kernels for the CPU, so that they can be tested where there is no card.

The sources of ``csrc/cuda`` and its bindings are compiled by the C++ compiler after
``tests/cuda_kernels/cuda_on_cpu.h``, into a module that ``PYLLM_CUDA_EXTENSION`` names::

    export PYLLM_CUDA_EXTENSION=$(python -m pyllm.testing.cuda_on_cpu)

With ``--races`` an access to memory that races with another thread's is an exception as well:
``tests/cuda_kernels/cuda_races.cpp`` says how. It takes ten times as long.

Objects are kept in ``build/cuda_on_cpu`` by the hash of what goes into them: after a change only
what it touches is compiled again. Needs the checkout, not the installed package.
"""

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FLAGS = (
    "-std=c++17",
    "-O1",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-strict-aliasing",  # vectors of 16 bytes are loaded from arrays of anything
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",
    "-include",
    "cuda_on_cpu.h",
)
WATCHED = ("-g1", "-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0")
"""Flags of the kernels alone; what they call is in ``cuda_races.cpp``."""
_INCLUDE = re.compile(r'^\s*#include "([^"]+)"', re.MULTILINE)


def compiler() -> str | None:
    """The C++ compiler: ``CXX``, or the system's; None where there is none, or not on Linux."""
    return shutil.which(os.environ.get("CXX") or "c++") if sys.platform == "linux" else None


def build(root: Path = ROOT, races: bool = False) -> Path:
    """The module of the checkout at ``root``, compiled where it is not there yet.

    With ``races``, one that sees races between threads.

    Raises:
        RuntimeError: there is no compiler, or what it printed about the source.
    """
    found = compiler()
    if found is None:
        raise RuntimeError("the CUDA kernels run on the CPU of Linux with a C++ compiler only")
    import pybind11

    sources, header = root / "csrc", root / "tests" / "cuda_kernels" / "cuda_on_cpu.h"
    folder = root / "build" / ("cuda_races" if races else "cuda_on_cpu")
    common = [*FLAGS, "-DPYLLM_CUDA_RACES"] if races else [*FLAGS]
    hosts = [sources / "bindings_cuda.cpp"]
    if races:
        hosts.append(header.parent / "cuda_races.cpp")
    includes = [f"-I{sources}", f"-I{header.parent}"]
    python = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:  # the workers of pytest -n all come here
        fcntl.flock(lock, fcntl.LOCK_EX)
        commands, objects = [], []
        for source in [*sorted((sources / "cuda").glob("*.cu")), *hosts]:
            own = python if source in hosts else WATCHED if races else ()
            flags = [*common, *includes, *own]
            given = hashlib.sha256(" ".join([found, *common, *WATCHED]).encode())
            for path in _with_headers([source, header], (sources, header.parent)):
                given.update(path.read_bytes())
            digest = given.hexdigest()[:16]
            target = folder / f"{source.stem}-{digest}.o"
            objects.append(str(target))
            if not target.exists():
                for stale in folder.glob(f"{source.stem}-*.o"):
                    stale.unlink()
                commands.append([found, *flags, "-x", "c++", "-c", str(source), "-o", str(target)])
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(_run, commands))
        name = hashlib.sha256("".join(objects).encode()).hexdigest()[:16]
        module = folder / f"_cuda-{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
        if not module.exists():
            for stale in folder.glob("_cuda-*"):
                stale.unlink()
            _run([found, "-shared", *objects, "-o", str(module)])
    return module


def _with_headers(sources: list[Path], folders: tuple[Path, ...]) -> list[Path]:
    """The sources and the headers of this project that they include."""
    found: dict[Path, None] = {}
    todo = [*sources]
    while todo:
        path = todo.pop()
        if path not in found:
            found[path] = None
            names = _INCLUDE.findall(path.read_text(encoding="utf-8"))
            paths = [folder / name for name in names for folder in folders]
            todo.extend(path for path in paths if path.exists())
    return list(found)


def _run(command: list[str]) -> None:
    target = Path(command[-1])
    partial = target.with_name(f"partial-{target.name}")  # a kill leaves no half of an object
    result = subprocess.run([*command[:-1], str(partial)], capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr}")
    partial.replace(target)


if __name__ == "__main__":
    print(build(races="--races" in sys.argv[1:]))
