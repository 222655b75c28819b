"""Generation: sampling, streaming with a kv cache, which expert wrote which word, timing.

Imported lazily, so that :class:`SamplingConfig` can be read (and ``--help`` printed) without torch.
"""

from typing import TYPE_CHECKING

from pyllm._lazy import lazy_names

if TYPE_CHECKING:
    from pyllm.generate.config import SamplingConfig
    from pyllm.generate.decode import (
        generate,
        generate_ids,
        generate_text,
        next_logits,
        prompt_ids,
    )
    from pyllm.generate.experts import expert_trace
    from pyllm.generate.find import find_model, pick_dtype
    from pyllm.generate.measure import DecodeTimes, peak_memory_bytes, time_decode
    from pyllm.generate.sampling import sample_token
    from pyllm.generate.stream import TextStream

_HOMES = {
    "SamplingConfig": "config",
    "generate": "decode",
    "generate_ids": "decode",
    "generate_text": "decode",
    "next_logits": "decode",
    "prompt_ids": "decode",
    "expert_trace": "experts",
    "find_model": "find",
    "pick_dtype": "find",
    "DecodeTimes": "measure",
    "peak_memory_bytes": "measure",
    "time_decode": "measure",
    "sample_token": "sampling",
    "TextStream": "stream",
}

__all__ = [
    "DecodeTimes",
    "SamplingConfig",
    "TextStream",
    "expert_trace",
    "find_model",
    "generate",
    "generate_ids",
    "generate_text",
    "next_logits",
    "peak_memory_bytes",
    "pick_dtype",
    "prompt_ids",
    "sample_token",
    "time_decode",
]

__getattr__ = lazy_names(__name__, _HOMES)
