"""SBR's term against a naive float64 loop over prompts."""

import torch

from trl_safety.methods import sbr


def test_equals_the_loop_over_prompts_and_units() -> None:
    hidden, reference = torch.randn(5, 7, 12), torch.randn(5, 12)
    lengths = torch.tensor([7, 1, 3, 6, 2])
    total = 0.0
    for k in range(5):
        for unit in range(12):
            total += (float(hidden[k, int(lengths[k]) - 1, unit]) - float(reference[k, unit])) ** 2
    assert torch.isclose(sbr.distance(sbr.last_states(hidden, lengths), reference).double(), torch.tensor(total / 60, dtype=torch.float64))


def test_it_is_the_papers_sum_over_units_divided_by_their_number() -> None:
    states, reference = torch.randn(4, 16, dtype=torch.float64), torch.randn(4, 16, dtype=torch.float64)
    paper = (states - reference).norm(dim=1).square().mean()
    assert torch.isclose(sbr.distance(states, reference) * 16, paper)


def test_float32_whatever_comes_in_and_no_gradient_at_the_reference() -> None:
    hidden = torch.randn(2, 3, 8, dtype=torch.bfloat16)
    states = sbr.last_states(hidden, torch.tensor([3, 2]))
    assert states.dtype == torch.float32
    states.requires_grad_()
    sbr.distance(states, states.detach().clone()).backward()
    assert not states.grad.any()
