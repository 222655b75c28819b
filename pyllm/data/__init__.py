"""Data: documents in, token files on disk, packed batches out; and the embedded stories.

Light to import: torch and datasets are loaded where they are used.
"""

from pyllm.data.packing import PackedBatches
from pyllm.data.stories import write_stories
from pyllm.data.texts import SEPARATOR, read_texts, split_documents, story_windows
from pyllm.data.token_file import Sidecar, TokenFile, sidecar_path, write_tokens

__all__ = [
    "SEPARATOR",
    "PackedBatches",
    "Sidecar",
    "TokenFile",
    "read_texts",
    "sidecar_path",
    "split_documents",
    "story_windows",
    "write_stories",
    "write_tokens",
]
