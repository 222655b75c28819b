"""The decode step alone, at small sizes: what the sanitizers run of it.

That its numbers are right, tests/generate/test_native.py shows. Here the same call on one thread
and on several gives the same bits, into memory that was NaN before.
"""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pyllm._native import cpu_extension
from pyllm.generate.native import native_model
from pyllm.models import ModelConfig, Transformer, quantize_model
from pyllm.testing.check import poisoned_memory

pytestmark = pytest.mark.skipif(cpu_extension() is None, reason="no C++ kernels here")

BASE = ModelConfig(
    vocab_size=37,
    max_seq_len=80,
    n_layers=2,
    d_model=24,
    n_heads=4,
    n_kv_heads=2,
    d_ff=11,
    n_experts=5,
    top_k=2,
)
GPT = replace(
    BASE, norm="layer", position="learned", activation="gelu", n_kv_heads=4, tie_embeddings=False
)
CONFIGS = {
    "mixture": BASE,
    "dense": replace(BASE, moe_every=0),
    "hybrid, shared": replace(BASE, moe_every=2, n_shared_experts=1, router_bias=True),
    "gpt": GPT,
    "odd": replace(BASE, d_model=21, n_heads=3, n_kv_heads=1, d_ff=5, position="sinusoidal"),
    "ring": replace(BASE, window=7, attention_sinks=2),
    "heads of 64": replace(BASE, d_model=128, n_heads=2),
}
STEPS: list[tuple[int, Sequence[int]]] = [
    (19, [19, 4, 0]),
    (1, [1, 1, 1]),
    (1, [0, 1, 0]),
    (34, [3, 0, 34]),
    (2, [2, 2, 2]),
    (1, [1, 1, 1]),
]


def make(config: ModelConfig, kind: str) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(config).eval()
    if kind == "int8":
        return quantize_model(model)
    return model.to(getattr(torch, kind))


@torch.inference_mode()
def logits(model: Transformer, threads: int, dtype: torch.dtype | None = None) -> list[Tensor]:
    found = native_model(model)
    assert found is not None
    cache = model.new_cache(3, dtype=dtype)
    # What was not written is not read.
    if cache.scales is None:
        cache.store.fill_(float("nan"))
    else:
        cache.store.fill_(77)
        cache.scales.fill_(float("nan"))
    generator = torch.Generator().manual_seed(1)
    results = []
    for n_tokens, counts in STEPS:
        ids = torch.randint(model.config.vocab_size, (3, n_tokens), generator=generator)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            with poisoned_memory():
                results.append(found.next_logits(ids, cache, counts))
        finally:
            torch.set_num_threads(before)
        assert len(results[-1]) == sum(count > 0 for count in counts)
        assert bool(results[-1].isfinite().all())
    return results


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("name", CONFIGS)
def test_one_thread_and_several(name: str, kind: str) -> None:
    model = make(CONFIGS[name], kind)
    first, *others = (logits(model, threads) for threads in (1, 2, 4))
    for other in others:
        assert all(torch.equal(one, two) for one, two in zip(first, other, strict=True))


@pytest.mark.parametrize("kind", ["float32", "int8"])
@pytest.mark.parametrize("name", ["mixture", "odd", "ring", "heads of 64"])
def test_one_thread_and_several_with_an_int8_cache(name: str, kind: str) -> None:
    model = make(CONFIGS[name], kind)
    first, *others = (logits(model, threads, torch.int8) for threads in (1, 2, 4))
    for other in others:
        assert all(torch.equal(one, two) for one, two in zip(first, other, strict=True))
