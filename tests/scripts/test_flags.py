"""Every script reads its flags right, or says in one line what is wrong. Nothing is run here."""

import contextlib
import io
import string
import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
from hypothesis import event, given
from hypothesis import strategies as st
from tyro.conf import Positional

from pyllm import _cli

from .conftest import load_script, one_error

SCRIPTS = (
    *("train_moe", "generate", "benchmark", "train_tokenizer", "download_data", "doctor", "check"),
    *("evaluate", "export", "quantize", "plan_memory"),
    *(
        f"benchmarks/{name}"
        for name in ("ops", "balance", "stories", "tokenizer", "gpu", "readme", "llama_cpp_equal")
    ),
    *("benchmarks/moe_vs_dense", "benchmarks/scaling", "benchmarks/decode", "benchmarks/memory"),
    "benchmarks/train_memory",
)
PRESETS = ("moe-tiny", "moe-158m", "dense-21m")
Place = tuple[str, ...]
"""Where a value belongs: the names of the fields that lead to it."""


@dataclass(frozen=True)
class Flag:
    """How a value is written on the command line, where it goes, and what it may be."""

    name: str
    """`--train.max-steps`; empty for a positional one."""
    place: Place
    hint: Any
    required: bool


def flags_of(config_type: Any, prefix: str = "--", place: Place = ()) -> list[Flag]:
    """What flags a config should have: the names of fields, with dots and hyphens."""
    hints = get_type_hints(config_type, include_extras=True)
    found = []
    for field in fields(config_type):
        hint, *marks = (
            get_args(hints[field.name])
            if get_origin(hints[field.name]) is Annotated
            else [hints[field.name]]
        )
        here = (*place, field.name)
        if is_dataclass(hint):
            hidden = any(getattr(mark, "name", None) == "" for mark in marks)
            found += flags_of(hint, prefix if hidden else f"{prefix}{field.name}.", here)
            continue
        name = prefix + field.name.replace("_", "-")
        if get_args(Positional[int])[1] in marks:
            name = ""
        required = field.default is MISSING and field.default_factory is MISSING
        found.append(Flag(name, here, hint, required))
    return found


class Door:
    """A script's flags with `main` left out."""

    def __init__(self, name: str) -> None:
        module = load_script(name)
        self.name = name
        self.config_type = module.Config if hasattr(module, "Config") else module.RunConfig
        self.defaults: Callable[[list[str]], Any] | None = getattr(module, "defaults", None)
        self.flags = flags_of(self.config_type)

    def answer(self, arguments: list[str]) -> tuple[int, Any, str, str]:
        """Exit code, what main was given (None: not called), stdout, stderr."""
        got = []
        out, err, before = io.StringIO(), io.StringIO(), sys.argv
        sys.argv = [self.name, *arguments]
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                _cli.run(lambda config: got.append(config), self.config_type, self.defaults)
        except SystemExit as stop:
            assert isinstance(stop.code, int)
            return stop.code, got[0] if got else None, out.getvalue(), err.getvalue()
        finally:
            sys.argv = before

    def config(self, values: Mapping[Place, Any]) -> Any:
        """What these settings mean, put together without a command line."""
        if self.defaults is None:
            return self.config_type(**{place[0]: value for place, value in values.items()})
        if ("resume",) in values and len(values) > 1:
            raise ValueError("a run goes on with its own settings")
        named = [f"--preset={values[('preset',)]}"] if ("preset",) in values else []
        return changed(self.defaults(named), values)


DOORS = {name: Door(name) for name in SCRIPTS}


def changed(config: Any, values: Mapping[Place, Any]) -> Any:
    """`config` with the values in their places; each group is checked once, with all of its own."""
    changes = {}
    for group in {place[0] for place in values}:
        inside = {place[1:]: value for place, value in values.items() if place[0] == group}
        old = getattr(config, group)
        changes[group] = changed(old, inside) if is_dataclass(old) else inside[()]
    return replace(config, **changes)


def at(config: Any, place: Place) -> Any:
    for name in place:
        config = getattr(config, name)
    return config


WORDS = st.text(string.ascii_letters + string.digits + " ._-/é🦊\t\n\x1b", min_size=1, max_size=8)
NUMBERS = st.one_of(
    st.integers(-2, 12), st.sampled_from([64, 256, 320, 512, 4096, 2**31, 2**63, -(10**30)])
)


