"""Spoils the C++ kernels, one place at a time: python scripts/mutate_kernels.py moe_ffn.

A mutant is seen when the check of some case fails, the process dies, or 60 seconds pass. Those
that live are printed, for a reader to judge: some cannot be seen from outside (a larger buffer),
the rest are holes in the tests. Seconds for each mutant; needs g++ and fork.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from pyllm._checks import check_choice
from pyllm._cli import require_writable_file, run

ROOT = Path(__file__).resolve().parent.parent
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"]
FLAGS += ["-fvisibility=hidden", "-DPYLLM_ISA=baseline", "-Icsrc"]
SECONDS = 60
# Which operations run through a source file; those not named here have a file of their own.
USERS = {
    "moe_dispatch": ("moe_dispatch", "moe_ffn"),
    "moe_combine": ("moe_combine", "moe_dispatch", "moe_ffn"),
}
KILLED, ALIVE, NO_COMPILE = "killed", "alive", "does not compile"


def compile_objects(folder: Path, includes: list[str]) -> dict[str, Path]:
    """Every source of the extension, for the baseline instruction set."""
    objects = {}
    for source in [ROOT / "csrc/bindings_cpu.cpp", *sorted((ROOT / "csrc/cpu").glob("*.cpp"))]:
        objects[source.stem] = folder / f"{source.stem}.o"
        compile_one(source, objects[source.stem], includes)
    return objects


def compile_one(source: Path, target: Path, includes: list[str]) -> None:
    """One source to one object; CalledProcessError where the compiler refuses it."""
    command = ["g++", *FLAGS, *includes, "-c", str(source), "-o", str(target)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)


def link(objects: list[Path], target: Path) -> None:
    """The objects to an extension module."""
    command = ["g++", "-shared", *map(str, objects), "-o", str(target), "-ldl", "-lpthread"]
    subprocess.run(command, check=True, capture_output=True)


def verdict(check: Callable[[], bool]) -> str:
    """Run ``check`` in a forked process: it may crash or hang."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what a dying process says
            code = 0 if check() else 1
        finally:
            os._exit(code)
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return ALIVE if status == 0 else KILLED
        time.sleep(0.005)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return KILLED


def use_extension(path: Path) -> None:
    """Make ``path`` the process's ``pyllm._cpu``; nothing may have imported another before."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("pyllm._cpu", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["pyllm._cpu"] = module


def passes(operations: tuple[str, ...]) -> bool:
    """Whether all cases of the operations pass on the extension and launchers as they are now."""
    import importlib

    import torch

    from pyllm import ops
    from pyllm.testing import OPERATIONS, check_door
    from pyllm.testing.check import survives
    from pyllm.testing.layouts import LAYOUTS
    from pyllm.testing.suite import DTYPES

    chosen = [OPERATIONS[name] for name in operations]
    faces = [importlib.import_module(f"pyllm.cpu_kernels.{name}") for name in operations]
    torch.set_num_threads(1)
    for operation, face in zip(chosen, faces, strict=True):
        if not survives(face, operation.smoke_cases, DTYPES):
            return False
    for operation in chosen:
        door = getattr(ops, operation.name)
        for case in operation.smoke_cases:
            for change in LAYOUTS.values():
                check_door(case, door, "cpu", torch.float32, change=change)
    for operation, face in zip(chosen, faces, strict=True):
        if not survives(face, operation.hostile_cases, DTYPES[:2]):
            return False
    torch.set_num_threads(3)  # several ranges of rows: the large cases once more
    return all(
        survives(face, [operation.case(sizes) for sizes in operation.extra], DTYPES[:1])
        for operation, face in zip(chosen, faces, strict=True)
    )


def mutate(
    operation: str, objects: dict[str, Path], includes: list[str], folder: Path
) -> dict[str, str]:
    """Name to verdict of every mutant of one operation's kernel and launcher."""
    import importlib

    from pyllm.testing.kernel_mutants import kernel_mutants
    from pyllm.testing.source_mutants import source_mutants

    source = ROOT / f"csrc/cpu/{operation}.cpp"
    users = USERS.get(operation, (operation,))
    spoilt, library = folder / f"{operation}.spoilt.cpp", folder / "_cpu.so"
    others = [path for name, path in objects.items() if name != operation]
    verdicts = {}

    def check_kernel() -> bool:
        use_extension(library)
        return passes(users)

    for mutant in kernel_mutants(source.name, source.read_text(encoding="utf-8")):
        spoilt.write_text(mutant.source, encoding="utf-8")
        try:
            compile_one(spoilt, spoilt.with_suffix(".o"), includes)
        except subprocess.CalledProcessError:
            verdicts[mutant.name] = NO_COMPILE
            continue
        link([*others, spoilt.with_suffix(".o")], library)
        verdicts[mutant.name] = verdict(check_kernel)
        if verdicts[mutant.name] == ALIVE:
            print(f"   alive: {mutant.name}", flush=True)

    link(list(objects.values()), library)
    launcher = importlib.import_module(f"pyllm.cpu_kernels.{operation}")

    for python_mutant in source_mutants(launcher):

        def check_launcher(python_mutant=python_mutant) -> bool:  # type: ignore[no-untyped-def]
            use_extension(library)
            vars(launcher).update(vars(python_mutant.module(launcher)))
            return passes((operation,))

        name = f"{operation}.py: {python_mutant.name}"
        verdicts[name] = verdict(check_launcher)
        if verdicts[name] == ALIVE:
            print(f"   alive: {name}", flush=True)
    return verdicts


@dataclass
class Config:
    """Spoil each place of the C++ kernels and their launchers in turn; the tests must see it."""

    operations: Positional[tuple[str, ...]] = ("rope",)
    """Operations to take, such as moe_ffn."""
    out: str | None = None
    """Write the verdicts there, as JSON."""

    def __post_init__(self) -> None:
        known = tuple(
            sorted(path.stem for path in (ROOT / "pyllm" / "reference").glob("[a-z]*.py"))
        )
        for operation in self.operations:
            check_choice("operation", operation, known)


def main(config: Config) -> None:
    """Print what lives, and the counts.

    Raises:
        ValueError: the machine cannot do it, or nothing can be written to ``out``.
    """
    out = Path(config.out) if config.out else None
    if out:
        require_writable_file("--out", out)
    if shutil.which("g++") is None or not hasattr(os, "fork"):
        raise ValueError("g++ and fork are needed; on Debian: sudo apt install g++")
    import pybind11

    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    results: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as place:
        objects = compile_objects(Path(place), includes)
        for operation in config.operations:
            start = time.perf_counter()
            found = mutate(operation, objects, includes, Path(place))
            results |= found
            counts = {kind: list(found.values()).count(kind) for kind in (KILLED, ALIVE)}
            seconds = time.perf_counter() - start
            print(f"{operation}: {counts} in {seconds:.0f} s", flush=True)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    run(main, Config)
