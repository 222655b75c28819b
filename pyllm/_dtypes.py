"""What the extensions call a dtype, the same in ``pyllm._cpu`` and ``pyllm._cuda``."""

from types import ModuleType

import torch

NAMES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}


def kernel_code(extension: ModuleType, face: str, op: str, dtype: torch.dtype) -> int:
    """The code of a dtype in an extension's kernels.

    Raises:
        ValueError: they have no such dtype.
    """
    name = NAMES.get(dtype)
    if name is None:
        expected = ", ".join(str(known) for known in NAMES)
        raise ValueError(f"{op}: the {face} face has no {dtype}; expected one of {expected}")
    code: int = extension.DTYPES[name]
    return code
