"""Writes a story with a trained model: python scripts/generate.py --prompt "Once upon a time"."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import UseAppendAction

from pyllm._checks import check_size
from pyllm._cli import run
from pyllm.generate.config import SamplingConfig

if TYPE_CHECKING:
    from pyllm.generate import LanguageModel

EXPERT_COLOURS = ("cyan", "yellow", "magenta", "green", "red", "blue", "white", "bright_black")


@dataclass(frozen=True)
class Config(SamplingConfig):
    """Writes a story with a trained model, word by word as it comes, or chats with one.

    With --interactive, each line that is typed goes on with the story so far, and the model goes on
    from there. After an empty line it goes on by itself or, when the story has come to its end,
    begins another. The line "/new Once upon" begins a new story with these words. With --chat, each
    line is a message, and /new begins a new conversation. What came before is not computed again.
    Ctrl-C ends what is being written, Ctrl-D the program.

    What is not said here of how to draw is as the model's generation_config.json has it.
    """

    # One value a flag: of several after one flag, none but the first could begin with a hyphen.
    stop: Annotated[tuple[str, ...], UseAppendAction] = ()
    """The text ends before this, which is not written itself. Give the flag once for each of
    several; the first to come ends the text."""
    model: str | None = None
    """A run folder (its best checkpoint is taken) or a model folder; by default the run under
    runs/ that was saved last."""
    prompt: str = ""
    """How the story begins, by default the model's own idea; with --chat, the one message to
    answer, by default they are asked for."""
    interactive: bool = False
    """Ask for lines, and tell a story together."""
    fresh: bool = False
    """With --interactive: each line begins a new story."""
    chat: bool = False
    """Answer messages, written as the chat template in the model's folder has it."""
    system: str = ""
    """With --chat: what the model is told before all messages."""
    context: int | None = None
    """Most tokens to look back on, at most the model's context; by default that, and 8,192 of a
    larger one. The cache takes memory in proportion, unless the model has a window."""
    stats: bool = False
    """Print tokens, seconds and tokens per second after each text: those of the prompt (prefill)
    and those that were written (decode)."""
    show_experts: bool = False
    """Print the story once more, each token marked with the expert that weighed most in it."""
    expert_layer: int = -1
    """Which MoE layer --show-experts looks at, from 0; negative counts from the last."""
    device: str = "auto"
    """auto (cuda, then mps, then cpu), cpu, cuda, cuda:1, mps."""
    dtype: Literal["auto", "float32", "bfloat16", "float16", "int8"] = "auto"
    """Of the weights; auto: float32, or float64 or int8 where they were saved so."""
    kv_cache_dtype: Literal["auto", "int8"] = "auto"
    """Of the keys and values kept for what was read and written; auto: as the activations are.
    int8 takes about half the memory of bfloat16 and a quarter of float32's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.context is not None:
            check_size("context", self.context, 1)
        if self.interactive and self.prompt:
            raise ValueError("give prompt or interactive, not both")
        if self.interactive and self.chat:
            raise ValueError("give interactive or chat, not both; chat without prompt asks, too")
        if self.fresh and not self.interactive:
            raise ValueError("fresh goes with interactive; give both or neither")
        if self.system and not self.chat:
            raise ValueError("system goes with chat; give both or neither")


@dataclass(frozen=True)
class Start:
    """What the defaults of the others depend on."""

    model: str | None = None


def defaults(arguments: list[str]) -> Config:
    """The settings of the model named on the command line: what the other flags start from."""
    if {"-h", "--help"} & {*arguments}:
        return Config()
    from pyllm._flags import read_flags

    start, others = read_flags(Start, arguments, add_help=False, return_unknown_args=True)
    from pyllm.generate.find import DRAWING, find_model, folder_settings
    from pyllm.models.durable import readable_folder

    try:
        folder = readable_folder(find_model(start.model))
    except ValueError:  # which is told once the flags are known to be right
        return Config()
    found = folder_settings(folder)
    given = {other.partition("=")[0].lstrip("-").replace("-", "_") for other in others}
    if given & {*DRAWING}:  # who says how to draw does not want the likeliest word
        found = replace(found, greedy=False)
    return Config(**asdict(found))


def main(config: Config) -> None:
    """Loads the model and writes."""
    from pyllm.generate import LanguageModel
    from pyllm.generate.terminal import Chat, Story, Turns, Writer, interact

    model = LanguageModel.load(config.model, config.device, config.dtype, config.kv_cache_dtype)
    n_layers = model.config.n_moe_layers
    if config.show_experts and not -n_layers <= config.expert_layer < n_layers:
        raise ValueError(
            f"--expert-layer is {config.expert_layer}; {model.folder} has {n_layers} MoE layers"
        )

    def afterwards(ids: list[int]) -> None:
        if config.show_experts:
            show_experts(config.expert_layer, model, ids)

    writer = Writer(model, config, config.context, config.stats, afterwards)
    turns: Turns = Chat(writer, config.system) if config.chat else Story(writer, config.fresh)
    if config.interactive or (config.chat and not config.prompt):
        interact(turns)
    else:
        turns.take(config.prompt)


def show_experts(layer: int, model: LanguageModel, ids: list[int]) -> None:
    """Prints a text with the expert that weighed most in the writing of each token."""
    from rich.console import Console
    from rich.text import Text

    from pyllm.generate import TextStream, expert_trace

    ids = ids[-model.config.max_seq_len :]
    # The experts that ran at a token wrote the one after it.
    writers = expert_trace(model.model, ids)[layer, :-1, 0].tolist()
    stream, story = TextStream(model.tokenizer), Text()
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
    run(main, Config, defaults)
