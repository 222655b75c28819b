"""The house has floors: imports go down, or to the left on one floor. And files stay readable."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAX_LINES = 500
# From the ground up; on one floor, a package may use those to its left.
FLOORS = (
    (
        "_dtypes _native _lazy _checks _memory _durable _flags _cli reference triton_kernels "
        "cpu_kernels cuda_kernels torch_kernels foundations tokenizers testing viz"
    ),
    "ops",
    "layers data",
    "models",
    "compress generate distributed export",
    "evaluate train",
    "posttrain",
    "semantic",
    "__init__ doctor serve",
)
LEVELS = {
    name: (floor, place)
    for floor, names in enumerate(FLOORS)
    for place, name in enumerate(names.split())
}
ROOF = {"scripts", "tests", "benchmarks", "notebooks", "exercises"}
SOURCE_FOLDERS = ("pyllm", "triton_kernels", "csrc", "scripts", "tests", "benchmarks", "exercises")
SOURCE_SUFFIXES = {".py", ".cpp", ".h", ".inc", ".cu", ".cuh"}


def room_of(path: Path) -> str:
    """The package of floor 0 to 8 that a source file is in."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return "triton_kernels" if parts[0] == "triton_kernels" else parts[1]


def module_of(path: Path) -> list[str]:
    """The dotted name a file is imported under, as its parts; a package ends in `__init__`."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return ["pyllm", *parts] if parts[0] == "triton_kernels" else parts


def imported_modules(tree: ast.AST, module: list[str]) -> Iterator[str]:
    """Every module a file imports, wherever the statement stands; relative ones resolved.

    `from pyllm import x` gives `pyllm.x`: the room is what follows the first dot.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module[: len(module) - node.level] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            if name == "pyllm":
                yield from (f"pyllm.{alias.name}" for alias in node.names)
            else:
                yield name


def broken_rules(source: str, path: Path) -> list[str]:
    """What is wrong with the imports of a file that lies at `path`."""
    here = room_of(path)
    broken = []
    for name in imported_modules(ast.parse(source), module_of(path)):
        top, *rest = name.split(".")
        if top in ROOF or top == "triton_kernels":
            broken.append(f"{here} imports {name}, which is no part of the package")
        if here == "foundations" and top == "torch":
            broken.append("foundations is NumPy only, and imports torch")
        if here == "layers" and name.startswith("torch.distributed"):
            broken.append("layers imports torch.distributed; it is handed a Dispatcher instead")
        if top != "pyllm":
            continue
        there = rest[0] if rest and rest[0] in LEVELS else "__init__"
        if there == here:
            continue
        if there == "foundations":
            broken.append(f"{here} imports foundations, which nobody imports")
        if LEVELS[there][0] > LEVELS[here][0]:
            broken.append(f"{here} imports {name}, which is on a higher floor")
        elif LEVELS[there] > LEVELS[here]:
            broken.append(f"{here} imports {name}, which is to its right on the same floor")
    return broken


def package_files() -> list[Path]:
    return sorted(
        path for top in ("pyllm", "triton_kernels") for path in (ROOT / top).rglob("*.py")
    )


def test_every_room_has_a_floor() -> None:
    homeless = {room_of(path) for path in package_files()} - set(LEVELS)
    assert not homeless, f"give them a floor in FLOORS: {sorted(homeless)}"


def test_imports_go_down() -> None:
    broken = [
        f"{path.relative_to(ROOT)}: {rule}"
        for path in package_files()
        for rule in broken_rules(path.read_text(encoding="utf-8"), path)
    ]
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize(
    ("path", "source", "message"),
    [
        ("pyllm/ops/x.py", "from pyllm.layers import MoE", "higher floor"),
        ("pyllm/ops/x.py", "def f():\n    import pyllm.train.loop", "higher floor"),
        ("pyllm/ops/x.py", "from ..models import Transformer", "higher floor"),
        ("pyllm/ops/__init__.py", "from ..models import Transformer", "higher floor"),
        ("pyllm/ops/x.py", "from pyllm import models", "higher floor"),
        ("pyllm/ops/x.py", "from pyllm import __version__", "higher floor"),
        ("pyllm/layers/x.py", "import pyllm.data", "to its right"),
        ("pyllm/layers/x.py", "import torch.distributed as dist", "torch.distributed"),
        ("pyllm/foundations/x.py", "import torch", "NumPy only"),
        ("pyllm/train/x.py", "from pyllm.foundations import moe", "nobody imports"),
        ("pyllm/train/x.py", "from scripts import train_moe", "no part of the package"),
        ("triton_kernels/x.py", "from pyllm.ops import rms_norm", "higher floor"),
        ("triton_kernels/x.py", "import triton_kernels.y", "no part of the package"),
    ],
)
def test_a_forbidden_import_is_found(path: str, source: str, message: str) -> None:
    assert [rule for rule in broken_rules(source, ROOT / path) if message in rule]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("pyllm/ops/x.py", "from pyllm.reference import rms_norm"),
        ("pyllm/ops/x.py", "from . import y\nfrom .y import z\nfrom ..reference import w"),
        ("pyllm/data/x.py", "import pyllm.layers"),
        ("pyllm/doctor.py", "from pyllm import __version__"),
        ("triton_kernels/x.py", "from pyllm.triton_kernels.y import z\nimport triton"),
    ],
)
def test_an_allowed_import_passes(path: str, source: str) -> None:
    assert broken_rules(source, ROOT / path) == []


def test_files_are_short_enough_to_read() -> None:
    sources = [
        path
        for folder in SOURCE_FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.suffix in SOURCE_SUFFIXES and path.is_file()
    ]
    assert sources
    long = {
        str(path.relative_to(ROOT)): lines
        for path in sources
        if (lines := path.read_text(encoding="utf-8").count("\n")) > MAX_LINES
    }
    assert not long, f"over {MAX_LINES} lines: {long}"
