"""Which tokens end a text, as the files of a model folder say."""

from pathlib import Path

from pyllm._checks import check_size
from pyllm.models.durable import check_manifest, read_json


def read_stop_ids(folder: Path, vocab_size: int) -> list[int] | None:
    """``eos_token_id`` of ``generation_config.json``, else of ``config.json``, in its order.

    Args:
        folder: of the model, ours or Hugging Face's.
        vocab_size: of the model. Its tokenizer may have fewer ids: a vocabulary is often padded.

    Returns:
        None where neither file names one.

    Raises:
        ValueError: a file is missing, damaged or changed, or an id is none of the model's.
    """
    names = ["config.json"]
    if (folder / "generation_config.json").exists():
        names.insert(0, "generation_config.json")
    check_manifest(folder, names)
    for path in (folder / name for name in names):
        stop = read_json(path).get("eos_token_id")
        if stop is not None:
            stops = stop if isinstance(stop, list) else [stop]
            return [check_size(f"{path}: eos_token_id", one, 0, vocab_size - 1) for one in stops]
    return None
