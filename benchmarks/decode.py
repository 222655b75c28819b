"""How fast a model writes and reads a prompt, beside llama.cpp on the same weights, in one run.

    pip install -e '.[bench]'
    python benchmarks/decode.py

Random weights, which run as fast as trained ones, are exported to GGUF, and both programs take
turns on two threads. Decoding is one token at a time after ``--context`` tokens; llama.cpp is
called through its C functions, pyllm as a session calls it. Beside the times stand the bytes of
weights that a token reads, and how fast this machine reads memory in the same run. Writes
``benchmarks/results/decode-<date>.json``.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pyllm._checks import check_size
from pyllm._cli import require_writable, run

sys.path.insert(0, str(Path(__file__).resolve().parent))

from _machine import spread

PEERS = {"int8": "q8_0", "bfloat16": "bfloat16", "float32": "float32"}
"""Our weights, and what llama.cpp is given."""


@dataclass
class Config:
    """Time decoding and prefill beside llama.cpp."""

    presets: tuple[str, ...] = ("moe-158m", "moe-tiny")
    """Which models."""
    dtypes: tuple[Literal["int8", "bfloat16", "float32"], ...] = ("int8", "bfloat16", "float32")
    """Which weights; int8 beside Q8_0."""
    context: int = 128
    """Tokens before those that are timed."""
    tokens: int = 32
    """Tokens written in a round."""
    prompts: tuple[int, ...] = (128, 512)
    """Lengths of the prompts whose reading is timed."""
    rounds: int = 9
    """In turns."""
    threads: int = 2
    """Of both programs."""
    peer: bool = True
    """Run llama.cpp?"""
    results: Path = Path(__file__).resolve().parent / "results"
    """Folder of the JSON file."""

    def __post_init__(self) -> None:
        for name in ("context", "tokens", "rounds", "threads"):
            check_size(name, getattr(self, name), 1, 2**20)


def main(config: Config) -> None:
    """Measure, print, write."""
    import torch
    from _record import Record

    from pyllm.models import Transformer, preset

    if config.peer:
        try:
            import llama_cpp
        except ImportError:
            raise ValueError(
                "llama-cpp-python is not installed; pip install -e '.[bench]' builds it, which "
                "takes a quarter of an hour; or give --no-peer"
            ) from None
    require_writable(config.results)
    torch.set_num_threads(config.threads)
    record = Record(config.results, "decode")
    record.add(threads=config.threads, context=config.context, rounds=config.rounds)
    if config.peer:
        record.add(llama_cpp_python=llama_cpp.__version__)
    cases: list[dict[str, Any]] = []
    for name in config.presets:
        torch.manual_seed(0)
        model = Transformer(preset(name)).eval()
        for dtype in config.dtypes:
            cases.append({"preset": name, "dtype": dtype, **measure(config, model, dtype)})
            record.add(cases=cases)
            print(describe_case(cases[-1]), flush=True)
    print(record.path)


def measure(config: Config, model: Any, dtype: str) -> dict[str, Any]:
    """Both programs in turns on one model."""
    with tempfile.TemporaryDirectory() as place:
        runs: dict[str, Runner] = {"pyllm": Ours(model, dtype)}
        if config.peer:
            runs["llama.cpp"] = Theirs(model, dtype, Path(place), config)
        decode: dict[str, list[float]] = {name: [] for name in runs}
        prefill: dict[int, dict[str, list[float]]] = {
            n: {name: [] for name in runs} for n in config.prompts
        }
        rates = []
        for round_ in range(config.rounds + 1):  # the first is a warm-up
            rates.append(reading_rate(config.threads))
            for name, runner in runs.items():
                steps = runner.decode(config.context, config.tokens)
                if round_:
                    decode[name] += steps
            for n in config.prompts:
                for name, runner in runs.items():
                    seconds = runner.prefill(n)
                    if round_:
                        prefill[n][name].append(seconds)
    found: dict[str, Any] = {
        "bytes_per_token": bytes_per_token(runs["pyllm"].model),
        "read_bytes_per_second": statistics.median(rates),
        "decode": {name: spread(times) for name, times in decode.items()},
        "prefill": {
            str(n): {name: spread(times) for name, times in by_name.items()}
            for n, by_name in prefill.items()
        },
    }
    ours = found["decode"]["pyllm"]["median"]
    found["share_of_bandwidth"] = found["bytes_per_token"] / ours / found["read_bytes_per_second"]
    if config.peer:
        found["decode_ratio"] = found["decode"]["llama.cpp"]["median"] / ours
        found["prefill_ratio"] = {
            n: by_name["llama.cpp"]["median"] / by_name["pyllm"]["median"]
            for n, by_name in found["prefill"].items()
        }
    return found


def describe_case(case: dict[str, Any]) -> str:
    """One line."""
    ours = case["decode"]["pyllm"]["median"]
    line = (
        f"{case['preset']} {case['dtype']}: {ours * 1e3:.3f} ms a token, "
        f"{case['share_of_bandwidth']:.0%} of {case['read_bytes_per_second'] / 1e9:.1f} GB/s"
    )
    if "decode_ratio" in case:
        line += f", {case['decode_ratio']:.2f} x llama.cpp; prefill " + ", ".join(
            f"{n}: {case['prefill'][n]['pyllm']['median'] * 1e3:.1f} ms, {ratio:.2f} x"
            for n, ratio in case["prefill_ratio"].items()
        )
    return line


def bytes_per_token(model: Any) -> int:
    """Weights that one token reads: all but the experts it has not chosen and the embeddings, of
    which it reads a row."""
    from pyllm.layers import MoE

    total = sum(value.nbytes for value in model.state_dict().values())
    for block in model.blocks:
        if isinstance(block.ffn, MoE):
            n_experts = block.ffn.router.shape[0]
            experts = sum(
                value.nbytes
                for name, value in block.ffn.state_dict().items()
                if name.startswith("w_")
            )
            total -= experts * (n_experts - block.ffn.top_k) // n_experts
    if model.output is not None:
        total -= sum(value.nbytes for value in model.embedding.state_dict().values())
    if model.positions is not None:
        total -= sum(value.nbytes for value in model.positions.state_dict().values())
    return total


def reading_rate(threads: int) -> float:
    """Bytes per second of a sum over 512 MB, which no cache holds: the best of three."""
    import torch

    global _large
    if _large is None:
        _large = torch.ones(2**27)
    best = 0.0
    for _ in range(3):
        start = time.perf_counter()
        _large.sum()
        best = max(best, _large.nbytes / (time.perf_counter() - start))
    return best


_large: Any = None


class Runner:
    """A program with a model."""

    model: Any = None

    def decode(self, context: int, tokens: int) -> list[float]:
        """Seconds of each of so many single tokens after ``context`` others."""
        raise NotImplementedError

    def prefill(self, tokens: int) -> float:
        """Seconds until the logits of what follows a prompt."""
        raise NotImplementedError


class Ours(Runner):
    """pyllm, as a session calls it."""

    def __init__(self, model: Any, dtype: str) -> None:
        import copy

        import torch

        from pyllm.generate.native import native_model
        from pyllm.models import quantize_model

        if dtype == "int8":
            self.model = quantize_model(model)
        else:
            self.model = copy.deepcopy(model).to(getattr(torch, dtype))
        found = native_model(self.model)
        if found is None:
            raise ValueError("pyllm's C++ kernels are not installed; see scripts/doctor.py")
        self.next_logits: Callable[..., torch.Tensor] = found.next_logits

    def decode(self, context: int, tokens: int) -> list[float]:
        import torch

        times = []
        with torch.inference_mode():
            cache = self.model.new_cache(1, context + tokens)
            ids = prompt(self.model, context)
            token = self.next_logits(torch.tensor([ids]), cache).argmax(-1, keepdim=True)
            for _ in range(tokens):
                start = time.perf_counter()
                token = self.next_logits(token, cache).argmax(-1, keepdim=True)
                times.append(time.perf_counter() - start)
        return times

    def prefill(self, tokens: int) -> float:
        import torch

        with torch.inference_mode():
            cache = self.model.new_cache(1, tokens)
            ids = torch.tensor([prompt(self.model, tokens)])
            start = time.perf_counter()
            self.next_logits(ids, cache).argmax(-1)
            return time.perf_counter() - start


class Theirs(Runner):
    """llama.cpp on the same weights."""

    def __init__(self, model: Any, dtype: str, place: Path, config: Config) -> None:
        import llama_cpp

        from pyllm.export import write_gguf
        from pyllm.tokenizers import byte_tokenizer

        self.model = model
        path = place / "model.gguf"
        write_gguf(path, model, byte_tokenizer(), PEERS[dtype])
        n_ctx = max(config.context + config.tokens, *config.prompts)
        self.llama = llama_cpp.Llama(
            str(path),
            n_ctx=n_ctx,
            n_batch=512,
            n_threads=config.threads,
            n_threads_batch=config.threads,
            verbose=False,
        )
        path.unlink()

    def _eval(self, ids: list[int]) -> int:
        """Run tokens; the likeliest next one. The C functions, without llama_cpp's Python."""
        import llama_cpp
        import numpy as np

        context = self.llama.ctx
        array = (llama_cpp.llama_token * len(ids))(*ids)
        if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(array, len(ids))):
            raise RuntimeError("llama_decode failed")
        logits = llama_cpp.llama_get_logits_ith(context, -1)
        return int(np.ctypeslib.as_array(logits, (self.model.config.vocab_size,)).argmax())

    def _clear(self) -> None:
        import llama_cpp

        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.llama.ctx), True)

    def decode(self, context: int, tokens: int) -> list[float]:
        self._clear()
        token = self._eval(prompt(self.model, context))
        times = []
        for _ in range(tokens):
            start = time.perf_counter()
            token = self._eval([token])
            times.append(time.perf_counter() - start)
        return times

    def prefill(self, tokens: int) -> float:
        self._clear()
        ids = prompt(self.model, tokens)
        start = time.perf_counter()
        self._eval(ids)
        return time.perf_counter() - start


def prompt(model: Any, tokens: int) -> list[int]:
    """Ids that are random but always the same."""
    import torch

    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (tokens,), generator=generator).tolist()


if __name__ == "__main__":
    run(main, Config)
