"""Check a tensor for NaN and infinity."""

from __future__ import annotations

import torch
from torch import Tensor


def is_finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinity. Integer tensors are always finite."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    # torch.isfinite does not support 8-bit floats.
    return bool(torch.isfinite(tensor if tensor.element_size() > 1 else tensor.float()).all())
