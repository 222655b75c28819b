"""What ends a script, and with which code and words."""

import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from pyllm import _cli
from pyllm._flags import read_flags


@dataclass(frozen=True)
class Inner:
    """A group."""

    size: int = 2

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"Inner: size must be at least 1, got {self.size}")


@dataclass(frozen=True)
class Config:
    """Two groups and a check across them."""

    a: Inner = field(default_factory=Inner)
    b: Inner = field(default_factory=Inner)

    def __post_init__(self) -> None:
        if self.a.size > self.b.size:
            raise ValueError(
                f"a.size must not exceed b.size, as in 'a.size' of x/a.size, got {self.a.size}"
            )


Ending = Callable[[Callable[[Any], object]], tuple[object, str]]


@pytest.fixture
def ending(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Ending:
    """Exit code and stderr of a script with this main."""

    def run(main: Callable[[Any], object]) -> tuple[object, str]:
        monkeypatch.setattr(sys, "argv", ["script"])
        with pytest.raises(SystemExit) as stop:
            _cli.run(main, Config)
        return stop.value.code, capsys.readouterr().err

    return run


def raising(error: BaseException) -> Callable[[Any], object]:
    def main(config: Any) -> None:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("a\n  b"), 2, "error: a b"),
        (ValueError("red \x1b[31m \udce9"), 2, r"error: red \x1b[31m \udce9"),
        (ValueError(), 2, "error: ValueError"),
        (
            PermissionError(13, "Permission denied", "x"),
            2,
            "error: [Errno 13] Permission denied: 'x'",
        ),
        (ConnectionError("the hub is away"), 2, "error: the hub is away"),
        (MemoryError(), 2, "error: memory does not suffice (MemoryError); choose smaller sizes"),
        (
            torch.OutOfMemoryError("CUDA out of memory."),
            2,
            "error: memory does not suffice (CUDA out of memory.); choose smaller sizes",
        ),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_what_a_user_can_cause_is_one_line(
    ending: Ending, error: BaseException, code: int, line: str
) -> None:
    assert ending(raising(error)) == (code, line + "\n")


def test_an_allocation_that_no_machine_can_make(ending: Ending) -> None:
    code, err = ending(lambda config: torch.empty(2**60, dtype=torch.int8))
    assert code == 2 and err.startswith("error: memory does not suffice (") and err.count("\n") == 1


@pytest.mark.parametrize("error", [RuntimeError("shapes"), TypeError("x"), KeyError("x")])
def test_a_bug_of_ours_keeps_its_traceback(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["script"])
    with pytest.raises(type(error)):
        _cli.run(raising(error), Config)


@pytest.mark.parametrize(("result", "code"), [(None, 0), (0, 0), (1, 1), ("text", 0)])
def test_the_number_that_main_returns_is_the_exit_code(
    ending: Ending, result: object, code: int
) -> None:
    assert ending(lambda config: result) == (code, "")


def refusal(*arguments: str) -> str:
    with pytest.raises(ValueError, match=".") as error:
        read_flags(Config, arguments)
    return str(error.value)


def test_what_a_config_refuses_is_told_with_the_names_of_the_flags() -> None:
    assert refusal("--b.size", "0") == "--b.size must be at least 1, got 0"
    assert (
        refusal("--a.size=3")
        == "--a.size must not exceed --b.size, as in 'a.size' of x/a.size, got 3"
    )


def test_settings_are_checked_together_and_not_one_by_one() -> None:
    both = Config(Inner(3), Inner(4))
    assert read_flags(Config, ["--a.size", "3", "--b.size", "4"]) == both
    default = Config(Inner(5), Inner(6))
    assert read_flags(Config, ["--a.size", "3", "--b.size", "4"], default=default) == both
    assert read_flags(Config, [], default=default) == default


@pytest.mark.parametrize("columns", [None, "40"])
def test_the_width_of_the_terminal_is_as_before(
    columns: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns:
        monkeypatch.setenv("COLUMNS", columns)
    name = "a-flag,of-many-words" * 4
    assert re.match(
        f"Unrecognized options: --{name}; Perhaps you meant: --[a-z.]+;", refusal(f"--{name}")
    )
    assert os.environ.get("COLUMNS") == columns


@pytest.mark.parametrize(
    "box",
    [
        "\n".join(("╭─ Sorry ──╮", "│ bad │", "│ flag │", "╰───╯")),
        "Sorry\n  bad\n\n  flag",
        f"Sorry\n{'-' * 40}\nbad flag\n",
    ],
)
def test_another_layout_of_tyro_is_one_line_all_the_same(
    box: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(*arguments: object, **options: object) -> None:
        sys.stderr.write(box)
        raise SystemExit(2)

    monkeypatch.setattr("tyro.cli", answer)
    assert refusal("--a.size=3") == "Sorry bad flag; --help lists the flags"


def test_a_folder_that_can_be_written_is_left_as_it_was(tmp_path: Path) -> None:
    _cli.require_writable(tmp_path / "a" / "b")
    _cli.require_writable(tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old").touch()
    _cli.require_writable(tmp_path / "a")
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "old"]


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        ValueError, match=r"cannot write into .*file \(File exists\); name a folder"
    ):
        _cli.require_writable(tmp_path / "file")

    def refuse(dir: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(ValueError, match=r"cannot write into .*a/b \(Permission denied\); name a"):
        _cli.require_writable(tmp_path / "a" / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
