"""What stands beside a model's weights about texts: how they begin and end, and how one chats."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pyllm._checks import shown
from pyllm.generate import LanguageModel
from pyllm.models.durable import read_json, readable_folder
from pyllm.models.folder import CHAT_TEMPLATE, SAMPLING, stored_chat_template
from pyllm.models.foreign_tokenizer import named_tokens
from pyllm.tokenizers import Tokenizer


@dataclass(frozen=True)
class TextSettings:
    """How programs shall prompt a model and where they shall stop."""

    begin_ids: Sequence[int]
    """What the model is given before every text; may be empty."""
    stop_ids: Sequence[int]
    """Each ends a text. The first is the end to programs that know of one only."""
    chat_template: str | None = CHAT_TEMPLATE
    """Jinja."""
    names: Mapping[str, str] = field(default_factory=dict)
    """``bos_token``, ``eos_token``, ``unk_token``, ``pad_token``: special tokens of these parts."""
    generation: Mapping[str, Any] = field(default_factory=lambda: SAMPLING)
    """The other settings in ``generation_config.json``."""

    @classmethod
    def of_tokenizer(cls, tokenizer: Tokenizer) -> "TextSettings":
        """Those of a model that pyllm trained: end-of-text begins a text and ends it."""
        return cls([tokenizer.end_of_text_id], [tokenizer.end_of_text_id])

    def special_names(self, tokenizer: Tokenizer) -> dict[str, str]:
        """``names``, and where they leave one out that the ids or the tokenizer tell, this."""
        ids = {
            "bos_token": next(iter(self.begin_ids), None),
            "eos_token": next(iter(self.stop_ids), None),
            "pad_token": tokenizer.pad_id,
        }
        # Only special ones: transformers would make a special token of any that is named here.
        tokens = {id_: token for token, id_ in tokenizer.special_tokens.items()}
        told = {name: tokens[id_] for name, id_ in ids.items() if id_ in tokens}
        return told | dict(self.names)

    def bos_id(self, tokenizer: Tokenizer) -> int | None:
        """The first of ``begin_ids``, else the token called ``bos_token``, if there is one."""
        if self.begin_ids:
            return self.begin_ids[0]
        return tokenizer.token_to_id(self.names["bos_token"]) if "bos_token" in self.names else None


def read_text_settings(model: LanguageModel) -> TextSettings:
    """The settings of a loaded model's folder, which a user may have changed.

    Raises:
        ValueError: a file is damaged, or has several chat templates.
    """
    assert model.folder is not None
    folder, end = readable_folder(model.folder), model.tokenizer.end_of_text_id
    files: dict[str, dict[str, Any]] = {
        name: read_json(folder / name) if (folder / name).is_file() else {}
        for name in ("config.json", "tokenizer_config.json", "generation_config.json")
    }
    is_ours = files["config.json"].get("model_type") == "pyllm"
    tokenizer_settings = files["tokenizer_config.json"]
    template = stored_chat_template(folder, tokenizer_settings)
    if template is None and is_ours:
        template = CHAT_TEMPLATE
    if not isinstance(template, str | None):
        raise ValueError(
            f"{folder / 'tokenizer_config.json'}: chat_template must be one text, got "
            f"{shown(template)}"
        )
    return TextSettings(
        begin_ids=model.begin_ids,
        stop_ids=sorted(model.stop_ids, key=lambda id_: (id_ != end, id_)),
        chat_template=template,
        names=named_tokens(tokenizer_settings),
        generation=files["generation_config.json"],
    )


def without_generation_marks(template: str) -> str:
    """The same template for Jinja without transformers' ``generation`` tag.

    The marks tell which part a model learns to write, for a loss mask; older readers of GGUF stop
    at an unknown tag. A condition that always holds stands in their place, so that trimmed spaces
    stay trimmed.
    """
    template = re.sub(r"(\{%[-+]?\s*)generation(\s*[-+]?%\})", r"\1if true\2", template)
    return re.sub(r"(\{%[-+]?\s*)endgeneration(\s*[-+]?%\})", r"\1endif\2", template)
