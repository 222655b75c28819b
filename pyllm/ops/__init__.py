"""The doors: one public function per operation.

Each is registered with PyTorch's dispatcher and has several faces: ``reference`` (plain PyTorch,
to read), ``cpu`` (C++), ``triton`` (GPU), ``torch`` (PyTorch's own fused operation). The face is
chosen by the ``face`` argument, then by the environment variable ``PYLLM_FACE`` (read at import),
then it is the best one for the device.
"""

from pyllm.ops._registry import available_faces
from pyllm.ops.attention import attention
from pyllm.ops.decode_attention import decode_attention
from pyllm.ops.int8_linear import int8_linear, quantize_int8
from pyllm.ops.kv_append import kv_append
from pyllm.ops.linear_cross_entropy import linear_cross_entropy
from pyllm.ops.moe_combine import moe_combine
from pyllm.ops.moe_dispatch import Dispatch, moe_dispatch
from pyllm.ops.moe_ffn import moe_ffn
from pyllm.ops.rms_norm import rms_norm
from pyllm.ops.rope import rope
from pyllm.ops.route_topk import Routing, route_topk

__all__ = [
    "Dispatch",
    "Routing",
    "attention",
    "available_faces",
    "decode_attention",
    "int8_linear",
    "kv_append",
    "linear_cross_entropy",
    "moe_combine",
    "moe_dispatch",
    "moe_ffn",
    "quantize_int8",
    "rms_norm",
    "rope",
    "route_topk",
]
