"""Fixtures and rules for all tests."""

import faulthandler
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

import pytest
from hypothesis import HealthCheck, settings

from pyllm._cli import ENVIRONMENT

os.environ.update({**ENVIRONMENT, **os.environ})

import torch

from pyllm._native import cpu_extension

ROOT = Path(__file__).resolve().parent.parent

# Without a card the CUDA kernels are compiled for the CPU: a minute the first time.
if not torch.cuda.is_available() and "PYLLM_CUDA_EXTENSION" not in os.environ:
    from pyllm.testing import cuda_on_cpu

    if cuda_on_cpu.compiler() is not None:
        os.environ["PYLLM_CUDA_EXTENSION"] = str(cuda_on_cpu.build(ROOT))

# Triton reads this when it is first imported: without a card its kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


ISAS = cpu_extension().supported_isas() if cpu_extension() is not None else []

_TERMINAL = pytest.StashKey[TextIO]()
_VERDICTS = pytest.StashKey[dict[tuple[str, str], bool]]()
_LEFT_OUT = pytest.StashKey[dict[str, int]]()
HANG_SECONDS = 10
"""One generated input may take this long; then the whole test run is stopped with a traceback."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fuzz",
        type=int,
        default=100,
        metavar="N",
        help="inputs that hypothesis generates for each property (default 100)",
    )
    parser.addoption(
        "--all-cards",
        action="store_true",
        help="compile GPU kernels for every card in every dtype, not each of them once",
    )
    parser.addoption(
        "--every",
        type=int,
        default=1,
        metavar="N",
        help="of the cases of each test only the first of every N (default 1: all)",
    )
    parser.addoption(
        "--gpu-minutes",
        type=float,
        default=10,
        metavar="N",
        help="what the tests of tests/test_gpu.py may take in all (default 10)",
    )


def pytest_configure(config: pytest.Config) -> None:
    """The same inputs every time, unless --hypothesis-seed gives another start."""
    settings.register_profile(
        "pyllm",
        max_examples=config.getoption("--fuzz"),
        deadline=timedelta(seconds=HANG_SECONDS),
        derandomize=config.getoption("--hypothesis-seed", None) is None,
        database=None,
        print_blob=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )
    settings.load_profile("pyllm")
    # In the background of a shell Ctrl-C is ignored, which the programs that tests start inherit.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # Now, while pytest does not capture: what is written at the end of a hanging run must be seen.
    config.stash[_TERMINAL] = os.fdopen(os.dup(sys.__stderr__.fileno()), "w")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """`pytest -m gpu` on a large machine runs in several processes: Triton compiles some hundred
    kernels, each on one core, and for ten minutes that are too many."""
    untold = getattr(config.option, "numprocesses", 0) is None and not config.option.usepdb
    if "PYTEST_XDIST_WORKER" in os.environ:  # which is one of the several, and told nothing either
        return
    if untold and config.option.markexpr == "gpu" and torch.cuda.is_available():
        config.option.numprocesses = gpu_workers(
            torch.cuda.get_device_properties(0).total_memory, os.cpu_count() or 1
        )


def gpu_workers(memory: int, cores: int) -> int:
    """Processes that a card and a machine have room for; 0 for this one alone. A process takes up
    to 4 GiB of the card, its context included."""
    workers = min(memory // 2**33, cores // 2, 8)
    return workers if workers > 1 else 0


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """`pytest -m gpu` reads only files that hold such tests: to find those among all takes half a
    minute in each process, and other files need libraries that a machine with a card may lack."""
    if config.option.markexpr != "gpu":
        return None
    if collection_path.is_dir():
        files = list(collection_path.rglob("test_*.py"))
    elif collection_path.match("test_*.py"):
        files = [collection_path]
    else:
        return None
    return not any("mark.gpu" in file.read_text(encoding="utf-8") for file in files) or None


@pytest.fixture
def watchdog(request: pytest.FixtureRequest) -> Iterator[Callable[[], None]]:
    """Call it at the start of each generated input: one that hangs, even in C++, ends the run.

    The traceback of every thread goes to the terminal. No exception could end a loop in C++.
    """
    terminal = request.config.stash[_TERMINAL]

    def restart() -> None:
        faulthandler.dump_traceback_later(HANG_SECONDS, exit=True, file=terminal)

    yield restart
    faulthandler.cancel_dump_traceback_later()


@pytest.hookimpl(trylast=True)  # of what -k and -m leave
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what is marked `gpu` where there is none, and say so; thin out the cases."""
    if (every := config.getoption("--every")) > 1:
        seen: Counter[str] = Counter()
        kept: tuple[list[pytest.Item], list[pytest.Item]] = [], []
        for item in items:
            test = item.nodeid.partition("[")[0]
            kept[seen[test] % every > 0].append(item)
            seen[test] += 1
        items[:], left_out = kept
        config.hook.pytest_deselected(items=left_out)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(skip)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set in turn."""
    before = cpu_extension().active_isa()
    cpu_extension().set_isa(request.param)
    yield request.param
    cpu_extension().set_isa(before)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real texts: PYLLM_SHARED_DATA, by default ../shared/data beside the repo."""
    folder = Path(os.environ.get("PYLLM_SHARED_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; PYLLM_SHARED_DATA names its folder")
    return folder


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """torch.set_num_threads, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def record_mutant(request: pytest.FixtureRequest) -> Callable[[str, str, bool], None]:
    """Write down whether a planted fault was seen, for the kill rate at the end."""
    verdicts = request.config.stash.setdefault(_VERDICTS, {})

    def record(operation: str, mutant: str, killed: bool) -> None:
        verdicts[operation, mutant] = killed

    return record


@pytest.fixture
def record_left_out(request: pytest.FixtureRequest) -> Callable[[str, int], None]:
    """Write down how many cases a test had no time for; they are told at the end."""
    return request.config.stash.setdefault(_LEFT_OUT, {}).__setitem__


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Under `pytest -n`, a worker hands over what it wrote down."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["left_out"] = session.config.stash.get(_LEFT_OUT, {})
        verdicts = session.config.stash.get(_VERDICTS, {})
        output["verdicts"] = [[*key, killed] for key, killed in verdicts.items()]


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_testnodedown(node: Any) -> None:
    """Under `pytest -n`, what a worker handed over; nothing if it crashed."""
    verdicts = node.config.stash.setdefault(_VERDICTS, {})
    node.config.stash.setdefault(_LEFT_OUT, {}).update(
        getattr(node, "workeroutput", {}).get("left_out", {})
    )
    for operation, mutant, killed in getattr(node, "workeroutput", {}).get("verdicts", ()):
        verdicts[operation, mutant] = killed


NOT_SHOWN_WITHOUT_A_CARD = (
    "Triton's interpreter: races, masked loads without a value (0 here, anything there), TF32",
    "Triton's and nvcc's compilers alone: that the code runs, and what it computes",
    "CUDA C++ on the CPU: contracted products, exp and rsqrt as the card has them, the launch "
    "itself and its streams; without the slow tests, races and addresses outside of a tensor",
    "either: speed, the memory that a card needs, CUDA graphs",
)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if not torch.cuda.is_available():
        terminalreporter.write_line("no card here, so nothing above shows this of GPU kernels:")
        for line in NOT_SHOWN_WITHOUT_A_CARD:
            terminalreporter.write_line(f"  {line}")
    left_out = config.stash.get(_LEFT_OUT, {})
    if left_out:
        told = f"{sum(left_out.values())} cases of {len(left_out)} tests had to be left out"
        minutes = config.getoption("--gpu-minutes")
        terminalreporter.write_line(f"no time, within {minutes:g} minutes: {told}")
        for test, count in left_out.items():
            terminalreporter.write_line(f"  {count} of {test}")
    verdicts = config.stash.get(_VERDICTS, {})
    if not verdicts:
        return
    killed = sum(verdicts.values())
    terminalreporter.write_line(f"mutants killed: {killed} of {len(verdicts)}")
    for (operation, mutant), seen in verdicts.items():
        if not seen:
            terminalreporter.write_line(f"  alive: {operation}: {mutant}", red=True)
