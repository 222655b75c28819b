"""Writes a story with a trained model: python scripts/generate.py --prompt "Once upon a time"."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pyllm._cli import run
from pyllm.generate.config import SamplingConfig

if TYPE_CHECKING:
    from pyllm.models import Transformer
    from pyllm.tokenizers import Tokenizer

EXPERT_COLOURS = ("cyan", "yellow", "magenta", "green", "red", "blue", "white", "bright_black")


@dataclass(frozen=True)
class Config(SamplingConfig):
    """Writes a story with a trained model, word by word as it comes."""

    model: str | None = None
    """A run folder (its best checkpoint is taken) or a model folder; by default the run under
    runs/ that was saved last."""
    prompt: str = ""
    """How the story begins; by default the model's own idea."""
    interactive: bool = False
    """Ask for one beginning after the other. Ctrl-C ends a story, Ctrl-D the program."""
    stats: bool = False
    """Print tokens per second at the end."""
    show_experts: bool = False
    """Print the story once more, each token marked with the expert that weighed most in it."""
    expert_layer: int = -1
    """Which MoE layer --show-experts looks at, from 0; negative counts from the last."""
    device: str = "auto"
    """auto (cuda, then mps, then cpu), cpu, cuda, cuda:1, mps."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the weights; auto: as saved."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.interactive and self.prompt:
            raise ValueError("give prompt or interactive, not both")


def main(config: Config) -> None:
    """Loads the model and writes."""
    from pyllm.generate import find_model, pick_dtype
    from pyllm.models import choose_device, load_model

    folder = find_model(config.model)
    model, tokenizer = load_model(folder, choose_device(config.device), pick_dtype(config.dtype))
    n_layers = model.config.n_moe_layers
    if config.show_experts and not -n_layers <= config.expert_layer < n_layers:
        raise ValueError(
            f"--expert-layer is {config.expert_layer}; {folder} has {n_layers} MoE layers"
        )
    if config.interactive:
        interact(config, model, tokenizer)
    else:
        tell(config, model, tokenizer, config.prompt)


def interact(
    config: Config,
    model: Transformer,
    tokenizer: Tokenizer,
    ask: Callable[[str], str] = input,
) -> None:
    """One story for each beginning that ``ask`` gives, until it raises EOFError."""
    print("Type how a story begins. Ctrl-C ends a story, Ctrl-D the program.")
    while True:
        try:
            tell(config, model, tokenizer, ask("> "))
        except KeyboardInterrupt:
            print()
        except EOFError:
            print()
            return
        except UnicodeDecodeError as error:
            raise ValueError(
                f"what was typed is not UTF-8 ({error.object[error.start]:#04x}); expected UTF-8"
            ) from None


def tell(config: Config, model: Transformer, tokenizer: Tokenizer, prompt: str) -> None:
    """Prints the prompt and, as it comes, what follows."""
    from pyllm.generate import TextStream, generate_ids, prompt_ids

    ids = prompt_ids(model, tokenizer, prompt)
    stream, new = TextStream(tokenizer), []
    print(prompt, end="", flush=True)
    start = time.perf_counter()
    try:
        for token in generate_ids(model, ids, config, stop_id=tokenizer.end_of_text_id):
            new.append(token)
            print(stream.push(token), end="", flush=True)
    finally:
        print(stream.end(), flush=True)
    seconds = time.perf_counter() - start
    if config.stats:
        rate = len(new) / seconds
        print(f"{len(new)} tokens in {seconds:.2f} s: {rate:.1f} tokens/s, the prompt included")
    if config.show_experts:
        show_experts(config.expert_layer, model, tokenizer, ids + new)


def show_experts(layer: int, model: Transformer, tokenizer: Tokenizer, ids: list[int]) -> None:
    """Prints a text with the expert that weighed most in the writing of each token."""
    from rich.console import Console
    from rich.text import Text

    from pyllm.generate import TextStream, expert_trace

    ids = ids[-model.config.max_seq_len :]
    # The experts that ran at a token wrote the one after it.
    writers = expert_trace(model, ids)[layer, :-1, 0].tolist()
    stream, story = TextStream(tokenizer), Text()
    for token, expert in zip(ids[1:], writers, strict=True):
        story.append(stream.push(token), style=EXPERT_COLOURS[expert % len(EXPERT_COLOURS)])
        story.append(str(expert), style="dim")
    n_layers = model.config.n_moe_layers
    heading = Text(f"\nMoE layer {layer % n_layers} of 0 to {n_layers - 1}; after each token, ")
    heading.append("the expert that weighed most in writing it", style="dim")
    legend = Text("tokens by expert: ")
    for expert in range(model.config.n_experts):
        style = EXPERT_COLOURS[expert % len(EXPERT_COLOURS)]
        legend.append(f" {expert}: {writers.count(expert)} ", style=style)
    console = Console(highlight=False)
    for text in (heading, story, legend):
        console.print(text)


if __name__ == "__main__":
    run(main, Config)
