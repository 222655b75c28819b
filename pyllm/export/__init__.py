"""Export: model folders that transformers and vLLM load, files that llama.cpp loads.

Imported lazily, so that ``--help`` needs no torch.
"""

from typing import TYPE_CHECKING

from pyllm._lazy import lazy_names

if TYPE_CHECKING:
    from pyllm.export.gguf_file import GGUF_DTYPES, write_gguf
    from pyllm.export.hugging_face import write_hugging_face
    from pyllm.export.text_settings import TextSettings, read_text_settings

_HOMES = {
    "GGUF_DTYPES": "gguf_file",
    "TextSettings": "text_settings",
    "read_text_settings": "text_settings",
    "write_gguf": "gguf_file",
    "write_hugging_face": "hugging_face",
}

__all__ = [
    "GGUF_DTYPES",
    "TextSettings",
    "read_text_settings",
    "write_gguf",
    "write_hugging_face",
]

__getattr__ = lazy_names(__name__, _HOMES)
