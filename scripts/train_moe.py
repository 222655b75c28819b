"""Train a model: `python scripts/train_moe.py`, or with a text of your own: `--data FILE`."""

import os
import subprocess
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal, NoReturn

from pyllm._checks import shown
from pyllm._cli import run
from pyllm._flags import read_flags
from pyllm.models.config import preset
from pyllm.train.config import TRAIN_PRESETS, RunConfig


@dataclass
class Start:
    """The flags that decide what the others start from."""

    preset: str = ""
    resume: str = ""


@dataclass(frozen=True)
class Config(RunConfig):
    """A whole training run."""

    mode: Literal["train", "benchmark"] = "train"
    """benchmark: another name for scripts/benchmark.py, which takes the other flags."""


def defaults(arguments: list[str]) -> Config:
    """The settings of the preset named on the command line: what the other flags start from."""
    start, others = read_flags(Start, arguments, add_help=False, return_unknown_args=True)
    others = [other for other in others if other not in ("-h", "--help")]
    if start.resume and (others or start.preset):
        raise ValueError(
            "--resume goes on with the settings in the run's config.json; leave the other flags "
            f"out ({shown(' '.join(others) or '--preset')})"
        )
    name = start.preset or RunConfig.preset
    return replace(Config(), preset=name, model=preset(name), train=TRAIN_PRESETS[name])


def benchmark_flags(arguments: list[str]) -> list[str] | None:
    """The other arguments where one says --mode benchmark; else None."""
    for at, argument in enumerate(arguments):
        if argument == "--mode=benchmark":
            return [*arguments[:at], *arguments[at + 1 :]]
        if arguments[at : at + 2] == ["--mode", "benchmark"]:
            return [*arguments[:at], *arguments[at + 2 :]]
    return None


def become_benchmark(arguments: list[str]) -> NoReturn:
    """Go on as scripts/benchmark.py: whoever sends this process a signal, sends it to that one."""
    script = Path(__file__).with_name("benchmark.py")
    command = [sys.executable, str(script), *arguments]
    if os.name == "posix":
        os.execv(sys.executable, command)
    sys.exit(subprocess.call(command))  # elsewhere execv returns to the shell before the end


def main(config: Config) -> None:
    """Train, evaluate, tell a story."""
    from pyllm._memory import check_memory
    from pyllm.models import choose_device, count_parameters
    from pyllm.train.run import run_training

    if choose_device(config.train.device).type == "cpu":  # before a tokenizer is trained for it
        check_memory(
            "the model with its gradients",  # optimiser and activations come on top
            8 * count_parameters(config.model).total,
            "give a smaller --preset, or smaller sizes after --model",
        )
    run_training(RunConfig(**{part.name: getattr(config, part.name) for part in fields(RunConfig)}))


if __name__ == "__main__":
    measuring = benchmark_flags(sys.argv[1:])
    if measuring is not None:
        become_benchmark(measuring)
    run(main, Config, defaults)
