"""Tokenizers, measured: seconds to learn a vocabulary, ours beside the library's, and to encode.

    python benchmarks/tokenizer.py

Trains BPE on TinyStories, or on the embedded stories where it is absent, with both trainers in
turn, checks that they learn the same, then encodes the text with each kind of tokenizer. Reading
the file is not timed. Writes everything to ``benchmarks/results/tokenizer-<date>.json``.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyllm._checks import check_size
from pyllm._cli import require_writable, run

if TYPE_CHECKING:
    from pyllm.tokenizers import Tokenizer

TRAINERS = ("pyllm", "tokenizers")


@dataclass
class Config:
    """Learn a vocabulary with both trainers; encode with each kind of tokenizer."""

    data: str = field(default_factory=lambda: os.environ.get("PYLLM_SHARED_DATA", "../shared/data"))
    """Folder with tinystories/train.txt, and with tokenizer/gpt2_vocab.bpe and gpt2_encoder.json;
    what is absent is left out, and said so."""
    n_stories: int = 20_000
    """Embedded stories to take where TinyStories is absent."""
    merges: int = 4096
    """Merges to learn; the 256 bytes and the special tokens come on top."""
    runs: int = 5
    """Times that each thing is done."""
    results: Path = Path(__file__).resolve().parent / "results"
    """Folder of the JSON file."""

    def __post_init__(self) -> None:
        check_size("n_stories", self.n_stories, 1, 2**31 - 1)
        check_size("merges", self.merges, 1, 2**20 - 260)
        check_size("runs", self.runs, 1, 1000)


def timed(action: Callable[[], Any]) -> tuple[Any, float, float]:
    """What it gives, the seconds it took, and the seconds of all cores together."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = action()
    return result, time.perf_counter() - wall, time.process_time() - cpu


def count_tokens(tokenizer: "Tokenizer", texts: list[str]) -> int:
    """Encode the texts, a thousand at once as a token file is written."""
    batches = (texts[at : at + 1000] for at in range(0, len(texts), 1000))
    return sum(len(ids) for batch in batches for ids in tokenizer.encode_batch(batch))


def main(config: Config) -> int:
    """Measure and write; 1 where the two trainers learn different merges."""
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    import tokenizers
    from _record import Record

    from pyllm.data import read_texts, write_stories
    from pyllm.tokenizers import Tokenizer, byte_tokenizer, train_bpe, train_characters

    require_writable(config.results)
    stories = Path(config.data, "tinystories", "train.txt")
    if stories.is_file():
        name, texts = "TinyStories", list(read_texts(str(stories)))
    else:
        print(f"{stories}: no TinyStories there; the embedded stories instead")
        name, texts = "embedded stories", list(write_stories(config.n_stories, 0))
    n_bytes = sum(len(text.encode()) for text in texts)
    record = Record(config.results, "tokenizer")
    record.add(
        command=f"python benchmarks/tokenizer.py --merges {config.merges} --runs {config.runs}",
        tokenizers=tokenizers.__version__,
        text={"name": name, "documents": len(texts), "bytes": n_bytes},
        merges=config.merges,
    )

    training: dict[str, dict[str, list[float]]] = {
        trainer: {"seconds": [], "cpu_seconds": []} for trainer in TRAINERS
    }
    made = {}
    for _ in range(config.runs):
        for trainer in TRAINERS:  # in turn, so that a busy minute hits both
            made[trainer], wall, cpu = timed(
                lambda trainer=trainer: train_bpe(texts, config.merges + 260, trainer=trainer)
            )
            training[trainer]["seconds"].append(wall)
            training[trainer]["cpu_seconds"].append(cpu)
        record.add(training=training)
    same = made["pyllm"].hash == made["tokenizers"].hash
    record.add(same_tokenizer=same)
    print(f"{config.merges:,} merges of {n_bytes / 1e6:.1f} MB of {name}, median (fastest):")
    for trainer, times in training.items():
        wall, cpu = times["seconds"], times["cpu_seconds"]
        print(
            f"  {trainer:10} {statistics.median(wall):.2f} s ({min(wall):.2f}), of all cores "
            f"together {statistics.median(cpu):.2f} s ({min(cpu):.2f})"
        )
    print(f"  the two learned {'the same' if same else 'DIFFERENT MERGES'}")

    kinds = {
        "bytes": byte_tokenizer(),
        "characters": train_characters(texts, config.merges + 260),
        "bpe": made["pyllm"],
    }
    folder = Path(config.data, "tokenizer")
    files = [folder / "gpt2_vocab.bpe", folder / "gpt2_encoder.json"]
    if all(file.is_file() for file in files):
        kinds["GPT-2"] = Tokenizer.from_gpt2(*files)
    else:
        print(f"{folder}: no GPT-2 there; left out")
    encoding = {}
    for kind, tokenizer in kinds.items():
        measured = [timed(lambda t=tokenizer: count_tokens(t, texts)) for _ in range(config.runs)]
        n_tokens = measured[0][0]
        encoding[kind] = {
            "vocab_size": tokenizer.vocab_size,
            "tokens": n_tokens,
            "bytes_per_token": n_bytes / n_tokens,
            "seconds": [wall for _, wall, _ in measured],
            "cpu_seconds": [cpu for _, _, cpu in measured],
        }
        record.add(encoding=encoding)
        print(
            f"{kind:10} {tokenizer.vocab_size:6,} ids, {n_bytes / n_tokens:.2f} bytes a token, "
            f"encodes {n_bytes / 1e6 / min(encoding[kind]['seconds']):.1f} MB/s"
        )
    print(record.path)
    return 0 if same else 1


if __name__ == "__main__":
    run(main, Config)
