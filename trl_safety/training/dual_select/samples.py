"""The samples that DualSelect chooses among."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Samples:
    """Samples of one batch, or of all batches that are accumulated for an optimizer step.

    Attributes:
        places: (2, n) the rows of the data set that they come from, and which part of its row each is.
        losses: (n,) mean loss over a sample's supervised tokens.
        tokens: (n,) supervised tokens.
        gradients: (n, P) of each sample's share of its batch's loss.
        factors: (n,) from that to the gradient of the sample's own mean loss.
    """

    places: Tensor
    losses: Tensor
    tokens: Tensor
    gradients: Tensor
    factors: Tensor

    @classmethod
    def joined(cls, parts: Sequence[Samples]) -> Samples:
        """The samples of several batches."""
        if len(parts) == 1:
            return parts[0]
        return cls(
            torch.cat([part.places for part in parts], dim=1),
            torch.cat([part.losses for part in parts]),
            torch.cat([part.tokens for part in parts]),
            torch.cat([part.gradients for part in parts]),
            torch.cat([part.factors for part in parts]),
        )
