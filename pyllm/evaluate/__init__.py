"""How good a model is: validation loss, perplexity, bits per byte of text, loss by position."""

from pyllm.evaluate.score import BitsPerByte, bits_per_byte, validation_loss
from pyllm.evaluate.text import TextScore, score_text

__all__ = ["BitsPerByte", "TextScore", "bits_per_byte", "score_text", "validation_loss"]
