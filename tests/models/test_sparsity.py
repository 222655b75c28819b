"""Sparsity is real in moe-158m-gpt: counted where the experts run, at the model's full size."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pyllm.models import Transformer, count_flops, preset
from pyllm.reference.moe_ffn import moe_ffn_forward

CONFIG = preset("moe-158m-gpt")
N_TOKENS = 6


@pytest.fixture(scope="module")
def model() -> Transformer:
    torch.manual_seed(0)
    return Transformer(CONFIG).eval()


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(CONFIG.vocab_size, (1, N_TOKENS), generator=generator)


class ProductCounter(TorchDispatchMode):
    """Sees every matrix product that PyTorch runs."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: Counter[tuple[int, int]] = Counter()
        self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket is torch.ops.aten.mm:
            left, right = args
            # Which expert's matrix this is follows from where it lies in the stacked weights.
            expert = right.storage_offset() // right.numel()
            self.rows[right.untyped_storage().data_ptr(), expert] += left.shape[0]
            self.flops += 2 * left.shape[0] * right.numel()
        return func(*args, **(kwargs or {}))


class CountingDispatcher:
    """The textbook's experts, run under a counter."""

    def __init__(self) -> None:
        self.counter = ProductCounter()

    def __call__(self, x_ND, w_in, w_out, weights_NA, experts_NA, activation):
        self.experts_NA = experts_NA
        self.w_in = w_in
        with self.counter:
            return moe_ffn_forward(x_ND, w_in, w_out, weights_NA, experts_NA, activation)[0]

    def rows_of(self, weight: torch.Tensor) -> list[int]:
        """How many rows met each expert's matrix."""
        start = weight.untyped_storage().data_ptr()
        return [self.counter.rows[start, expert] for expert in range(CONFIG.n_experts)]


@torch.inference_mode()
def test_two_of_sixteen_experts_run_for_each_token(model, ids, monkeypatch):
    plain = model(ids)
    dispatchers = []
    for block in model.blocks:
        dispatchers.append(CountingDispatcher())
        monkeypatch.setattr(block.ffn, "dispatcher", dispatchers[-1])
    counted = model(ids)
    torch.testing.assert_close(counted.logits, plain.logits, rtol=1e-3, atol=1e-3)

    for layer, block in enumerate(model.blocks):
        for weight in (block.ffn.w_in, block.ffn.w_out):
            rows = dispatchers[layer].rows_of(weight)
            assert sum(rows) == 2 * N_TOKENS
            assert rows == counted.tokens_per_expert[layer].tolist()
        chosen_NA = dispatchers[layer].experts_NA
        assert all(len(set(chosen)) == 2 for chosen in chosen_NA.tolist())

    ran = sum(dispatcher.counter.flops for dispatcher in dispatchers)
    counts = count_flops(CONFIG, N_TOKENS)
    assert ran == counts.experts
    assert 1 - ran / counts.experts_dense == 0.875


@torch.inference_mode()
def test_the_weights_of_experts_that_were_not_chosen_are_never_touched(model, ids):
    """In the default face, which cannot be looked into: NaN in them changes not a single bit."""
    token = ids[:, :1]
    plain = model(token)
    assert (plain.tokens_per_expert.sum(-1) == 2).all()
    assert (plain.tokens_per_expert.count_nonzero(-1) == 2).all()
    kept = []
    try:
        for block, counts in zip(model.blocks, plain.tokens_per_expert, strict=True):
            for weight in (block.ffn.w_in, block.ffn.w_out):
                kept.append((weight, weight[counts == 0].clone(), counts == 0))
                weight[counts == 0] = float("nan")
        assert torch.equal(model(token).logits, plain.logits)
    finally:
        for weight, values, unused in kept:
            weight[unused] = values


@torch.inference_mode()
def test_no_token_is_dropped(model, ids):
    counts = model(ids).tokens_per_expert
    assert counts.shape == (CONFIG.n_layers, CONFIG.n_experts)
    assert (counts.sum(-1) == N_TOKENS * CONFIG.top_k).all()
