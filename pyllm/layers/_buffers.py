"""Buffers that stay as exact as they were made, whatever the model is converted to."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Float32Buffers(nn.Module):
    """A module whose own buffers stay float32: ``.bfloat16()`` and the like only move them."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Float32Buffers":
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            now = getattr(self, name)
            if buffer.dtype == torch.float32 != now.dtype:
                setattr(self, name, buffer.to(now.device))
        return self
