"""What stands beside ``tokenizer.json`` in a Hugging Face folder, and would change the tokens."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pyllm._checks import shown
from pyllm.models.durable import check_manifest, read_json
from pyllm.tokenizers import Tokenizer

SETTINGS = "tokenizer_config.json"
_LISTS = ("additional_special_tokens", "extra_special_tokens")
_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")
_MORE_NAMES = ("sep_token", "cls_token")
_SAVE = "save the tokenizer again with save_pretrained of transformers, which puts all into one"


def named_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """``bos_token``, ``eos_token``, ``unk_token`` and ``pad_token``, those that
    ``tokenizer_config.json`` names."""
    found = {name: _content(settings.get(name)) for name in _NAMES}
    return {name: content for name, content in found.items() if content is not None}


def check_tokenizer_files(folder: Path, tokenizer: Tokenizer, remedy: str) -> None:
    """transformers adds tokens from three more files, and from one a space before every text.

    Args:
        folder: of the model.
        tokenizer: its ``tokenizer.json``, with which all of this must agree.
        remedy: what else to do about a refusal.

    Raises:
        ValueError: a token that ``tokenizer.json`` does not have or has under another id,
            ``add_prefix_space``, a damaged file.
    """
    names = (SETTINGS, "special_tokens_map.json", "added_tokens.json")
    given = [name for name in names if (folder / name).is_file()]
    check_manifest(folder, given)
    files = {name: read_json(folder / name) for name in given}
    for name, settings in files.items():
        for token, id_ in _tokens(name, settings):
            own = tokenizer.token_to_id(token)
            if own is None or id_ not in (None, own):
                where = "" if id_ is None else f" (id {shown(id_)})"
                found = "is not in" if own is None else f"has the id {own} in"
                raise ValueError(
                    f"{folder / name}: its token {shown(token)}{where} {found} tokenizer.json, so "
                    f"that texts would become other tokens; {_SAVE}; {remedy}"
                )
    if files.get(SETTINGS, {}).get("add_prefix_space"):
        raise ValueError(
            f"{folder / SETTINGS}: its add_prefix_space is true, and tokenizer.json puts no space "
            f"before a text; {_SAVE}; {remedy}"
        )


def _tokens(name: str, settings: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every token that a file names, with its id where that is given, else None."""
    if name == "added_tokens.json":
        yield from settings.items()
        return
    decoder = settings.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        for id_, token in decoder.items():
            if (content := _content(token)) is not None:
                yield content, int(id_) if id_.isdecimal() else id_
    named: list[Any] = [settings.get(key) for key in (*_NAMES, *_MORE_NAMES)]
    for key in _LISTS:
        more = settings.get(key)
        named += more.values() if isinstance(more, dict) else more if isinstance(more, list) else []
    for token in named:
        if (content := _content(token)) is not None:
            yield content, None


def _content(token: Any) -> str | None:
    """A token is written as a text, or as an object with its ``content``."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None
