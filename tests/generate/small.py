"""Models of a size that tests can afford, and one whose text is known beforehand."""

import torch

from pyllm.models import ModelConfig, Transformer
from pyllm.tokenizers import Tokenizer

SMALL = {"vocab_size": 67, "max_seq_len": 32, "n_layers": 3, "d_model": 32, "d_ff": 24}


def make_model(config: ModelConfig, seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    model = Transformer(config).eval()
    with torch.no_grad():  # at 0.02 positions hardly matter, and logits of order 1 say more
        for name, parameter in model.named_parameters():
            if name.startswith(("embedding", "positions")):
                parameter.normal_(std=0.4)
    return model


def chain_model(
    tokenizer: Tokenizer,
    ids: list[int],
    begin: int | None = None,
    end: int | None = None,
    max_seq_len: int = 64,
) -> Transformer:
    """A model that writes ``ids`` after the token ``begin``, and after them the token ``end``.

    Both are end-of-text by default. After any other token it writes token 0.
    """
    n_words = tokenizer.vocab_size
    config = ModelConfig(
        vocab_size=n_words,
        max_seq_len=max_seq_len,
        n_layers=1,
        d_model=n_words + n_words % 2,
        n_heads=1,
        n_kv_heads=1,
        d_ff=8,
        moe_every=0,
        position="learned",
        tie_embeddings=False,
    )
    model = Transformer(config).eval()
    with torch.no_grad():
        for parameter in model.blocks.parameters():
            parameter.zero_()  # nothing is added to the embedding, which is one-hot
        model.positions.weight.zero_()
        model.embedding.weight.copy_(torch.eye(n_words, config.d_model))
        model.output.weight.zero_()
        first = tokenizer.end_of_text_id if begin is None else begin
        chain = [first, *ids, tokenizer.end_of_text_id if end is None else end]
        assert len({first, *ids}) == len(ids) + 1
        for before, after in zip(chain, chain[1:], strict=False):
            model.output.weight[after, before] = 1.0
    return model
