import pytest
import torch

from tests import references
from trl_safety.linalg.operators import LowRankOperator, WholeOperator
from trl_safety.methods import safe_lora


@pytest.mark.parametrize("shape", [(16, 16), (24, 10), (10, 24)])
@pytest.mark.parametrize("whole", [True, False])
def test_cosine_and_projection_equal_the_dense_form(shape: tuple[int, int], whole: bool) -> None:
    V = torch.randn(shape, dtype=torch.float64)
    B, A = torch.randn(shape[0], 4, dtype=torch.float64), torch.randn(4, shape[1], dtype=torch.float64)
    C = references.operator(V, "scaled")
    U, S, _ = torch.linalg.svd(V, full_matrices=False)
    operator = WholeOperator(V, V.norm().item()) if whole else LowRankOperator(U, S**2 / V.norm())
    image = safe_lora.project(B, operator)
    cosine, norm, image_norm = safe_lora.cosine(image, B, A)
    torch.testing.assert_close(image, C @ B)
    assert cosine.item() == pytest.approx(references.cosine(B, A, C), abs=1e-10)
    torch.testing.assert_close(norm, (B @ A).norm())
    torch.testing.assert_close(image_norm, (C @ B @ A).norm())


def test_zero_update_has_cosine_zero() -> None:
    B, A = torch.zeros(6, 2, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    assert safe_lora.cosine(B, B, A)[0].item() == 0


def test_threshold_rounds_to_five_decimals_like_the_authors() -> None:
    cosines = torch.tensor([0.1, 0.350004, 0.350006, 0.9], dtype=torch.float64)
    assert safe_lora.select(cosines, threshold=0.35).tolist() == [True, True, False, False]


def test_number_takes_the_smallest_and_their_ties() -> None:
    cosines = torch.tensor([0.5, 0.1, 0.3, 0.3, 0.9], dtype=torch.float64)
    assert safe_lora.select(cosines, layers=1).tolist() == [False, True, False, False, False]
    assert safe_lora.select(cosines, layers=2).tolist() == [False, True, True, True, False]
    assert safe_lora.select(cosines, layers=99).all()
