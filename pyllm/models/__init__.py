"""Models: configuration, presets, the transformer, counting, saving and loading.

Imported lazily, so that a configuration can be read (and ``--help`` printed) without torch.
"""

from typing import TYPE_CHECKING

from pyllm._lazy import lazy_names

if TYPE_CHECKING:
    from pyllm.models.config import PRESETS, ModelConfig, preset
    from pyllm.models.counting import FlopCount, ParameterCount, count_flops, count_parameters
    from pyllm.models.device import choose_device, named_dtype
    from pyllm.models.folder import load_model, load_transformer, quantize_folder, save_model
    from pyllm.models.int8 import Int8Transformer, quantize_model
    from pyllm.models.transformer import Block, ModelOutput, Transformer

_HOMES = {
    "PRESETS": "config",
    "ModelConfig": "config",
    "preset": "config",
    "FlopCount": "counting",
    "ParameterCount": "counting",
    "count_flops": "counting",
    "count_parameters": "counting",
    "choose_device": "device",
    "named_dtype": "device",
    "load_model": "folder",
    "load_transformer": "folder",
    "quantize_folder": "folder",
    "save_model": "folder",
    "Int8Transformer": "int8",
    "quantize_model": "int8",
    "Block": "transformer",
    "ModelOutput": "transformer",
    "Transformer": "transformer",
}

__all__ = [
    "PRESETS",
    "Block",
    "FlopCount",
    "Int8Transformer",
    "ModelConfig",
    "ModelOutput",
    "ParameterCount",
    "Transformer",
    "choose_device",
    "count_flops",
    "count_parameters",
    "load_model",
    "load_transformer",
    "named_dtype",
    "preset",
    "quantize_folder",
    "quantize_model",
    "save_model",
]

__getattr__ = lazy_names(__name__, _HOMES)
