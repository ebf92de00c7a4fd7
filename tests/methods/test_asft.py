import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import references
from trl_safety.linalg.operators import LowRankOperator, WholeOperator
from trl_safety.methods import asft


def low_rank(V: torch.Tensor, kind: str, rank: int) -> LowRankOperator:
    U, S, _ = torch.linalg.svd(V, full_matrices=False)
    return LowRankOperator(U[:, :rank], S[:rank] ** 2 / V.norm() if kind == "scaled" else torch.ones(rank, dtype=V.dtype))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(4, 40),
    st.integers(4, 40),
    st.integers(1, 8),
    st.sampled_from(["scaled", "orthogonal"]),
    st.floats(0.01, 30),
    st.integers(0, 999),
)
def test_penalty_and_gradients_equal_the_dense_form(out: int, columns: int, r: int, kind: str, size: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    V, B, A = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((out, columns), (out, r), (r, columns)))
    V *= size
    rank = max(1, min(out, columns) // 2)
    B.requires_grad_(), A.requires_grad_()
    M = references.operator(V, kind, rank)
    expected = torch.autograd.grad(dense := references.penalty(B, A, M), (B, A))
    got = torch.autograd.grad(value := asft.penalty(B, A, low_rank(V, kind, rank)), (B, A))
    torch.testing.assert_close(value, dense, rtol=1e-8, atol=1e-8)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-7 * max(1.0, other.abs().max().item()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_whole_operator_in_each_dtype(dtype: torch.dtype) -> None:
    V, B, A = torch.randn(24, 30, dtype=dtype), torch.randn(24, 4, dtype=dtype), torch.randn(4, 30, dtype=dtype)
    expected = references.penalty(B, A, references.operator(V, "scaled"))
    got = asft.penalty(B, A, WholeOperator(V, V.double().norm().item()))
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), expected, rtol=1e-5 if dtype == torch.float32 else 1e-10, atol=0)


def test_an_update_inside_the_subspace_costs_nothing_under_the_projector_and_one_outside_its_norm() -> None:
    V = torch.randn(20, 20, dtype=torch.float64)
    P = low_rank(V, "orthogonal", 6)
    A = torch.randn(3, 20, dtype=torch.float64)
    inside = P.basis @ torch.randn(6, 3, dtype=torch.float64)
    outside = (X := torch.randn(20, 3, dtype=torch.float64)) - P.apply(X)
    assert asft.penalty(inside, A, P).item() == pytest.approx(0, abs=1e-10)
    torch.testing.assert_close(asft.penalty(outside, A, P), (outside @ A).square().sum())
