"""Train a model: `python scripts/train_moe.py`, or with a text of your own: `--data FILE`."""

import argparse
from dataclasses import replace

from pyllm._cli import run
from pyllm.models.config import preset
from pyllm.train.config import TRAIN_PRESETS, RunConfig


def defaults() -> RunConfig:
    """The settings of the preset named on the command line: what the other flags start from."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", default=RunConfig.preset)
    name = parser.parse_known_args()[0].preset
    return replace(RunConfig(), preset=name, model=preset(name), train=TRAIN_PRESETS[name])


def main(config: RunConfig) -> None:
    """Train, evaluate, tell a story."""
    from pyllm.train.run import run_training

    run_training(config)


if __name__ == "__main__":
    run(main, RunConfig, defaults)
