"""Small models that are not symmetric in anything, and transformers without its bars."""

import os
from collections.abc import Callable
from types import ModuleType

import pytest
import torch

from pyllm.models import ModelConfig, Transformer
from pyllm.tokenizers import Tokenizer, train_bpe

TEXTS = ["Once there was a fox, and the fox had 12 eggs. ", "Nobody knew, it's so: 3 of 45! "] * 20


@pytest.fixture(autouse=True)
def one_thread(set_threads: Callable[[int], None]) -> None:
    """These models are so small that a second thread costs more than it brings."""
    set_threads(1)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_bpe(TEXTS, 300)


@pytest.fixture(scope="session")
def transformers() -> ModuleType:
    """Imported only by the tests that need it: over a second."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import transformers

    transformers.utils.logging.disable_progress_bar()
    return transformers


def small(tokenizer: Tokenizer, **changes: object) -> ModelConfig:
    """A dense model with grouped-query attention, but for the changes."""
    settings: dict[str, object] = {
        "vocab_size": tokenizer.vocab_size,
        "max_seq_len": 64,
        "n_layers": 2,
        "d_model": 32,
        "n_heads": 4,
        "n_kv_heads": 2,
        "d_ff": 64,
        "moe_every": 0,
        "norm_eps": 1e-4,
        "rope_theta": 1000.0,
    }
    return ModelConfig(**(settings | changes))  # type: ignore[arg-type]


def lively(config: ModelConfig, seed: int = 0) -> Transformer:
    """A random model in which every weight matters: logits of size 1, norms that are not ones."""
    torch.manual_seed(seed)
    model = Transformer(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.startswith("embedding") or name.endswith("router"):
                parameter.mul_(20)
    return model


VARIANTS: dict[str, dict[str, object]] = {
    "mha": {"n_kv_heads": 4},
    "gqa": {},
    "mqa-untied": {"n_kv_heads": 1, "tie_embeddings": False},
    "window": {"window": 7},
    "moe": {"moe_every": 1, "n_experts": 6, "top_k": 2},
    "one-expert": {"moe_every": 1, "n_experts": 1, "top_k": 1},
    "moe-window-untied": {
        "moe_every": 1,
        "n_experts": 4,
        "top_k": 3,
        "window": 5,
        "tie_embeddings": False,
    },
    "linear": {"rope_scaling": "linear", "rope_factor": 2.5},
    "llama3": {"rope_scaling": "llama3", "rope_factor": 4.0, "rope_original_len": 16},
    "yarn": {"rope_scaling": "yarn", "rope_factor": 4.0, "rope_original_len": 16},
    "yarn-full-length": {"rope_scaling": "yarn", "rope_factor": 4.0, "rope_original_len": 64},
    "moe-yarn": {
        "rope_scaling": "yarn",
        "rope_factor": 2.0,
        "rope_original_len": 32,
        "moe_every": 1,
    },
}
"""What the three Hugging Face architectures can be."""