def values(hint: Any) -> st.SearchStrategy[tuple[str, Any]]:
    """A text on the command line, and the value it means."""
    if hint is int:
        return NUMBERS.map(lambda n: (str(n), n))
    if hint is float:
        return st.one_of(st.floats(-1, 3), st.floats()).map(lambda x: (repr(x), x))
    if hint in (str, Path):
        return WORDS.map(lambda text: (text, hint(text)))
    if get_origin(hint) is Literal:
        return st.sampled_from(get_args(hint)).map(lambda text: (text, text))
    assert get_origin(hint) in (Union, types.UnionType)
    inner = next(kind for kind in get_args(hint) if kind is not type(None))
    return st.one_of(st.just(("None", None)), values(inner).filter(lambda pair: pair[0] != "None"))


@st.composite
def flag_and_value(draw: st.DrawFn, flag: Flag) -> tuple[list[str], Any]:
    """What stands on the command line for one flag, and the value it means."""
    if flag.hint is bool:
        yes = draw(st.booleans())
        group, dot, name = flag.name[2:].rpartition(".")
        return [flag.name if yes else f"--{group}{dot}no-{name}"], yes
    if flag.place == ("preset",):  # most texts are none
        pairs = [draw(st.sampled_from([(name, name) for name in (*PRESETS, "moe-158")]))]
    elif get_origin(flag.hint) is tuple:
        pairs = draw(st.lists(values(get_args(flag.hint)[0]), min_size=1, max_size=3))
    else:
        pairs = [draw(values(flag.hint))]
    texts = [text for text, _ in pairs]
    meant = tuple(value for _, value in pairs) if get_origin(flag.hint) is tuple else pairs[0][1]
    if not flag.name:
        return texts, meant
    name = flag.name.replace("-", "_") if draw(st.integers(0, 9)) == 0 else flag.name
    name = "--" + name[2:]
    if flag.place == ("stop",):  # once for each text, which may begin with a hyphen
        return [f"{name}={text}" for text in texts], meant
    if len(texts) == 1 and (texts[0].startswith("-") or draw(st.booleans())):
        return [f"{name}={texts[0]}"], meant
    return [name, *texts], meant


@st.composite
def command_lines(draw: st.DrawFn) -> tuple[Door, list[str], dict[Place, Any]]:
    """A script, flags in any order, and what they mean."""
    chosen = DOORS[draw(st.sampled_from(SCRIPTS))]
    some = draw(st.permutations(chosen.flags))[: draw(st.integers(0, 4))]
    # A positional before the others: a tuple's values would end only where the next flag begins.
    some = sorted(some, key=lambda flag: flag.name != "")
    arguments: list[str] = []
    meant = {}
    for flag in some:
        texts, meant[flag.place] = draw(flag_and_value(flag))
        arguments += texts
    return chosen, arguments, meant


MUTANT_TEXTS = st.one_of(
    st.sampled_from(
        [
            *("", "-", "--", "---", "--=", "=", "-x", "--no-", "--no", "-1", "-.5", "-inf", "nan"),
            *("inf", "1e3", "1e400", "ten", "None", "True", "0", "9" * 5000, "1_000", " 5", "٣"),
            *("--trian.max-steps", "--max-steps", "--model.top_k", "--train", "--model.", "-h"),
            *("--help", "--help=", "--help=x", "--preset", "--preset=moe-158m", "--resume=x"),
            *(
                "a\nb",
                "\x1b[31m",
                "\udce9",
                "\x00",
                "\u2028",
                "--\udcff",
                "--é",
                "🦊",
                "'",
                "─" * 30,
            ),
            *("-" * 30, f"\n{'-' * 30}\n", "--tyro-print-completion", "--no-stats=1", "--stats=1"),
        ]
    ),
    st.text(max_size=6),
    st.text(max_size=6).map(lambda text: f"--{text}"),
)


