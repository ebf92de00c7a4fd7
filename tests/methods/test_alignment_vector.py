import pytest
import torch

from trl_safety.methods import alignment_vector


def parts(out: int, columns: int, r: int, k: int) -> tuple[torch.Tensor, ...]:
    U, S, Zh = torch.linalg.svd(torch.randn(out, columns, dtype=torch.float64), full_matrices=False)
    return torch.randn(out, r, dtype=torch.float64), torch.randn(r, columns, dtype=torch.float64), U[:, :k], S[:k], Zh[:k].T


@pytest.mark.parametrize(("out", "columns", "r", "k"), [(18, 18, 4, 6), (30, 12, 3, 12), (12, 30, 0, 5)])
@pytest.mark.parametrize(("gamma", "kappa"), [(1.0, 1.0), (0.4, 0.5), (-1.0, 1.0), (0.0, 0.0)])
def test_factors_are_the_dense_sum(out: int, columns: int, r: int, k: int, gamma: float, kappa: float) -> None:
    B, A, U, S, Z = parts(out, columns, r, k)
    left, right = alignment_vector.add(B, A, U, S, Z, gamma=gamma, kappa=kappa, scaling=2.5)
    assert left.shape == (out, r + k)
    V = U @ torch.diag(S) @ Z.T
    torch.testing.assert_close(2.5 * left @ right, kappa * 2.5 * B @ A + gamma * V)
    torch.testing.assert_close(alignment_vector.inner(B, A, U, S, Z), (B @ A * V).sum())


def test_dare_keeps_the_update_in_expectation() -> None:
    B = torch.randn(200, 4, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    draws = [alignment_vector.drop_and_rescale(B, 0.8, generator) for _ in range(2000)]
    assert (draws[0] == 0).double().mean().item() == pytest.approx(0.8, abs=0.05)
    torch.testing.assert_close(torch.stack(draws).mean(0), B, rtol=0, atol=0.35)
    assert torch.equal(alignment_vector.drop_and_rescale(B, 0.0, generator), B)
