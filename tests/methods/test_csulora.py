import pytest
import torch

from tests import references
from trl_safety.methods import csulora

SHAPES = [(18, 18, 5), (30, 12, 4), (12, 30, 8)]


def layer(out: int, columns: int, k: int, r: int = 3) -> tuple[torch.Tensor, ...]:
    U, _, Zh = torch.linalg.svd(torch.randn(out, columns, dtype=torch.float64), full_matrices=False)
    return torch.randn(out, r, dtype=torch.float64), torch.randn(r, columns, dtype=torch.float64), U[:, :k], Zh[:k].T


@pytest.mark.parametrize("shape", SHAPES)
def test_the_three_parts_are_orthogonal_and_sum_to_the_update(shape: tuple[int, int, int]) -> None:
    B, A, U, Z = layer(*shape)
    parts = references.split(B @ A, U, Z)
    torch.testing.assert_close(sum(parts), B @ A)
    for i in range(3):
        for j in range(i):
            assert (parts[i] * parts[j]).sum().item() == pytest.approx(0, abs=1e-10)
    for energy, part in zip(csulora.energies(B, A, U, Z), parts, strict=True):
        torch.testing.assert_close(energy, part.square().sum())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("lambda_partial", "lambda_outside"), [(1.0, 1.0), (0.0, 5.0), (3.0, 0.2)])
def test_factors_are_the_closed_form_and_minimise(shape: tuple[int, int, int], lambda_partial: float, lambda_outside: float) -> None:
    B, A, U, Z = layer(*shape)
    update = B @ A
    F, M, O = references.split(update, U, Z)  # noqa: E741
    energies = csulora.energies(B, A, U, Z)
    total = sum(energies)
    strength_m, strength_o = lambda_partial * energies.partial / total, lambda_outside * energies.outside / total
    a, b = csulora.attenuations(energies, lambda_partial, lambda_outside)
    left, right = csulora.correct(B, A, U, Z, a, b)
    assert left.shape == (shape[0], 6)
    X = left @ right
    torch.testing.assert_close(X, F + M / (1 + strength_m) + O / (1 + strength_o))

    # Optimality: the objective is strictly convex, so that its gradient vanishes at the minimiser and nowhere else.
    free = X.clone().requires_grad_()
    _, XM, XO = references.split(free, U, Z)
    objective = (free - update).square().sum() + strength_m * XM.square().sum() + strength_o * XO.square().sum()
    objective.backward()
    assert free.grad.abs().max().item() < 1e-10


def test_rank_stays_where_b_is_a_squared() -> None:
    B, A, U, Z = layer(18, 18, 5)
    a = torch.tensor(0.6, dtype=torch.float64)
    left, right = csulora.correct(B, A, U, Z, a, a**2)
    assert torch.linalg.matrix_rank(left @ right).item() == 3
    _, _, lost = csulora.cut_back(left, right, 3)
    assert lost.item() == pytest.approx(0, abs=1e-12)


def test_cutting_back_reports_what_it_lost() -> None:
    B, A, U, Z = layer(18, 18, 5)
    left, right = csulora.correct(B, A, U, Z, torch.tensor(0.5), torch.tensor(0.9))
    short_left, short_right, lost = csulora.cut_back(left, right, 3)
    expected = (left @ right - short_left @ short_right).square().sum() / (left @ right).square().sum()
    assert short_left.shape == (18, 3)
    torch.testing.assert_close(lost, expected)
    assert lost > 0
