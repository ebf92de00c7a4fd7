import pytest
import torch

from tests import references, tiny
from trl_safety.adapters.folder import AdapterFolder
from trl_safety.config.buffer_reinforce import ReinforceMergeConfig
from trl_safety.corrections.buffer_reinforce import merge_layers
from trl_safety.methods import buffer_reinforce

PARITY = tiny.DATA / "buffer_reinforce"


def factors(out: int, columns: int, r: int, collapsed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """B and A, with so many rows of A almost in the span of the others."""
    A = torch.randn(r, columns, dtype=torch.float64)
    if collapsed:
        A[-collapsed:] = torch.randn(collapsed, r - collapsed, dtype=torch.float64) @ A[:-collapsed] + 1e-4 * A[-collapsed:]
    return torch.randn(out, r, dtype=torch.float64), A


@pytest.mark.parametrize("name", ["user", "user-collapsed"])
@pytest.mark.parametrize("alpha", [0.1, 1.0])
def test_equal_to_the_authors_merge(name: str, alpha: float) -> None:
    from safetensors.torch import load_file

    user, reinforce = (AdapterFolder.open(PARITY / folder) for folder in (name, "reinforce"))
    expected = load_file(PARITY / f"{name}-alpha-{alpha}.safetensors")
    scalings = {module: layer.scaling for module, layer in user.factors.items()}
    merges = merge_layers(user.factors, reinforce.factors, ReinforceMergeConfig(alpha=alpha), scalings, torch.device("cpu"))
    assert merges.keys() == expected.keys()
    for module, dense in expected.items():
        merge = merges[module]
        assert merge.A.shape[0] == 10
        ours = merge.scaling * merge.B @ merge.A
        assert ((ours - dense.double()).norm() / dense.norm()).item() < 2e-6, module
        one, other = user.factors[module], reinforce.factors[module]
        oracle = references.reinforced_merge((one.B, one.A, one.scaling), (other.B, other.A, other.scaling), alpha)
        torch.testing.assert_close(ours, oracle, rtol=1e-10, atol=1e-12)
        assert merge.report.measured["kept_directions"] == (3 if "collapsed" in name else 6)
    # Negative control: without the detection the collapsed adapter merges to something else.
    if "collapsed" in name:
        undetected = merge_layers(
            user.factors, reinforce.factors, ReinforceMergeConfig(alpha=alpha, collapse_threshold=0), scalings, torch.device("cpu")
        )
        module = next(iter(expected))
        apart = scalings[module] * undetected[module].B @ undetected[module].A - expected[module].double()
        assert (apart.norm() / expected[module].norm()).item() > 1e-3


@pytest.mark.parametrize(("out", "columns", "r", "r_other"), [(18, 18, 4, 4), (30, 12, 6, 3), (5, 30, 8, 2)])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_oracle_at_any_ranks_and_scalings(out: int, columns: int, r: int, r_other: int, alpha: float) -> None:
    user, reinforce = (*factors(out, columns, r), 2.5), (*factors(out, columns, r_other), 0.7)
    Q, kept = buffer_reinforce.user_directions(*user[:2], 0.01)
    assert kept.item() == r
    projected = buffer_reinforce.orthogonalise(reinforce[0], Q, alpha)
    B, A = buffer_reinforce.concatenate((*user[:2], 0.4 * 2.5), (projected, reinforce[1], 0.6 * 0.7), scaling=3.0)
    assert B.shape == (out, r + r_other)
    torch.testing.assert_close(3.0 * B @ A, references.reinforced_merge(user, reinforce, alpha, weights=(0.4, 0.6)))


def test_alpha_one_leaves_nothing_in_the_users_directions() -> None:
    B, A = factors(20, 15, 4)
    other = torch.randn(20, 3, dtype=torch.float64)
    Q, _ = buffer_reinforce.user_directions(B, A, 0.01)
    torch.testing.assert_close(Q.T @ Q, torch.eye(4, dtype=torch.float64))
    assert (B.T @ buffer_reinforce.orthogonalise(other, Q, 1.0)).abs().max().item() < 1e-12
    assert (B.T @ buffer_reinforce.orthogonalise(other, Q, 0.0)).abs().max().item() > 0.1


def test_directions_follow_the_span_not_the_factors() -> None:
    B, A = factors(20, 15, 4)
    mix = torch.randn(4, 4, dtype=torch.float64)
    Q, _ = buffer_reinforce.user_directions(B, A, 0.0)
    mixed, _ = buffer_reinforce.user_directions(B @ mix, torch.linalg.inv(mix) @ A, 0.0)
    torch.testing.assert_close(Q @ Q.T, mixed @ mixed.T)


def test_a_collapsed_update_keeps_only_what_it_uses() -> None:
    B, A = factors(20, 15, 6, collapsed=2)
    Q, kept = buffer_reinforce.user_directions(B, A, 1e-3)
    assert kept.item() == 4
    assert torch.linalg.matrix_rank(Q).item() == 4


def test_an_untrained_layer_removes_nothing() -> None:
    # LoRA starts with B = 0: a QR of it would invent directions, and α would remove them from the ReinforceLoRA.
    _, A = factors(20, 15, 4)
    other = torch.randn(20, 3, dtype=torch.float64)
    Q, _ = buffer_reinforce.user_directions(torch.zeros(20, 4, dtype=torch.float64), A, 0.01)
    assert torch.equal(buffer_reinforce.orthogonalise(other, Q, 1.0), other)
    Q, kept = buffer_reinforce.user_directions(torch.zeros(20, 0, dtype=torch.float64), torch.zeros(0, 15, dtype=torch.float64), 0.01)
    assert kept.item() == 0
    assert torch.equal(buffer_reinforce.orthogonalise(other, Q, 1.0), other)


def test_the_score_is_the_movement_along_the_direction() -> None:
    slopes, norms = torch.tensor([2.0, -3.0, 1.0]), torch.tensor([4.0, 1.0, 0.0])
    assert buffer_reinforce.safety_gradient_score(slopes, norms).tolist() == [-0.5, 3.0, 0.0]
