"""Write the figures of README.md anew from the newest files under ``benchmarks/results/``.

    python benchmarks/readme.py

What stands between ``<!-- figures: begin -->`` and ``<!-- figures: end -->`` is replaced; a test
fails where README and results differ.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyllm import _cli

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SEED_FLOPS = 8.05e9
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"


def newest(name: str) -> tuple[Path, dict[str, Any]] | None:
    """The newest ``<name>-<date>.json`` and its content."""
    files = sorted(RESULTS.glob(f"{name}-[0-9]*.json"))
    if not files:
        return None
    content: dict[str, Any] = json.loads(files[-1].read_text(encoding="utf-8"))
    return files[-1], content


def machine_line(path: Path, machine: dict[str, Any]) -> str:
    """Where a table comes from."""
    return (
        f"From [`{path.relative_to(ROOT)}`]({path.relative_to(ROOT)}): {machine['cores']} cores "
        f"of {machine['processor']}, torch {machine['torch']}, commit `{machine['commit']}`."
    )


def stories() -> list[str]:
    """The main job on both texts."""
    found = newest("stories")
    if found is None:
        return []
    path, content = found
    parameters = content["parameters"]
    lines = [
        f"`moe-tiny` has {parameters['total'] / 1e6:.1f}M parameters, of which "
        f"{parameters['active'] / 1e6:.1f}M work on each token (embeddings not counted).",
        "",
        "| text | training | tokens | tokens/s (median) | val_loss | **val_bpb** |",
        "|---|---|---|---|---|---|",
    ]
    for name, run in content["runs"].items():
        lines.append(
            f"| {name} | {run['train_seconds']:.0f} s | {run['train_tokens'] / 1e6:.2f}M "
            f"| {run['tok_per_sec_median']:,.0f} | {run['val_loss']:.3f} "
            f"| **{run['val_bpb']:.3f}** |"
        )
    lines += ["", machine_line(path, content["machine"]), ""]
    for name, run in content["runs"].items():
        quoted = [f"> {line}" if line else ">" for line in run["story"].splitlines()]
        shared = run["story_shared_passage"] or "under 63"
        lines += [
            f"What the model wrote after training on {name} (longest passage shared with a "
            f"training text: {shared} of {len(run['story'])} characters):",
            "",
            *quoted,
            "",
        ]
    return lines


def operations() -> list[str]:
    """Each operation beside its peer."""
    found = newest("ops-cpu")
    if found is None:
        return []
    path, content = found
    lines = [
        "| operation | dtype | pass | C++ face | reference | PyTorch's own | PyTorch / C++ |",
        "|---|---|---|---|---|---|---|",
    ]
    with_tiny = {case["op"] for case in content["cases"] if case["name"] == "moe-tiny"}
    for case in content["cases"]:
        if case["name"] != "moe-tiny" and case["op"] in with_tiny:
            continue
        label = f"`{case['op']}`" + ("" if case["op"] in with_tiny else f" {case['name']}")
        for stage in ("forward", "backward"):
            rows = {
                row["face"]: row
                for row in case["rows"]
                if row["stage"] == stage and "median" in row
            }
            if "cpu" not in rows:
                continue
            own = rows["cpu"]["median"]
            cells = [
                f"{rows[face]['median'] * 1e3:.2f} ms" if face in rows else "none"
                for face in ("cpu", "reference", "peer")
            ]
            ratio = f"{rows['peer']['median'] / own:.1f} x" if "peer" in rows else ""
            lines.append(f"| {label} | {case['dtype']} | {stage} | {' | '.join(cells)} | {ratio} |")
    return [*lines, "", machine_line(path, content["machine"]), ""]


def scaling() -> list[str]:
    """The loss against compute, and how well the smaller models foretell the largest."""
    found = newest("scaling")
    if found is None:
        return []
    path, content = found
    runs = content["runs"]
    return [
        f"Does the loss fall with compute as a power law? Mixtures of {runs[0]['width']} to "
        f"{runs[-1]['width']} channels on {content['text']}; what was fitted to all but the "
        f"largest predicts {content['predicted']:.3f} for that, and {content['measured']:.3f} was "
        "measured:",
        "",
        "![The loss against compute](benchmarks/results/scaling.svg)",
        "",
        machine_line(path, content["machine"]),
        "",
    ]


def training() -> list[str]:
    """A training step beside transformers."""
    found = newest("train-step")
    if found is None:
        return []
    path, content = found
    lines = [
        f"A training step (forward, backward, fused AdamW) on {content['batch_size']} x "
        f"{content['seq_len']} tokens and {content['threads']} threads, beside transformers "
        f"{content['transformers']} on the same weights, its experts in the implementation that "
        "was fastest in the same run. Mixed: float32 weights, bfloat16 products. pyllm's trainer "
        "has malloc keep freed memory; transformers runs as it is found, and with that borrowed. "
        "Memory is above that of the imports.",
        "",
        "| model | dtype | pyllm | transformers | transformers' time / pyllm's "
        "| with memory kept | memory, pyllm | transformers |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in content["cases"]:
        speed, memory = case["tokens_per_second"], case["memory"]
        lines.append(
            f"| `{case['preset']}` | {case['dtype']} | {speed['pyllm']:,.0f} tokens/s "
            f"| {speed['transformers']:,.0f} tokens/s (`{case['experts_implementation']}`) "
            f"| {case['ratio']:.2f} x | {case['ratio_memory_kept']:.2f} x "
            f"| {memory['pyllm']['peak'] / 1e6:,.0f} MB "
            f"| {memory['transformers']['peak'] / 1e6:,.0f} MB |"
        )
    return [*lines, "", machine_line(path, content["machine"]), ""]


def growth() -> list[str]:
    """What a unit of work costs as one size grows."""
    found = newest("growth")
    if found is None:
        return []
    path, content = found
    missed = [table for table in content["tables"] if not table["holds"]]
    lines = [
        "What a unit of work costs as one size grows and the others stay those of a layer of "
        f"`moe-158m`, on {content['threads']} threads: picoseconds for each floating-point "
        "operation, or byte where memory limits. The target is that the largest size costs no "
        f"more than {content['limit']} times the best: {len(content['tables']) - len(missed)} of "
        f"{len(content['tables'])} rows meet it.",
        "",
    ]
    for axis in dict.fromkeys(table["axis"] for table in content["tables"]):
        tables = [table for table in content["tables"] if table["axis"] == axis]
        sizes = [f"{row['size']:,}" for row in tables[0]["rows"]]
        lines += [
            f"| by {axis} | dtype | pass | of each | {' | '.join(sizes)} | largest / best |",
            "|---|---|---|---|" + "---|" * (len(sizes) + 1),
        ]
        for table in tables:
            costs = " | ".join(f"{row['cost'] * 1e12:.3g}" for row in table["rows"])
            ratio = f"{table['ratio']:.2f}" if table["holds"] else f"**{table['ratio']:.2f}**"
            lines.append(
                f"| {table['name']} | {table['dtype']} | {table['stage']} "
                f"| {'FLOP' if table['unit'] == 'flops' else 'byte'} | {costs} | {ratio} |"
            )
        lines.append("")
    return [*lines, machine_line(path, content["machine"]), ""]


def decoding() -> list[str]:
    """Writing and reading a prompt beside llama.cpp, and what writing takes in memory."""
    lines = []
    found = newest("decode")
    if found is not None:
        path, content = found
        prompts = list(content["cases"][0]["prefill"])
        heads = [f"prompt of {n} | llama.cpp / pyllm" for n in prompts]
        lines += [
            f"Writing one token after {content['context']} others, and reading a prompt, on "
            f"{content['threads']} threads, beside llama.cpp on the same weights (int8 beside "
            "Q8_0). The share is that of the speed at which this machine reads memory, in the "
            "same run.",
            "",
            f"| model | weights | a token | llama.cpp / pyllm | share | {' | '.join(heads)} |",
            "|---|---|---|---|---|" + "---|" * 2 * len(prompts),
        ]
        for case in content["cases"]:
            cells = []
            for n in prompts:
                cells.append(f"{case['prefill'][n]['pyllm']['median'] * 1e3:.1f} ms")
                ratio = case.get("prefill_ratio", {}).get(n)
                cells.append("not run" if ratio is None else f"{ratio:.2f} x")
            ratio = f"{case['decode_ratio']:.2f} x" if "decode_ratio" in case else "not run"
            lines.append(
                f"| `{case['preset']}` | {case['dtype']} "
                f"| {case['decode']['pyllm']['median'] * 1e3:.2f} ms | {ratio} "
                f"| {case['share_of_bandwidth']:.0%} | {' | '.join(cells)} |"
            )
        lines += ["", machine_line(path, content["machine"]), ""]
    found = newest("memory")
    if found is not None:
        path, content = found
        parts = [
            f"{case['peak'] / 1e6:.0f} MB in {case['dtype']} (its file has "
            f"{case['file'] / 1e6:.0f} MB)"
            for case in content["cases"]
        ]
        lines += [
            f"Writing {content['tokens']} tokens with `{content['cases'][0]['preset']}` takes, "
            f"above an interpreter with torch imported, at its peak {', '.join(parts)}.",
            "",
            machine_line(path, content["machine"]),
            "",
        ]
    return lines


def presets() -> list[str]:
    """Parameters and operations of every preset, counted from its configuration."""
    from pyllm.models import PRESETS, count_flops, count_parameters

    lines = [
        "| preset | parameters | active, without embeddings | forward, 128 tokens | experts save |",
        "|---|---|---|---|---|",
    ]
    for name, config in PRESETS.items():
        parameters, flops = count_parameters(config), count_flops(config, 128)
        saved = f"{flops.saved_by_sparsity:.1%}" if flops.experts_dense else "dense"
        lines.append(
            f"| `{name}` | {parameters.total / 1e6:.1f}M | {parameters.active / 1e6:.1f}M "
            f"| {flops.total / 1e9:.2f} GFLOP | {saved} |"
        )
    seed = PRESETS["moe-158m-gpt"]
    tokens = round(SEED_FLOPS / count_flops(seed, 1).experts)
    flops = count_flops(seed, tokens)
    return [
        *lines,
        "",
        f"Counted by `pyllm.models.count_parameters` and `count_flops`. The {SEED_FLOPS / 1e9} "
        f"GFLOPs that are told of a model of `moe-158m-gpt`'s shape are what its chosen experts "
        f"take for {tokens} tokens ({flops.experts / 1e9:.2f}; all 16 would take "
        f"{flops.experts_dense / 1e9:.1f}). The whole forward pass over {tokens} tokens, "
        f"attention and output projection included, takes {flops.total / 1e9:.1f}.",
        "",
    ]


def sparsity() -> list[str]:
    """A mixture of experts beside its dense twin."""
    found = newest("moe-vs-dense")
    if found is None:
        return []
    path, content = found
    train, seeds = content["train"], len(content["runs"]["mixture"])
    tokens_per_step = train["batch_size"] * train["accumulation"] * train["seq_len"]
    lines = [
        f"Does sparsity pay? `moe-tiny` beside a dense model of the same active compute, {seeds} "
        f"runs of each on {content['text']}:",
        "",
        "| model | parameters | steps | tokens | training steps | val_loss (spread) | val_bpb |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind, summary in content["summary"].items():
        model = content["mixture" if kind == "mixture" else "dense"]
        steps = content["steps"][kind]
        bits = summary["val_bpb"]
        lines.append(
            f"| {kind} | {model['total'] / 1e6:.1f}M | {steps} "
            f"| {steps * tokens_per_step / 1e6:.2f}M | {steps * summary['median_step']:.0f} s "
            f"| {summary['val_loss']:.3f} ({summary['val_loss_spread']:.3f}) "
            f"| {'none' if bits is None else f'{bits:.3f}'} |"
        )
    picture = "benchmarks/results/moe-vs-dense.svg"
    return [
        *lines,
        "",
        f"![The losses of both]({picture})",
        "",
        machine_line(path, content["machine"]),
        "",
    ]


def render() -> str:
    """The block, with its marks."""
    parts = (stories, sparsity, scaling, training, decoding, presets, operations, growth)
    return "\n".join([BEGIN, "", *(line for part in parts for line in part()), END])


def replaced(text: str) -> str:
    """``text`` with the block written anew."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + render() + after


@dataclass
class Config:
    """Write the figures of README.md anew from the newest results."""


def main(config: Config) -> None:
    """Replace the block."""
    readme = ROOT / "README.md"
    readme.write_text(replaced(readme.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    _cli.run(main, Config)
