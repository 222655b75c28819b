"""Generation: sampling, text that streams, batches, chat, which expert wrote which word, timing.

Imported lazily, so that :class:`SamplingConfig` can be read (and ``--help`` printed) without torch.
"""

from typing import TYPE_CHECKING

from pyllm._lazy import lazy_names

if TYPE_CHECKING:
    from pyllm.generate.chat import ChatTemplate
    from pyllm.generate.config import SamplingConfig
    from pyllm.generate.decode import (
        generate,
        generate_ids,
        generate_text,
        prompt_ids,
        stream_texts,
    )
    from pyllm.generate.experts import expert_trace
    from pyllm.generate.find import find_model, folder_settings, pick_dtype
    from pyllm.generate.language_model import LanguageModel
    from pyllm.generate.measure import DecodeTimes, peak_memory_bytes, time_decode
    from pyllm.generate.sampling import sample_token
    from pyllm.generate.session import Session, Timing, next_logits
    from pyllm.generate.stream import TextStream

_HOMES = {
    "ChatTemplate": "chat",
    "SamplingConfig": "config",
    "generate": "decode",
    "generate_ids": "decode",
    "generate_text": "decode",
    "prompt_ids": "decode",
    "stream_texts": "decode",
    "expert_trace": "experts",
    "find_model": "find",
    "folder_settings": "find",
    "pick_dtype": "find",
    "LanguageModel": "language_model",
    "DecodeTimes": "measure",
    "peak_memory_bytes": "measure",
    "time_decode": "measure",
    "sample_token": "sampling",
    "Session": "session",
    "Timing": "session",
    "next_logits": "session",
    "TextStream": "stream",
}

__all__ = [
    "ChatTemplate",
    "DecodeTimes",
    "LanguageModel",
    "SamplingConfig",
    "Session",
    "TextStream",
    "Timing",
    "expert_trace",
    "find_model",
    "folder_settings",
    "generate",
    "generate_ids",
    "generate_text",
    "next_logits",
    "peak_memory_bytes",
    "pick_dtype",
    "prompt_ids",
    "sample_token",
    "stream_texts",
    "time_decode",
]

__getattr__ = lazy_names(__name__, _HOMES)
