"""Norms, inner products and singular values of low-rank products, through their r × r Grams and thin factors."""

from __future__ import annotations

from torch import Tensor
from torch.linalg import matrix_norm, qr, svd

CANCELLED = 1e-12
"""A product that is zero in exact arithmetic can reach this share of ‖B‖·‖A‖ in float64; includes a margin."""


def gram(X: Tensor) -> Tensor:
    """XᵀX, shape (…, r, r), for X of shape (…, out, r)."""
    return X.mT @ X


def trace_product(left: Tensor, right: Tensor) -> Tensor:
    """tr(left · right) for symmetric r × r matrices, shape (…). With left = XᵀX and right = AAᵀ it is ‖X A‖²_F."""
    return (left * right).sum(dim=(-2, -1))


def product_inner(X: Tensor, Y: Tensor, A: Tensor) -> Tensor:
    """⟨X A, Y A⟩ without the products; X and Y are (out, r), A is (r, in)."""
    return trace_product(X.mT @ Y, A @ A.mT)


def product_norm_squared(X: Tensor, A: Tensor) -> Tensor:
    """‖X A‖²_F without the product; X is (out, r), A is (r, in)."""
    return product_inner(X, X, A)


def is_zero_product(B: Tensor, A: Tensor) -> bool:
    """Whether B·A is zero: a factor is zero, or the terms of the product cancel up to float64 rounding.

    Args:
        B: (out, r), finite.
        A: (r, in), finite.
    """
    if not (B.any() and A.any()):
        return True
    left, right = qr(B.double(), mode="r")[1], qr(A.mT.double(), mode="r")[1]
    # Each factor is normalised first, so that tiny factors are not mistaken for a product that cancels.
    product = (left / matrix_norm(left)) @ (right / matrix_norm(right)).mT
    return float(matrix_norm(product)) <= CANCELLED


def product_svd(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The thin SVD of B·A through QR factorisations of the factors, without the product.

    Args:
        B: (out, m).
        A: (m, in).

    Returns:
        U (out, k), σ (k,), descending, and Z (in, k), with k = min(out, m, in) and B·A = U diag(σ) Zᵀ.
    """
    left, left_triangle = qr(B)
    right, right_triangle = qr(A.mT)
    U, S, Vh = svd(left_triangle @ right_triangle.mT, full_matrices=False)
    return left @ U, S, right @ Vh.mT


def truncate_product(B: Tensor, A: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best approximation of B·A of the given rank, in factored form.

    Args:
        B: (out, m).
        A: (m, in).
        rank: rank to keep, at most m.

    Returns:
        Factors (out, rank) and (rank, in), with singular values split evenly between them, and the squared Frobenius norm of
        what was cut off.
    """
    U, S, Z = product_svd(B, A)
    root = S[:rank].sqrt()
    return U[:, :rank] * root, root.unsqueeze(-1) * Z[:, :rank].mT, S[rank:].square().sum()
