"""The maths of DualSelect: the closed forms against their definition, and the properties of the choices."""

import pytest
import torch

from trl_safety.methods import dual_select


def test_score_is_loss_minus_conflict() -> None:
    losses, cosines = torch.tensor([1.0, 2.0]), torch.tensor([0.5, -0.5])
    assert dual_select.score(losses, cosines, mu=2.0, nu=3.0).tolist() == [0.5, 5.5]


def test_cosine_equals_the_dense_one_and_is_zero_for_no_gradient() -> None:
    gradients, direction = torch.randn(5, 40, dtype=torch.float64), torch.randn(40, dtype=torch.float64)
    gradients[3] = 0
    ours = dual_select.cosine(gradients @ direction, gradients.square().sum(1), direction)
    torch.testing.assert_close(ours, torch.nn.functional.cosine_similarity(gradients, direction[None], dim=1), atol=1e-12, rtol=1e-12)
    assert ours[3] == 0


def test_hard_choices_are_the_extreme_sets() -> None:
    scores = torch.tensor([3.0, 1.0, 2.0, 5.0, 1.0])
    assert dual_select.lowest(scores, 2).tolist() == [False, True, False, False, True]
    assert dual_select.highest(scores, 2).tolist() == [True, False, False, True, False]
    # Equal scores: the earlier sample, on every machine.
    assert dual_select.lowest(torch.ones(4), 2).tolist() == [True, True, False, False]


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_the_token_budget_is_kept_and_always_drops(share: float) -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        tokens, scores = torch.randint(1, 50, (8,)), torch.randn(8)
        mask = dual_select.within_budget(scores, tokens, share)
        assert 1 <= mask.sum() < 8
        assert tokens[mask].sum() <= share * tokens.sum() or mask.sum() == 1
        # A prefix of the order by score, no longer than needed.
        order = scores.argsort()
        kept = int(mask.sum())
        assert mask[order[:kept]].all()
        assert tokens[order[: kept + 1]].sum() > share * tokens.sum()


def test_budget_keeps_the_best_even_where_it_is_too_long() -> None:
    assert dual_select.within_budget(torch.tensor([1.0, 0.0]), torch.tensor([1, 99]), 0.9).tolist() == [False, True]


def test_soft_weights_maximise_the_entropy_regularised_mean() -> None:
    scores, temperature = torch.randn(6, dtype=torch.float64), 0.3

    def objective(weights: torch.Tensor) -> torch.Tensor:
        return (weights * scores).sum() - temperature * (weights * weights.clamp(min=1e-300).log()).sum()

    best = dual_select.soft_weights(scores, temperature)
    assert best.sum().item() == pytest.approx(1)
    for _ in range(50):
        other = torch.softmax(best.log() + 0.3 * torch.randn(6, dtype=torch.float64), 0)
        assert objective(best) >= objective(other)


def test_mean_rescales_and_normalises() -> None:
    gradients = torch.randn(4, 7, dtype=torch.float64)
    weights, factors = torch.tensor([1.0, 0.0, 2.0, 0.0], dtype=torch.float64), torch.tensor([2.0, 1.0, 3.0, 1.0])
    expected = (2 * gradients[0] + 2 * 3 * gradients[2]) / 3
    torch.testing.assert_close(dual_select.mean(weights, gradients, factors), expected)