@st.composite
def damaged_lines(draw: st.DrawFn) -> tuple[Door, list[str], dict[Place, Any] | None]:
    """A command line with up to two slips in it: an argument left out, doubled, moved, replaced,
    misspelt, cut. Without one, what it means."""
    chosen, arguments, meant = draw(command_lines())
    slips = draw(st.integers(0, 2))
    for _ in range(slips):
        place = draw(st.integers(0, max(len(arguments) - 1, 0)))
        kind = draw(st.sampled_from(["drop", "double", "move", "replace", "insert", "letter"]))
        if kind == "insert" or not arguments:
            arguments.insert(place, draw(MUTANT_TEXTS))
        elif kind == "drop":
            del arguments[place]
        elif kind == "double":
            arguments.append(arguments[place])
        elif kind == "move":
            arguments.append(arguments.pop(place))
        elif kind == "replace":
            arguments[place] = draw(MUTANT_TEXTS)
        else:
            text = arguments[place]
            cut = draw(st.integers(0, len(text)))
            arguments[place] = text[:cut] + draw(st.characters()) + text[cut + 1 :]
    return chosen, arguments, None if slips else meant


@pytest.mark.fuzz
@given(line=damaged_lines())
def test_flags_mean_what_they_say_or_are_refused_in_one_line(
    watchdog: Callable[[], None], line: tuple[Door, list[str], dict[Place, Any] | None]
) -> None:
    """A line takes about 5 ms, nearly all of it in tyro: 10,000 take about a minute."""
    watchdog()
    chosen, arguments, meant = line
    code, config, out, err = chosen.answer(arguments)
    if code == 2:
        assert config is None and out == ""
        assert len(one_error(err)) < 1000
        event("refused")
        if meant is not None:  # rightly: a setting is missing (TypeError), or the config refuses it
            with pytest.raises((ValueError, TypeError)):
                chosen.config(meant)
        return
    assert (code, err) == (0, "")
    if config is None:
        assert out and {"-h", "--help", "--tyro-print-completion"} & set(arguments)
        event("help")
        return
    assert out == ""
    if meant is not None:
        assert config == chosen.config(meant)
        event("right")
        return
    # What nothing on the line names is as by default, which for train_moe depends on the preset.
    event("damaged, but legible")
    start = {("preset",): config.preset} if hasattr(config, "preset") else {}
    start |= {flag.place: at(config, flag.place) for flag in chosen.flags if flag.required}
    default = chosen.config(start)
    for flag in chosen.flags:
        last = flag.name.rpartition(".")[2].lstrip("-")
        if flag.name and not any(last in text.replace("_", "-") for text in arguments):
            assert at(config, flag.place) == at(default, flag.place)


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_defaults_without_any_flag(name: str) -> None:
    chosen = DOORS[name]
    code, config, _, err = chosen.answer([])
    if any(flag.required for flag in chosen.flags):
        assert code == 2 and "--data STR" in one_error(err)
    else:
        assert code == 0 and config == chosen.config({})


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_names_every_flag(name: str) -> None:
    chosen = DOORS[name]
    code, config, out, err = chosen.answer(["--help"])
    assert (code, config, err) == (0, None, "")
    assert chosen.answer(["--bogus", "--help"])[0] == 0, "after a mistake one wants help, too"
    for flag in chosen.flags:
        assert (flag.name or "{tinystories,openwebtext}") in out


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_brings_its_settings(preset: str) -> None:
    door = DOORS["train_moe"]
    settings = {("preset",): preset, ("train", "seed"): 7}
    for line in (["--preset", preset], [f"--preset={preset}"], ["--preset=x", "--preset", preset]):
        for before in ([], ["--train.seed", "3"]):
            answer = door.answer([*before, *line, "--train.seed", "7"])
            assert answer == (0, door.config(settings), "", "")
    assert str(door.config(settings).train.learning_rate) in door.answer([*line, "-h"])[2]


def test_resume_alone() -> None:
    door = DOORS["train_moe"]
    assert door.answer(["--resume", "x"])[1].resume == "x"
    assert "usage" in door.answer(["--resume", "x", "--help"])[2]
    for preset in PRESETS:  # also the default one: the run may have another
        err = door.answer(["--resume", "x", "--preset", preset])[3]
        assert one_error(err).endswith("leave the other flags out ('--preset')")


def test_the_last_of_two_counts() -> None:
    assert DOORS["generate"].answer(["--seed", "1", "--stats", "--seed=2", "--no-stats"]) == (
        *(0, DOORS["generate"].config({("seed",): 2}), "", ""),
    )
