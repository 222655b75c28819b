"""Weights as Hugging Face lays them out: one safetensors file, or several and an index.

``model.safetensors.index.json`` of a folder that ``save_pretrained`` split holds a ``weight_map``:
tensor to file.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyllm._checks import shown
from pyllm.models.config import ModelConfig
from pyllm.models.durable import open_tensors, read_json
from pyllm.models.hugging_face import Part, tensor_parts

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth")
ADAPTER = "adapter_config.json"
_FLOATS = ("F32", "BF16", "F16", "F64")
_OUTPUT, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


class Shards:
    """The tensors of a folder, whichever file each lies in.

    Args:
        path: the file, or the index.
        files: tensor to open safetensors file.
    """

    def __init__(self, path: Path, files: dict[str, Any]) -> None:
        self.path = path
        self._files = files

    @property
    def names(self) -> set[str]:
        """Of all tensors."""
        return set(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Without reading the numbers."""
        return tuple(self._files[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """As safetensors spells it: ``F32``, ``BF16``, ``I8``, ``F8_E4M3``."""
        return str(self._files[name].get_slice(name).get_dtype())

    def widest_dtype(self) -> torch.dtype:
        """float64 where a tensor is, else float32, which holds the narrower ones."""
        wide = any(self.dtype(name) == "F64" for name in self._files)
        return torch.float64 if wide else torch.float32

    def tensor(self, name: str) -> Tensor:
        """Read one."""
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor


def holds_weights(folder: Path) -> bool:
    """Is there something to load, or to refuse with a better reason than that there is nothing?"""
    return any((folder / name).is_file() for name in (WEIGHTS, INDEX, *PICKLES, ADAPTER))


def weight_files(folder: Path) -> list[str]:
    """Names of the files that hold the weights, the index among them.

    Raises:
        ValueError: there are none, or only pickled ones; a damaged index.
    """
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    if (folder / INDEX).is_file():
        return [INDEX, *sorted(set(_weight_map(folder).values()))]
    pickles = [name for name in PICKLES if (folder / name).is_file()]
    if pickles:
        raise ValueError(
            f"{folder}: only pickled weights ({pickles[0]}), which run whatever code is in them "
            f"when read; expected {WEIGHTS}: save the model with safetensors in transformers"
        )
    raise ValueError(f"{folder / WEIGHTS}: no such file, and no {INDEX}; expected a model folder")


@contextmanager
def open_shards(folder: Path) -> Iterator[Shards]:
    """Open the weights of a folder for reading.

    Raises:
        ValueError: a file is missing or damaged, or does not hold what the index says.
    """
    first, *shards = weight_files(folder)
    path = folder / first
    with ExitStack() as stack:
        opened = {
            name: stack.enter_context(open_tensors(folder / name)) for name in shards or [first]
        }
        held = {name: set(file.keys()) for name, file in opened.items()}
        if shards:
            for tensor, name in _weight_map(folder).items():
                if tensor not in held[name]:
                    raise ValueError(
                        f"{folder / name}: no tensor {tensor}, which {path} says it has"
                    )
        files: dict[str, Any] = {}
        for name, tensors in held.items():
            twice = sorted(tensors & files.keys())
            if twice:
                raise ValueError(f"{folder / name}: {twice[0]} is in another file of {path}, too")
            files |= dict.fromkeys(tensors, opened[name])
        yield Shards(path, files)


def _weight_map(folder: Path) -> dict[str, str]:
    path = folder / INDEX
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path}: damaged: no object 'weight_map' of tensors and files in it")
    for name in weight_map.values():
        # A name such as ../../x would leave the folder.
        if not isinstance(name, str) or not name or Path(name).name != name:
            raise ValueError(f"{path}: {shown(name)} is not the name of a file in this folder")
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name}: no such file; {path} says that weights are in it")
    return weight_map


def check_weights(shards: Shards, config: ModelConfig) -> None:
    """Do the files hold exactly the tensors of this model? Nothing is read for it but headers.

    Raises:
        ValueError: a tensor is missing, unknown, of another shape, or not of floats.
    """
    # Frequencies that old files keep follow from rope_theta; transformers does not read them.
    names = {name for name in shards.names if not name.endswith("rotary_emb.inv_freq")}
    if config.n_layers * (config.n_experts if config.moe_every else 1) > len(names):
        raise ValueError(
            f"{shards.path}: holds {len(names)} tensors, too few for {config.n_layers} layers"
            + (f" of {config.n_experts} experts" if config.moe_every else "")
        )
    parts = [part for _, parts in tensor_parts(config) for part in parts]
    expected = {part.name for part in parts}
    unknown = names - expected
    if config.tie_embeddings and _OUTPUT in unknown and _EMBEDDING in names:
        _check_tied(shards)
        unknown.remove(_OUTPUT)
    if unknown or not expected <= names:
        raise ValueError(
            f"{shards.path}: missing tensors {sorted(expected - names)[:3]}, unknown tensors "
            f"{sorted(unknown)[:3]}"
        )
    for part in parts:
        shape, dtype = shards.shape(part.name), shards.dtype(part.name)
        if shape != part.shape:
            raise ValueError(
                f"{shards.path}: {part.name} must have shape {part.shape}, got {shape}"
            )
        if dtype not in _FLOATS:
            raise ValueError(
                f"{shards.path}: {part.name} must hold {', '.join(_FLOATS)}, got {dtype}; "
                "quantised weights cannot be loaded"
            )


def _check_tied(shards: Shards) -> None:
    output, embedding = shards.tensor(_OUTPUT), shards.tensor(_EMBEDDING)
    if output.dtype != embedding.dtype or not torch.equal(output, embedding):
        raise ValueError(
            f"{shards.path}: {_OUTPUT} is not {_EMBEDDING}, as tie_word_embeddings in config.json "
            "says"
        )


def read_weights(shards: Shards, config: ModelConfig, state: dict[str, Tensor]) -> None:
    """Copy the tensors into a model's, part by part.

    Raises:
        ValueError: a number is NaN or infinite, or becomes so in the model's dtype.
    """
    for name, parts in tensor_parts(config):
        for target, part in zip(split_rows(state[name], parts), parts, strict=True):
            tensor = shards.tensor(part.name)
            target.copy_(tensor)
            # The extremes are NaN where a number is. 2% of the time to load 116 MB from memory, on
            # one thread; isfinite of every number took 24%.
            if not torch.stack(torch.aminmax(target)).isfinite().all():
                kind = str(target.dtype).removeprefix("torch.")
                reason = (
                    f"a number beyond the range of {kind}; load it as another dtype"
                    if tensor.isfinite().all()
                    else "a number that is NaN or infinite; the file is damaged, or its model was"
                )
                raise ValueError(f"{shards.path}: {part.name} holds {reason}")


def split_rows(tensor: Tensor, parts: list[Part]) -> tuple[Tensor, ...]:
    """Views of one of our tensors: its parts in a Hugging Face folder."""
    if len(parts) == 1:  # norms have no rows
        return (tensor.view(parts[0].shape),)
    return tensor.flatten(0, -2).split([part.shape[0] for part in parts])
