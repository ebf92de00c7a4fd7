import pytest
import torch

from trl_safety.methods import alignment_buffer


def test_both_ends_are_the_checkpoints_bit_for_bit() -> None:
    aligned, base = torch.randn(6, 5, dtype=torch.bfloat16), torch.randn(6, 5, dtype=torch.bfloat16)
    assert torch.equal(alignment_buffer.take_out(aligned, base, 0.0), aligned)
    assert torch.equal(alignment_buffer.take_out(aligned, base, 1.0), base)


@pytest.mark.parametrize("gamma", [0.25, 0.5, 1.3])
def test_between_and_beyond_is_the_dense_formula(gamma: float) -> None:
    aligned, base = torch.randn(6, 5), torch.randn(6, 5)
    expected = aligned.double() - gamma * (aligned.double() - base.double())
    torch.testing.assert_close(alignment_buffer.take_out(aligned, base, gamma), expected.float())
    U, S, Zh = torch.linalg.svd((aligned - base).double(), full_matrices=False)
    B, A = alignment_buffer.low_rank(U, S, Zh.T, gamma)
    torch.testing.assert_close(aligned.double() + B @ A, expected)
