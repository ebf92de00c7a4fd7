import pytest
import torch

from trl_safety.linalg import thin_svd as module
from trl_safety.linalg.thin_svd import ThinSVD, thin_svd


def matrix(rows: int, columns: int, decay: float) -> torch.Tensor:
    """A random matrix whose singular values decay like i^−decay."""
    left, right = (torch.linalg.qr(torch.randn(n, min(rows, columns)))[0] for n in (rows, columns))
    return (left * torch.arange(1, min(rows, columns) + 1).float() ** -decay) @ right.mT


def true_error(V: torch.Tensor, svd: ThinSVD) -> float:
    V, U, S = V.double(), svd.left.double(), svd.singular_values.double()
    return torch.linalg.eigvalsh(V @ V.T - (U * S**2) @ U.T).abs().max().item()


@pytest.mark.parametrize(("rows", "columns"), [(40, 40), (60, 20), (20, 60)])
def test_exact_decomposition(rows: int, columns: int) -> None:
    V = matrix(rows, columns, 0.5)
    svd = thin_svd(V, rank=7)
    expected = torch.linalg.svdvals(V.double())
    torch.testing.assert_close(svd.singular_values.double(), expected[:7], rtol=1e-5, atol=0)
    torch.testing.assert_close(svd.left.T @ svd.left, torch.eye(7), atol=1e-5, rtol=0)
    torch.testing.assert_close(svd.right.T @ svd.right, torch.eye(7), atol=1e-5, rtol=0)
    assert svd.gram_error == pytest.approx(expected[7].item() ** 2, rel=1e-5)


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.7, 1.5])
@pytest.mark.parametrize("rank", [16, 48])
def test_randomised_bound_holds_and_is_tight(monkeypatch: pytest.MonkeyPatch, decay: float, rank: int) -> None:
    monkeypatch.setattr(module, "EXACT_BELOW", 100)
    V = matrix(420, 300, decay)
    svd = thin_svd(V, rank=rank)
    error = true_error(V, svd)
    assert error <= svd.gram_error <= 1.4 * error + 1e-6
    assert svd.left.shape == (420, rank)
    # Nearly as good as the best truncation, even if the spectrum is flat and no leading subspace stands out.
    assert error <= 1.2 * torch.linalg.svdvals(V.double())[rank].item() ** 2


@pytest.mark.parametrize("threshold", [100, 1024])
@pytest.mark.parametrize("tolerance", [0.3, 0.03, 0.001])
def test_tolerance_is_met_with_few_directions(monkeypatch: pytest.MonkeyPatch, threshold: int, tolerance: float) -> None:
    monkeypatch.setattr(module, "EXACT_BELOW", threshold)
    V = matrix(300, 240, 0.6)
    svd = thin_svd(V, tolerance=tolerance)
    squares = torch.linalg.svdvals(V.double()) ** 2
    assert true_error(V, svd) <= tolerance * squares[0]
    assert len(svd.singular_values) <= 1.4 * (squares > tolerance * squares[0]).sum() + 1


@pytest.mark.parametrize("threshold", [30, 1024])
def test_round_off_below_the_numerical_rank_is_no_direction(monkeypatch: pytest.MonkeyPatch, threshold: int) -> None:
    monkeypatch.setattr(module, "EXACT_BELOW", threshold)
    V = torch.randn(150, 5) @ torch.randn(5, 130)
    assert thin_svd(V, rank=20).left.shape == (150, 5)


def test_same_matrix_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EXACT_BELOW", 50)
    V = matrix(160, 120, 0.5)
    torch.manual_seed(1)
    one = thin_svd(V, rank=8)
    torch.manual_seed(2)
    assert torch.equal(one.left, thin_svd(V, rank=8).left)
