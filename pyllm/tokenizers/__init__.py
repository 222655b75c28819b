"""Tokenizers: bytes, characters, byte-level BPE trained here, and GPT-2's from its own files."""

from pyllm.tokenizers.bpe import train_bpe
from pyllm.tokenizers.byte_level import SPECIAL_TOKENS
from pyllm.tokenizers.characters import byte_tokenizer, train_characters
from pyllm.tokenizers.tokenizer import Tokenizer

__all__ = ["SPECIAL_TOKENS", "Tokenizer", "byte_tokenizer", "train_bpe", "train_characters"]
