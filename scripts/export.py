"""Writes a model for other programs: python scripts/export.py --to gguf --dtype q8_0."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pyllm._cli import require_writable, run

SUFFIXES = {"hf": "-hf", "gguf": ".gguf"}


@dataclass(frozen=True)
class Config:
    """Writes a model for transformers and vLLM (hf) or llama.cpp (gguf)."""

    model: str | None = None
    """A run folder (its best checkpoint is taken) or a model folder; by default the run under
    runs/ that was saved last."""
    to: Literal["hf", "gguf"] = "hf"
    """hf: a Hugging Face folder of a Llama, Mistral or Mixtral. gguf: one file."""
    dtype: Literal["auto", "float32", "bfloat16", "float16", "q8_0"] = "auto"
    """Of the weights; auto: float32. q8_0, 8 bits with a scale for every 32, only for gguf."""
    out: Path | None = None
    """What to write, which must not exist; by default beside the model: its name with -hf or
    .gguf."""

    def __post_init__(self) -> None:
        if self.to == "hf" and self.out is not None and self.out.suffix.lower() == ".gguf":
            raise ValueError(
                f"out {self.out} is named as one file, and --to hf writes a folder; give --to gguf "
                "or another name"
            )
        if self.to == "hf" and self.dtype == "q8_0":
            raise ValueError("dtype q8_0 is only for --to gguf; Hugging Face folders have no such")


def main(config: Config) -> None:
    """Loads, writes, and says where."""
    from pyllm.export import read_text_settings, write_gguf, write_hugging_face
    from pyllm.generate import LanguageModel, find_model
    from pyllm.models import load_model

    folder = find_model(config.model)
    out = config.out or folder.with_name(folder.name + SUFFIXES[config.to])
    require_writable(out.parent)
    model, tokenizer = load_model(folder)
    texts = read_text_settings(LanguageModel(model, tokenizer, folder))
    if config.to == "hf":
        write_hugging_face(out, model, tokenizer, config.dtype, texts)
    else:
        of_a_run = folder.name in ("best", "last")
        name = (folder.resolve().parent if of_a_run else folder.resolve()).name
        write_gguf(out, model, tokenizer, config.dtype, texts, name)
    print(out)


if __name__ == "__main__":
    run(main, Config)
