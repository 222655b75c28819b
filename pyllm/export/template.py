"""The chat template of a model folder, which a user may have changed."""

import re
from pathlib import Path

from pyllm._checks import shown
from pyllm.models.durable import read_json
from pyllm.models.folder import CHAT_TEMPLATE, stored_chat_template


def read_chat_template(folder: Path) -> str:
    """``chat_template.jinja`` of a model folder, or what ``tokenizer_config.json`` has, or ChatML.

    Raises:
        ValueError: the file is damaged, or has several templates.
    """
    path = folder / "tokenizer_config.json"
    template = stored_chat_template(folder, read_json(path) if path.is_file() else {})
    if template is None:
        return CHAT_TEMPLATE
    if not isinstance(template, str):
        raise ValueError(f"{path}: chat_template must be one text, got {shown(template)}")
    return template


def without_generation_marks(template: str) -> str:
    """The same template for Jinja without transformers' ``generation`` tag.

    The marks tell which part a model learns to write, for a loss mask; older readers of GGUF stop
    at an unknown tag. A condition that always holds stands in their place, so that trimmed spaces
    stay trimmed.
    """
    template = re.sub(r"(\{%[-+]?\s*)generation(\s*[-+]?%\})", r"\1if true\2", template)
    return re.sub(r"(\{%[-+]?\s*)endgeneration(\s*[-+]?%\})", r"\1endif\2", template)
