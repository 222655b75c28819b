"""The declarations, one file per operation: inputs, hostile sizes, work, planted faults."""

from pyllm.testing.cases.attention import ATTENTION
from pyllm.testing.cases.decode_attention import DECODE_ATTENTION
from pyllm.testing.cases.int8_linear import INT8_LINEAR
from pyllm.testing.cases.kv_append import KV_APPEND
from pyllm.testing.cases.linear_cross_entropy import LINEAR_CROSS_ENTROPY
from pyllm.testing.cases.moe_combine import MOE_COMBINE
from pyllm.testing.cases.moe_dispatch import MOE_DISPATCH
from pyllm.testing.cases.moe_ffn import MOE_FFN
from pyllm.testing.cases.rms_norm import RMS_NORM
from pyllm.testing.cases.rope import ROPE
from pyllm.testing.cases.route_topk import ROUTE_TOPK
from pyllm.testing.declaration import Operation

OPERATIONS: dict[str, Operation] = {
    operation.name: operation
    for operation in (
        RMS_NORM,
        ROUTE_TOPK,
        MOE_DISPATCH,
        MOE_COMBINE,
        MOE_FFN,
        ATTENTION,
        KV_APPEND,
        DECODE_ATTENTION,
        ROPE,
        LINEAR_CROSS_ENTROPY,
        INT8_LINEAR,
    )
}

__all__ = ["OPERATIONS"]
