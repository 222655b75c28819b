"""How fast a model writes, and how much memory that takes."""

import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from pyllm._checks import check_size
from pyllm.generate.config import SamplingConfig
from pyllm.generate.device_step import DEVICES
from pyllm.generate.native import native_model
from pyllm.generate.session import Session, next_logits
from pyllm.models import Transformer


@dataclass(frozen=True)
class DecodeTimes:
    """Times of one prefill and of the decoding steps after it, in seconds."""

    batch: int
    """Sequences side by side."""
    prompt_tokens: int
    """Of each sequence."""
    prefill: float
    """The prompt in one pass."""
    steps: tuple[float, ...]
    """Each gives every sequence one token."""

    @property
    def median(self) -> float:
        """Of the steps."""
        return statistics.median(self.steps)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Lower and upper quartile of the steps: their spread."""
        low, _, high = statistics.quantiles(self.steps, n=4, method="inclusive")
        return low, high

    @property
    def tokens_per_second(self) -> float:
        """All sequences together."""
        return self.batch * len(self.steps) / sum(self.steps)


@torch.inference_mode()
def time_decode(model: Transformer, batch: int, prompt_tokens: int, new_tokens: int) -> DecodeTimes:
    """Prefill random tokens, then write greedily; the first run is a warm-up and not counted.

    On the path that generation takes: in C++ where it can, on a GPU one token ahead of the host.

    Raises:
        ValueError: fewer than two new tokens, an empty prompt or batch, more than the context.
    """
    check_size("batch", batch, 1)
    check_size("prompt_tokens", prompt_tokens, 1)
    check_size("new_tokens", new_tokens, 2)
    context = model.config.max_seq_len
    if prompt_tokens + new_tokens > context:
        raise ValueError(
            f"{prompt_tokens} prompt tokens and {new_tokens} new ones do not fit into the "
            f"model's context of {context}"
        )
    device = model.embedding.weight.device
    generator = torch.Generator().manual_seed(0)
    shape = (2, batch, prompt_tokens)
    prompts = torch.randint(model.config.vocab_size, shape, generator=generator)
    if device.type in DEVICES:
        prefill, steps = _run_ahead(model, prompts, new_tokens)
    else:
        prompt_BT = prompts[0].to(device)
        _run(model, prompt_BT, min(new_tokens, 4))
        prefill, steps = _run(model, prompt_BT, new_tokens)
    return DecodeTimes(batch, prompt_tokens, prefill, tuple(steps))


def _run_ahead(
    model: Transformer, prompts: torch.Tensor, new_tokens: int
) -> tuple[float, list[float]]:
    """A session's own steps: each gives the token that the device drew during the one before. The
    first, which reads the prompt, also calls for the step after it."""
    _, batch, prompt_tokens = prompts.shape
    session = Session(model, batch, prompt_tokens + new_tokens)
    times: list[float] = []
    for prompt_BT in prompts:  # on the first one the step is captured
        config = SamplingConfig(greedy=True, max_new_tokens=new_tokens + 1)
        session.begin(prompt_BT.tolist(), config)
        clocks = [_clock(model.embedding.weight.device)]
        while session.running:
            session.step()
            clocks.append(time.perf_counter())
        times = [end - start for start, end in zip(clocks, clocks[1:], strict=False)]
    return times[0], times[1:]


def _run(model: Transformer, prompt_BT: torch.Tensor, new_tokens: int) -> tuple[float, list[float]]:
    cache = model.new_cache(prompt_BT.shape[0], prompt_BT.shape[1] + new_tokens)
    clocks = [_clock(prompt_BT.device)]
    ids_BT, native = prompt_BT, native_model(model)
    for _ in range(new_tokens + 1):
        ids_BT = next_logits(model, ids_BT, cache, None, native).argmax(-1, keepdim=True)
        clocks.append(_clock(prompt_BT.device))
    times = [end - start for start, end in zip(clocks, clocks[1:], strict=False)]
    return times[0], times[1:]


def _clock(device: torch.device) -> float:
    """Seconds, once all work handed to the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


def peak_memory_bytes(device: torch.device) -> int | None:
    """The most memory in use so far: PyTorch's on a GPU, the whole process's on a CPU.

    None where the system does not tell (Windows).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    status = Path("/proc/self/status")
    if status.is_file():
        # getrusage would count what the program that started this one had.
        lines = status.read_text(encoding="utf-8").splitlines()
        peaks = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
        if peaks:
            return int(peaks[0]) * 1024
    try:
        import resource
    except ModuleNotFoundError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes there, kilobytes here
