"""Compile the Triton kernels for real cards without one, and print what the assembler says.

Run as a program of its own, since ``TRITON_INTERPRET`` must not be set when triton is imported:
``python tests/ops/triton_compile.py moe_ffn bf16 90`` prints one JSON object per variant (see
``triton_kernels/_variants.py``). Operations, dtypes and compute capabilities are all of them where
none is named. With ``even`` or ``odd`` every other variant of each kernel is compiled, and said so.
"""

import contextlib
import io
import json
import os
import re
import sys
import tempfile
from collections import Counter
from typing import Any

os.environ["TRITON_DUMP_PTXAS_LOG"] = "1"

import triton
from pyllm.triton_kernels._tuning import CARD_OPTIONS
from pyllm.triton_kernels._variants import Variant
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pyllm.ops._registry import face_module
from pyllm.testing import OPERATIONS

CAPABILITIES = (80, 86, 89, 90)
DTYPES = ("fp32", "bf16", "fp16", "fp64")
LIMITS = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024}
"""Bytes of shared memory a block may have (CUDA C++ programming guide, compute capabilities)."""

NARROW = re.compile(r"\b(?:ld|st)\.global[.\w:]*\.[bus](?:8|16)\b")
"""One 16-bit number at a time, or less; no such load goes to shared memory in the background."""
MMA = re.compile(r"\b(?:mma\.sync|wgmma\.mma_async)\b")


def compile_variant(variant: Variant, capability: int) -> dict[str, Any]:
    """What came of it: shared memory, spilled bytes, registers, instructions that tell."""
    kernel = variant.kernel
    names = kernel.arg_names
    aligned = (*kernel.pointers, *kernel.lengths) if variant.aligned else ()
    source = ASTSource(
        fn=kernel.aligned if variant.aligned else kernel.ragged,
        # In the order of the parameters: Triton counts on it.
        signature={
            name: "constexpr" if name in variant.constants else variant.signature[name]
            for name in names
        },
        constexprs=variant.constants,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    report = io.StringIO()
    # A cached result comes without the assembler's report.
    with tempfile.TemporaryDirectory() as cache, contextlib.redirect_stdout(report):
        os.environ["TRITON_CACHE_DIR"] = cache
        compiled = triton.compile(
            source,
            target=GPUTarget("cuda", capability, 32),
            options={
                "num_warps": variant.num_warps,
                "num_stages": variant.num_stages,
                **CARD_OPTIONS,
            },
        )
    spilled = re.findall(r"(\d+) bytes spill stores", report.getvalue())
    registers = re.findall(r"Used (\d+) registers", report.getvalue())
    if not spilled or not registers:
        raise RuntimeError(f"the assembler reported nothing: {report.getvalue()!r}")
    return {
        "shared": compiled.metadata.shared,
        "limit": LIMITS[capability],
        "spilled": sum(map(int, spilled)),
        "registers": max(map(int, registers)),
        "narrow": len(NARROW.findall(compiled.asm["ptx"])),
        "mma": len(MMA.findall(compiled.asm["ptx"])),
    }


def main(arguments: list[str]) -> None:
    """Compile what was asked for; a failure to compile is a traceback and a nonzero exit."""
    operations = [name for name in OPERATIONS if name in arguments] or list(OPERATIONS)
    dtypes = [dtype for dtype in DTYPES if dtype in arguments] or DTYPES[:3]
    capabilities = [c for c in CAPABILITIES if str(c) in arguments] or CAPABILITIES
    left_out = {"even": 1, "odd": 0}.get(arguments[-1]) if arguments else None
    for operation in operations:
        module = face_module(operation, "triton")
        for dtype in dtypes if module else ():
            seen: Counter[str] = Counter()
            for variant in module.variants(dtype):
                compiled = seen[variant.kernel.name] % 2 != left_out
                seen[variant.kernel.name] += 1
                for capability in capabilities:
                    chosen = variant.shared <= LIMITS[capability]
                    row = {
                        "operation": operation,
                        "variant": variant.name,
                        "kernel": variant.kernel.name,
                        "dtype": dtype,
                        "capability": capability,
                        "chosen": chosen,
                        "compiled": chosen and compiled,
                        "wants_mma": variant.mma,
                        "aligned": variant.aligned,
                        "estimate": variant.shared,
                    }
                    if chosen and compiled:
                        row |= compile_variant(variant, capability)
                    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
