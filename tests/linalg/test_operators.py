import pytest
import torch

from tests import references
from trl_safety.linalg.low_rank import product_inner, product_norm_squared, truncate_product
from trl_safety.linalg.operators import LowRankOperator, WholeOperator


def low_rank(V: torch.Tensor, kind: str, rank: int) -> LowRankOperator:
    U, S, _ = torch.linalg.svd(V, full_matrices=False)
    weights = S[:rank] ** 2 / V.norm() if kind == "scaled" else torch.ones(rank, dtype=V.dtype)
    return LowRankOperator(U[:, :rank], weights)


@pytest.mark.parametrize("shape", [(12, 12), (20, 8), (8, 20)])
@pytest.mark.parametrize("kind", ["scaled", "orthogonal"])
def test_low_rank_operator_is_its_dense_matrix(shape: tuple[int, int], kind: str) -> None:
    V, B = torch.randn(shape, dtype=torch.float64), torch.randn(shape[0], 3, dtype=torch.float64)
    M = references.operator(V, kind, rank=5)
    operator = low_rank(V, kind, 5)
    torch.testing.assert_close(operator.apply(B), M @ B)
    rest = (torch.eye(shape[0]) - M) @ B
    torch.testing.assert_close(operator.residual_gram(B), rest.T @ rest)


def test_whole_operator_is_the_authors_matrix() -> None:
    V, B = torch.randn(15, 9, dtype=torch.float64), torch.randn(15, 3, dtype=torch.float64)
    C = references.operator(V, "scaled")
    operator = WholeOperator(V, V.norm().item())
    torch.testing.assert_close(operator.apply(B), C @ B)
    rest = (torch.eye(15) - C) @ B
    torch.testing.assert_close(operator.residual_gram(B), rest.T @ rest)


def test_orthogonal_is_idempotent_and_scaled_is_not() -> None:
    V, B = torch.randn(12, 12, dtype=torch.float64), torch.randn(12, 3, dtype=torch.float64)
    P, C = low_rank(V, "orthogonal", 4), low_rank(V, "scaled", 4)
    torch.testing.assert_close(P.apply(P.apply(B)), P.apply(B))
    assert not torch.allclose(C.apply(C.apply(B)), C.apply(B))


def test_batched_layers_equal_single_ones() -> None:
    layers = [low_rank(torch.randn(10, 7, dtype=torch.float64), "scaled", 3) for _ in range(4)]
    stacked = LowRankOperator(torch.stack([x.basis for x in layers]), torch.stack([x.weights for x in layers]))
    B = torch.randn(4, 10, 2, dtype=torch.float64)
    torch.testing.assert_close(stacked.residual_gram(B), torch.stack([x.residual_gram(b) for x, b in zip(layers, B, strict=True)]))


def test_products_without_the_product() -> None:
    X, Y, A = (torch.randn(*shape, dtype=torch.float64) for shape in ((9, 3), (9, 3), (3, 7)))
    torch.testing.assert_close(product_inner(X, Y, A), ((X @ A) * (Y @ A)).sum())
    torch.testing.assert_close(product_norm_squared(X, A), (X @ A).square().sum())


def test_truncation_is_the_best_of_its_rank() -> None:
    B, A = torch.randn(14, 6, dtype=torch.float64), torch.randn(6, 11, dtype=torch.float64)
    left, right, lost = truncate_product(B, A, 2)
    U, S, Vh = torch.linalg.svd(B @ A, full_matrices=False)
    torch.testing.assert_close(left @ right, U[:, :2] @ torch.diag(S[:2]) @ Vh[:2])
    torch.testing.assert_close(lost, S[2:].square().sum())
