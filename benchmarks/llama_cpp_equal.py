"""Does llama.cpp write what pyllm writes? Trained models, exported to GGUF in every dtype.

    pip install -e '.[bench]'
    python benchmarks/llama_cpp_equal.py

Trains a small mixture of experts and a dense model on the embedded stories, half a minute each on
an idle machine, or takes ``--model``. In float32 every token must be the same; a difference ends
the program with exit code 1. What came out goes to ``benchmarks/results/llama-cpp-<date>.json``.
"""

import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pyllm._checks import check_size
from pyllm._cli import require_writable, run

PROMPTS = (
    "",
    "Once upon a time, there was a little",
    "Tom had 12 red apples. It's not true that",
    "\u201cWho are you?\u201d asked the fox. \u201cI am\u201d",
)


@dataclass
class Config:
    """Compare greedy texts of pyllm and llama.cpp."""

    model: str | None = None
    """A run folder or a model folder; by default two models are trained."""
    steps: int = 80
    """Optimiser steps of the training of each."""
    tokens: int = 100
    """Tokens to write after each prompt."""
    results: Path = Path(__file__).resolve().parent / "results"
    """Folder of the JSON file."""

    def __post_init__(self) -> None:
        check_size("steps", self.steps, 1, 2**31 - 1)
        check_size("tokens", self.tokens, 1, 2**31 - 1)


def main(config: Config) -> int:
    """Train, export, compare; 1 where a token differs in float32."""
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    try:
        import llama_cpp
    except ImportError:
        raise ValueError(
            "llama-cpp-python is not installed; pip install -e '.[bench]' builds it, which takes "
            "a quarter of an hour"
        ) from None
    from importlib.metadata import version

    from _record import Record

    from pyllm.export import GGUF_DTYPES

    require_writable(config.results)
    record = Record(config.results, "llama-cpp")
    record.add(llama_cpp_python=llama_cpp.__version__, gguf=version("gguf"), tokens=config.tokens)
    models, equal = {}, True
    with tempfile.TemporaryDirectory() as place:
        for name, folder in folders(config, Path(place)).items():
            models[name] = {
                dtype: compare(folder, dtype, Path(place), config.tokens) for dtype in GGUF_DTYPES
            }
            record.add(models=models)
            for dtype, found in models[name].items():
                same = sum(text["same_tokens"] for text in found["texts"])
                print(
                    f"{name}, {dtype}: {same} of {config.tokens * len(PROMPTS)} tokens the same, "
                    f"logits differ by {found['logit_difference']:.1e} of the largest"
                )
            texts = models[name]["float32"]["texts"]
            equal &= all(text["same_tokens"] == config.tokens for text in texts)
    print(record.path)
    return 0 if equal else 1


def folders(config: Config, place: Path) -> dict[str, Path]:
    """The models to compare, by name; trained here unless one is named."""
    from pyllm.generate import find_model
    from pyllm.models import preset
    from pyllm.train import TRAIN_PRESETS, RunConfig, run_training

    if config.model is not None:
        folder = find_model(config.model)
        return {str(folder): folder}
    tiny = preset("moe-tiny")
    train = replace(TRAIN_PRESETS["moe-tiny"], max_steps=config.steps, batch_size=8)
    models = {
        "moe-tiny": tiny,
        "dense": replace(tiny, moe_every=0, d_ff=2 * tiny.d_ff, tie_embeddings=False),
    }
    return {
        name: run_training(RunConfig(out=str(place / name), model=model, train=train)).folder
        / "best"
        for name, model in models.items()
    }


def compare(folder: Path, dtype: str, place: Path, n_tokens: int) -> dict[str, Any]:
    """Greedy tokens of both programs after each prompt; both see the same tokens before each.

    llama.cpp's kv cache is float32 here, as pyllm's is.
    """
    import llama_cpp
    import numpy as np
    import torch

    from pyllm.export import write_gguf
    from pyllm.models import load_model

    model, tokenizer = load_model(folder)
    path = place / f"{dtype}.gguf"
    path.unlink(missing_ok=True)
    write_gguf(path, model, tokenizer, dtype)
    context = model.config.max_seq_len
    llama = llama_cpp.Llama(
        str(path), n_ctx=context, type_k=0, type_v=0, logits_all=True, verbose=False
    )
    texts, differences = [], []
    for prompt in PROMPTS:
        ids = llama.tokenize(prompt.encode())
        if ids != [tokenizer.end_of_text_id, *tokenizer.encode(prompt)]:
            raise ValueError(f"llama.cpp cuts {prompt!r} into other tokens than pyllm does")
        if len(ids) + n_tokens > context:
            raise ValueError(
                f"{len(ids)} tokens of a prompt and {n_tokens} more do not fit into the model's "
                f"context of {context}; lower --tokens"
            )
        llama.reset()
        llama.eval(ids)
        theirs: list[int] = []
        for _ in range(n_tokens):
            theirs.append(int(np.argmax(llama.scores[llama.n_tokens - 1])))
            llama.eval(theirs[-1:])
        with torch.inference_mode():
            logits = model(torch.tensor([ids + theirs])).logits[0].numpy()
        # pyllm's choice at every place, given the same tokens before it.
        ours = logits[len(ids) - 1 : -1].argmax(-1).tolist()
        texts.append(
            {
                "prompt": prompt,
                "text": tokenizer.decode(theirs, skip_special=False),
                "same_tokens": sum(a == b for a, b in zip(ours, theirs, strict=True)),
            }
        )
        wrong = np.abs(llama.scores[: llama.n_tokens] - logits).max()
        differences.append(float(wrong / np.abs(logits).max()))
    return {
        "megabytes": path.stat().st_size / 1e6,
        "logit_difference": max(differences),
        "texts": texts,
    }


if __name__ == "__main__":
    run(main, Config)
