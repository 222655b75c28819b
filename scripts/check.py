"""Every check of the house in one command: python scripts/check.py [--no-tests]."""

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from pyllm._cli import run

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Config:
    """Every check of the house: ruff, clang-format, mypy, pytest."""

    tests: bool = True
    """Run pytest as well."""


def commands(with_tests: bool) -> list[list[str]]:
    """The checks in order, the fast ones first."""
    tools = Path(sys.executable).parent  # those of this environment, whatever PATH says
    sources = sorted(
        str(path.relative_to(ROOT))
        for folder in ("csrc", "tests/cuda_kernels")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in {".cpp", ".h", ".cu", ".cuh"}
    )
    checks = [
        [sys.executable, "-m", "ruff", "check", "."],
        [sys.executable, "-m", "ruff", "format", "--check", "."],
        [str(tools / "clang-format"), "--dry-run", "-Werror", *sources],
        [sys.executable, "-m", "mypy"],
    ]
    if with_tests:
        checks.append([sys.executable, "-m", "pytest"])
    return checks


def main(config: Config) -> int:
    """Run all of them, also after a failure; 0 where all passed, else 1."""
    failed = []
    for command in commands(with_tests=config.tests):
        name = " ".join(part for part in command[:4] if part not in (sys.executable, "-m"))
        print(f"== {name}", flush=True)
        start = time.perf_counter()
        try:
            code = subprocess.run(command, cwd=ROOT).returncode
        except FileNotFoundError:
            print(f"{command[0]} is not installed: pip install -e '.[test]'")
            code = 2
        print(f"   {'ok' if code == 0 else 'FAILED'} in {time.perf_counter() - start:.1f} s")
        if code != 0:
            failed.append(name)
    print("all checks passed" if not failed else f"failed: {'; '.join(failed)}")
    return min(len(failed), 1)


if __name__ == "__main__":
    run(main, Config)
