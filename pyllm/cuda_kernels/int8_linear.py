"""A linear layer with int8 weights in CUDA C++: ``csrc/cuda/int8_linear.cu``."""

import torch
from torch import Tensor

from pyllm.cuda_kernels._launch import ALIGNMENT, dtype_code, launch, ready
from pyllm.reference._precision import accumulation_dtype


def int8_linear_forward(
    x_ND: Tensor, weight_FD: Tensor, weight_scale_F: Tensor, quantize_input: bool
) -> Tensor:
    """See :func:`pyllm.reference.int8_linear.int8_linear_forward`."""
    code, wide = dtype_code("int8_linear", x_ND.dtype), accumulation_dtype(x_ND.dtype)
    n_rows, width = x_ND.shape
    n_features = weight_FD.shape[0]
    x_ND, weight_FD, weight_scale_F = ready(x_ND), ready(weight_FD), ready(weight_scale_F, wide)
    y_NF = x_ND.new_empty(n_rows, n_features)
    sizes = (n_rows, n_features, width)
    if not quantize_input:
        launch("int8_weights", code, x_ND, weight_FD, weight_scale_F, y_NF, *sizes)
        return y_NF
    pitch = -(-width // ALIGNMENT) * ALIGNMENT
    q_ND = x_ND.new_empty(n_rows, pitch, dtype=torch.int8)
    scale_N = x_ND.new_empty(n_rows, dtype=torch.float32)
    launch("quantize_rows", code, x_ND, q_ND, scale_N, n_rows, width, pitch)
    launch("int8_matmul", code, q_ND, scale_N, weight_FD, weight_scale_F, y_NF, *sizes, pitch)
    return y_NF
