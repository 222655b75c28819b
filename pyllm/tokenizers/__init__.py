"""Tokenizers: byte-level BPE, trained here or read from GPT-2's own files."""

from pyllm.tokenizers.bpe import SPECIAL_TOKENS, Tokenizer, train_bpe

__all__ = ["SPECIAL_TOKENS", "Tokenizer", "train_bpe"]
