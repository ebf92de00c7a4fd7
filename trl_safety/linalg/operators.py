"""Symmetric out × out operators that are never materialised: C = VVᵀ/‖V‖_F and the projector UₖUₖᵀ.

Both are built from a thin factor; C can also be built from V kept whole. Leading batch dimensions are layers of one shape.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LowRankOperator:
    """M = U diag(w) Uᵀ with orthonormal columns in U.

    Attributes:
        basis: U, shape (…, out, k).
        weights: w, shape (…, k): σᵢ²/‖V‖_F for the scaled operator C, ones for the orthogonal projector.
    """

    basis: Tensor
    weights: Tensor

    def apply(self, B: Tensor) -> Tensor:
        """M·B, shape (…, out, r), for B of shape (…, out, r)."""
        return self.basis @ (self.weights.unsqueeze(-1) * (self.basis.mT @ B))

    def residual_gram(self, B: Tensor) -> Tensor:
        """Bᵀ(I − M)²B, shape (…, r, r): (I − M)² is I − U diag(2w − w²) Uᵀ."""
        inner = self.basis.mT @ B
        squared = (self.weights * (2 - self.weights)).unsqueeze(-1)
        return B.mT @ B - inner.mT @ (squared * inner)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> LowRankOperator:
        """The same operator on another device and in another dtype."""
        return LowRankOperator(self.basis.to(device, dtype), self.weights.to(device, dtype))


@dataclass(frozen=True)
class WholeOperator:
    """C = VVᵀ/‖V‖_F with V kept whole.

    Attributes:
        matrix: V, shape (out, in).
        norm: ‖V‖_F.
    """

    matrix: Tensor
    norm: float

    def apply(self, B: Tensor) -> Tensor:
        """C·B, shape (out, r), for B of shape (out, r)."""
        matrix = self.matrix.to(B.dtype)
        return matrix @ (matrix.mT @ B) / self.norm

    def residual_gram(self, B: Tensor) -> Tensor:
        """Bᵀ(I − C)²B, shape (r, r)."""
        rest = B - self.apply(B)
        return rest.mT @ rest

    def to(self, device: torch.device | str, dtype: torch.dtype) -> WholeOperator:
        """The same operator on another device. V keeps its dtype because it is the one large tensor here."""
        return WholeOperator(self.matrix.to(device), self.norm)


Operator = LowRankOperator | WholeOperator
