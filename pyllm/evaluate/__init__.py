"""How good a model is: validation loss, bits per byte of text."""

from pyllm.evaluate.score import BitsPerByte, bits_per_byte, validation_loss

__all__ = ["BitsPerByte", "bits_per_byte", "validation_loss"]
