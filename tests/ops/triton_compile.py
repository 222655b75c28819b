"""Compile the Triton kernels for real cards without one, and print what the assembler says.

Run as a program of its own, since ``TRITON_INTERPRET`` must not be set when triton is imported:
``python tests/ops/triton_compile.py`` prints one JSON object per kernel, card, dtype and width.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from pyllm.triton_kernels import rms_norm
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

CAPABILITIES = (80, 86, 90)
WIDTHS = (100, 2048, 8192, 16384)
DTYPES = ("fp32", "bf16", "fp16")


def sources(dtype: str, width: int) -> Iterator[tuple[str, Any, dict[str, int], dict[str, str]]]:
    """(name, kernel, launch options, type of each argument)."""
    pointer = f"*{dtype}"
    yield (
        "rms_norm_forward",
        rms_norm.forward_kernel,
        rms_norm.launch_options(width),
        {
            "x_ptr": pointer,
            "weight_ptr": pointer,
            "y_ptr": pointer,
            "rstd_ptr": "*fp32",
            "width": "i32",
            "eps": "fp32",
        },
    )
    yield (
        "rms_norm_backward",
        *rms_norm.backward_kernel_for(width),
        {
            "dy_ptr": pointer,
            "x_ptr": pointer,
            "weight_ptr": pointer,
            "rstd_ptr": "*fp32",
            "dx_ptr": pointer,
            "partial_ptr": "*fp32",
            "rows": "i32",
            "width": "i32",
            "rows_per_block": "i32",
        },
    )


def spilled_bytes(ptx: str, capability: int) -> int:
    """Bytes of registers that ptxas had to spill."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [
            get_ptxas(capability).path,
            "-v",
            f"-arch=sm_{capability}",
            source,
            "-o",
            source.with_suffix(""),
        ]
        # An `a` suffix (sm_90a) in the PTX must be repeated to the assembler.
        if target := re.search(r"\.target (sm_\w+)", ptx):
            command[2] = f"-arch={target[1]}"
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"ptxas: {result.stdout}{result.stderr}")
        report = result.stderr + result.stdout
    return sum(int(size) for size in re.findall(r"(\d+) bytes spill stores", report))


def main() -> None:
    """Compile everything; a failure to compile is a traceback and a nonzero exit."""
    for capability in CAPABILITIES:
        for dtype in DTYPES:
            for width in WIDTHS:
                for name, kernel, options, signature in sources(dtype, width):
                    constants = {"BLOCK_D": options["BLOCK_D"], "DOUBLE": False}
                    source = ASTSource(
                        fn=kernel,
                        signature={**signature, **dict.fromkeys(constants, "constexpr")},
                        constexprs=constants,
                    )
                    compiled = triton.compile(
                        source,
                        target=GPUTarget("cuda", capability, 32),
                        options={"num_warps": options["num_warps"]},
                    )
                    print(
                        json.dumps(
                            {
                                "kernel": name,
                                "capability": capability,
                                "dtype": dtype,
                                "width": width,
                                "shared": compiled.metadata.shared,
                                "spilled": spilled_bytes(compiled.asm["ptx"], capability),
                            }
                        ),
                        flush=True,
                    )


if __name__ == "__main__":
    sys.exit(main())
