"""scripts/sanitize.py: what it takes for clean, what it asks for, and which tests it runs.

The sanitizers themselves are shown to work whenever it runs: see pyllm/testing/misuse.py.
"""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pyllm._native import cpu_extension
from pyllm.testing import OPERATIONS
from pyllm.testing.misuse import MISUSES

ROOT = Path(__file__).resolve().parents[2]

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="the sanitizers need Linux")
needs_extension = pytest.mark.skipif(cpu_extension() is None, reason="pyllm._cpu is not built")


@pytest.fixture(scope="module")
def script():
    path = ROOT / "scripts" / "sanitize.py"
    spec = importlib.util.spec_from_file_location("sanitize_script", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_clean(script) -> None:
    assert script.judge(0, "==== 900 passed, 7 deselected in 9.1s ====\n") == (
        "",
        "900 tests passed",
    )


def test_a_test_that_fails_is_named(script) -> None:
    output = "tests/ops/a.py::test_b FAILED\n==== 1 failed, 900 passed in 9s ====\n"
    problem, _ = script.judge(1, output)
    assert problem.endswith(
        "exit code 1: ==== 1 failed, 900 passed in 9s ====; failed: tests/ops/a.py::test_b"
    )


@pytest.mark.parametrize(
    ("code", "last_line", "expected"),
    [
        (99, "", "pytest ended with exit code 99"),
        (-11, "", "pytest ended with exit code -11"),
        (5, "==== 7 deselected in 1s ====", "pytest ended with exit code 5: ==== 7 deselected"),
        (1, "==== 900 passed, 1 error in 9s ====", "pytest ended with exit code 1"),
        (0, "==== 900 skipped in 9s ====", "no test ran"),
    ],
)
def test_not_clean(script, code: int, last_line: str, expected: str) -> None:
    assert script.judge(code, f"...\n{last_line}\n")[0].startswith(expected)


@pytest.mark.parametrize(
    "line",
    [
        "==12==ERROR: AddressSanitizer: heap-buffer-overflow on address 0x1",
        "/csrc/cpu/rope.cpp:48:3: runtime error: signed integer overflow: 1 + 2",
        "WARNING: ThreadSanitizer: data race (pid=1)",
        "FATAL: ThreadSanitizer: unexpected memory mapping 0x1-0x2",
    ],
)
def test_a_report_is_found_whatever_pytest_says(script, line: str) -> None:
    stack = "    #0 in kernel csrc/cpu/rope.cpp:48\n    #1 in _start"
    output = f"a.py::test_b PASSED\na.py::test_c {line}\n{stack}\n= 900 passed in 1s ="
    problem, _ = script.judge(0, output)
    assert problem.splitlines() == [
        "a report, while a.py::test_c ran:",
        f"a.py::test_c {line}",
        "    #0 in kernel csrc/cpu/rope.cpp:48",
        "= 900 passed in 1s =",
    ]


def test_an_unknown_sanitizer(refusal) -> None:
    line = refusal("sanitize", "memory")
    assert all(word in line for word in ("memory", "both", "address", "thread"))


def test_without_a_compiler(refusal, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "need Linux and g++" in refusal("sanitize", "address")


@linux_only
@pytest.mark.parametrize("name", ["asan", "tsan"])
def test_without_the_runtime(
    refusal, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    compiler = tmp_path / "g++"
    compiler.write_text('#!/bin/sh\necho "${1#*=}"\n', encoding="utf-8")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    line = refusal("sanitize", {"asan": "address", "tsan": "thread"}[name])
    assert f"g++ has no lib{name}.so; install" in line


@linux_only
@needs_extension
@pytest.mark.parametrize("sanitizer", MISUSES)
def test_without_a_sanitizer_nothing_is_seen(sanitizer: str) -> None:
    """The proof that comes before each run can fail: here with the installed extension."""
    result = subprocess.run(
        [sys.executable, "-m", "pyllm.testing.misuse", sanitizer], capture_output=True, text=True
    )
    assert result.returncode == 1, result.stderr
    everything = f"MISSED {', '.join(MISUSES[sanitizer])}"
    isas = cpu_extension().supported_isas()
    assert result.stdout.splitlines() == [f"{isa}: {everything}" for isa in isas]


@needs_extension
def test_every_kernel_is_among_the_tests_that_run(script) -> None:
    everything = ["test_face[cpu-", "test_door[", "test_layout[", "test_gradcheck[cpu"]
    for tests, quick, expected in [
        (script.EVERYTHING, False, everything),
        (script.WITHOUT_LIFE_SIZE, True, everything),
        (script.SMOKE, False, ["test_door[", "test_layout[", "test_deterministic[cpu"]),
    ]:
        arguments = [one for one in script.pytest_arguments(tests, quick) if one != "-v"]
        result = subprocess.run(
            [sys.executable, "-m", "pytest", *arguments, "--collect-only", "-q"],
            capture_output=True,
            text=True,
            cwd=ROOT,
        )
        assert result.returncode == 0, result.stdout
        for operation, declared in OPERATIONS.items():
            found = re.findall(rf"^tests/ops/test_{operation}\.py::.*", result.stdout, re.MULTILINE)
            for name in expected:
                if name.startswith("test_gradcheck") and not declared.gradients:
                    continue  # an operation of generation has no backward
                assert any(name in line and "cpu" in line for line in found), (operation, name)
            assert not any("reference-" in line or "triton" in line for line in found)
        assert ("tests/cpu_kernels/" in result.stdout) == (tests != script.SMOKE)
