"""The parts of a model: small modules that call the doors in ``pyllm.ops``."""

from pyllm.layers.attention import CausalSelfAttention
from pyllm.layers.kv_cache import KVCache
from pyllm.layers.mlp import MLP
from pyllm.layers.moe import Dispatcher, LocalDispatcher, MoE, RouterStatistics
from pyllm.layers.norm import LayerNorm, RMSNorm
from pyllm.layers.position import LearnedPositions, RotaryTable, SinusoidalPositions
from pyllm.layers.step_cache import StepCache

__all__ = [
    "MLP",
    "CausalSelfAttention",
    "Dispatcher",
    "KVCache",
    "LayerNorm",
    "LearnedPositions",
    "LocalDispatcher",
    "MoE",
    "RMSNorm",
    "RotaryTable",
    "RouterStatistics",
    "SinusoidalPositions",
    "StepCache",
]
