"""Measures a model: python scripts/benchmark.py --model runs/<name>, or --preset moe-tiny."""

from __future__ import annotations

import json
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pyllm._checks import check_size
from pyllm._cli import require_writable_file, run

if TYPE_CHECKING:
    from pyllm.models import Transformer

MOST = 2**31 - 1
"""Of anything counted here: more is a slip of the keyboard, and overflows further down."""


@dataclass
class Config:
    """Latency, throughput, memory, operations and active share of a model."""

    model: str | None = None
    """A run folder or a model folder; by default the run under runs/ that was saved last."""
    preset: str = ""
    """Instead of --model: a preset with random weights, which runs as fast as a trained one."""
    prompt_tokens: int = 128
    """Length of the prompt, in tokens."""
    new_tokens: int = 64
    """Tokens written after it and timed one by one."""
    batches: tuple[int, ...] = (1, 4, 16)
    """Sequences side by side."""
    device: str = "auto"
    """auto (cuda, then mps, then cpu), cpu, cuda, cuda:1, mps."""
    dtype: Literal["auto", "float32", "bfloat16", "float16", "int8"] = "auto"
    """Of the weights; auto: as saved, float32 for a preset."""
    threads: int = 0
    """CPU threads; 0 for PyTorch's choice."""
    out: Path | None = None
    """Write everything to this JSON file as well."""

    def __post_init__(self) -> None:
        if self.model is not None and self.preset:
            raise ValueError("give model or preset, not both")
        check_size("prompt_tokens", self.prompt_tokens, 1, MOST)
        check_size("new_tokens", self.new_tokens, 2, MOST)
        check_size("threads", self.threads, 0, 1024)
        if not self.batches:
            raise ValueError("batches is empty; give at least one")
        for batch in self.batches:
            check_size("each of batches", batch, 1, MOST)


def main(config: Config) -> None:
    """Measures, prints a table, writes the JSON."""
    import torch

    from pyllm.generate import find_model, pick_dtype
    from pyllm.models import Transformer, choose_device, load_model, preset, quantize_model

    if config.out is not None:
        require_writable_file("--out", config.out)
    if config.threads:
        torch.set_num_threads(config.threads)
    device, dtype = choose_device(config.device), pick_dtype(config.dtype)
    if config.preset:
        torch.manual_seed(0)
        model = Transformer(preset(config.preset))
        model = quantize_model(model) if dtype == torch.int8 else model.to(dtype=dtype)
        model = model.to(device=device).eval()
        name = f"preset {config.preset}, random weights"
    else:
        folder = find_model(config.model)
        model, _ = load_model(folder, device, dtype)
        name = str(folder)
    report = {"model": name, "machine": machine(device), "commit": commit()}
    report |= measure(config, model)
    show(report)
    if config.out is not None:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        config.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        print(config.out)


def measure(config: Config, model: Transformer) -> dict[str, Any]:
    """Everything there is to say about the model; times in seconds, memory in bytes."""
    from pyllm.generate import peak_memory_bytes, time_decode
    from pyllm.models import count_flops, count_parameters

    weight = model.embedding.weight
    parameters = count_parameters(model.config)
    at_prompt = count_flops(model.config, config.prompt_tokens)
    one_more = count_flops(model.config, config.prompt_tokens + 1)
    active = parameters.active + parameters.embedding
    runs = []
    for batch in config.batches:
        times = time_decode(model, batch, config.prompt_tokens, config.new_tokens)
        low, high = times.quartiles
        derived = {
            "median": times.median,
            "lower_quartile": low,
            "upper_quartile": high,
            "tokens_per_second": times.tokens_per_second,
        }
        runs.append(derived | asdict(times))
    return {
        "dtype": str(weight.dtype).removeprefix("torch."),
        "config": asdict(model.config),
        "parameters": parameters._asdict() | {"active_share": active / parameters.total},
        "flops": {
            "prefill": at_prompt.total,
            "next_token": one_more.total - at_prompt.total,
            "expert_share_saved": at_prompt.saved_by_sparsity,
        },
        "peak_memory": peak_memory_bytes(weight.device),
        "runs": runs,
    }


def machine(device: Any) -> dict[str, Any]:
    """What it ran on."""
    import os
    import platform

    import torch

    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processor": _processor() or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else ""


def commit() -> str | None:
    """The commit of this checkout, or None outside of one."""
    try:
        answer = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()


def show(report: dict[str, Any]) -> None:
    """Prints the report as two tables."""
    from rich.console import Console
    from rich.table import Table

    host, parameters, flops = report["machine"], report["parameters"], report["flops"]
    memory = report["peak_memory"]
    rows = {
        "model": report["model"],
        "machine": f"{host['device']}, {host['processor']}, {host['threads']} threads",
        "dtype": report["dtype"],
        "parameters": f"{parameters['total'] / 1e6:.1f}M",
        "active, without embeddings": f"{parameters['active'] / 1e6:.1f}M",
        "active share, with embeddings": f"{parameters['active_share']:.1%}",
        "expert FLOPs saved": f"{flops['expert_share_saved']:.1%}",
        "FLOPs of the next token": f"{flops['next_token'] / 1e9:.4g} G",
        "FLOPs of the prompt": f"{flops['prefill'] / 1e9:.4g} G",
        "peak memory": "unknown here" if memory is None else f"{memory / 2**20:,.0f} MiB",
    }
    facts = Table(show_header=False)
    for label, value in rows.items():
        facts.add_row(label, value)
    times = Table("batch", "prompt", "prefill", "per step: median", "quartiles", "tokens/s")
    for each in report["runs"]:
        times.add_row(
            str(each["batch"]),
            f"{each['prompt_tokens']} tokens",
            f"{each['prefill'] * 1e3:.1f} ms",
            f"{each['median'] * 1e3:.2f} ms",
            f"{each['lower_quartile'] * 1e3:.2f} to {each['upper_quartile'] * 1e3:.2f} ms",
            f"{each['tokens_per_second']:,.0f}",
        )
    console = Console()
    console.print(facts)
    console.print(times)


if __name__ == "__main__":
    run(main, Config)
