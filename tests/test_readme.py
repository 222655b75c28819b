"""README says what is true: its figures are those of the results, its paths exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_figures_are_those_of_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    readme = __import__("readme")
    sys.modules.pop("readme")
    assert readme.BEGIN in README and readme.END in README
    assert readme.replaced(README) == README, "run: python benchmarks/readme.py"


def test_both_commands_are_marked_for_ci() -> None:
    assert "<!-- ci:main -->\n```bash\n" in README
    assert "<!-- ci:test -->\n```bash\n" in README


def test_every_path_exists() -> None:
    linked = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    scripts = re.findall(r"python ((?:scripts|benchmarks)/\w+\.py)", README)
    assert scripts and linked
    missing = [path for path in {*linked, *scripts} if not (ROOT / path).exists()]
    assert not missing


@pytest.mark.parametrize("command", sorted(set(re.findall(r"`([^`]*python [^`]+)`", README))))
def test_every_command_has_the_flags_it_is_given(command: str) -> None:
    """Each command's flags stand in its --help; what it would do is not done."""
    _, _, words = command.partition("python ")
    script, *flags = words.split()
    text = subprocess.run(
        [sys.executable, str(ROOT / script), "--help"], capture_output=True, text=True, check=True
    ).stdout
    positional = flags[:1] if flags and not flags[0].startswith("--") else []
    for flag in [*positional, *(word for word in flags if word.startswith("--"))]:
        assert flag in text, f"{command}: {flag}"
