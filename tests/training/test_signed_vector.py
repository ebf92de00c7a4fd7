"""The signed vector: its named points bit for bit, any other point against dense weights, and what the report says of both ends."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from tests import tiny
from trl_safety import AlignmentSubspace, SafeLoRACallback
from trl_safety.cli.app import app
from trl_safety.errors import ConfigurationError, SafetyError, SubspaceError
from trl_safety.reports.report import read_report, verify

DATA = tiny.DATA
PAIR = {"base": str(DATA / "gqa-base"), "aligned": str(DATA / "gqa-aligned")}


def trained(output: Path, safety: dict[str, Any] | None, **kwargs: Any) -> Any:
    trainer = tiny.trainer(output, safety=safety, **{**tiny.WELL_CONDITIONED, **kwargs})
    trainer.train()
    trainer.save_model()
    return trainer


def saved(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("plain")
    trained(folder, None)
    return saved(folder)


POINTS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "plain": ({"train": 0.0, "serve": 0.0}, {}, {}),
    "RESTA": ({"serve": 0.6, "rank": 3}, {"alignment_vector": {"gamma": 0.6, "rank": 3}}, {"skip_modules": ["v_proj"]}),
    "buffer": ({"train": -0.7, **PAIR}, {"alignment_buffer": {"gamma": 0.7, **PAIR}}, {}),
    "low-rank buffer": (
        {"train": -0.7, "how": "low_rank"},
        {"alignment_buffer": {"gamma": 0.7, "how": "low_rank"}},
        {"skip_modules": ["v_proj"]},
    ),
    "both": (
        {"train": -1.0, "serve": 0.5, "cut_to": 6},
        {"alignment_buffer": {}, "alignment_vector": {"gamma": 0.5, "cut_to": 6}},
        {"asft": {"weight": 0.1}},
    ),
}


@pytest.mark.parametrize("point", POINTS)
def test_named_points_bit_for_bit(tmp_path: Path, gqa_subspace: AlignmentSubspace, plain: dict[str, torch.Tensor], point: str) -> None:
    signed, named, beside = POINTS[point]
    reads = {"subspace": gqa_subspace} if point not in ("plain", "buffer") else {}
    trained(tmp_path / "one", {"signed_vector": signed, **beside}, **reads)
    found, other = saved(tmp_path / "one"), plain
    if named:
        trained(tmp_path / "other", {**named, **beside}, **reads)
        other = saved(tmp_path / "other")
    assert tiny.identical(found, other)
    report = read_report(tmp_path / "one")
    own = report.methods[-1]
    assert own.name == "signed_vector"
    assert (own.settings["train"], own.settings["serve"]) == (signed.get("train", 0.0), signed.get("serve", 0.0))
    if point == "plain":
        assert not report.protected
        assert own.summary == "train and serve are 0"
        return
    verify(tmp_path / "one")
    assert own.steps == (1, 4)
    assert ("W_aligned itself" in own.summary) == (signed.get("train", 0.0) == 0)
    assert ("·V added to 1·ΔW" in own.summary) == (signed.get("serve", 0.0) != 0)
    assert "still to be added" not in own.summary
    # What the method does is more than rounding.
    assert any(plain[name].shape != found[name].shape or not torch.allclose(plain[name], found[name], rtol=1e-2) for name in plain)


def test_lox_serves_the_model_that_was_trained(tmp_path: Path) -> None:
    """(γ, γ) with V cut to k directions in every linear layer, against dense weights."""
    gamma, k = 1.25, 3
    full = AlignmentSubspace.from_pair(*PAIR.values(), target_modules="all-linear", tolerance=1e-9, progress=False)
    reference, base = tiny.model(), tiny.model("gqa-base")
    for name in full.layers:
        weight, other = (model.get_submodule(name).weight.data for model in (reference, base))
        U, S, Zh = torch.linalg.svd((weight - other).double(), full_matrices=False)
        weight += (gamma * U[:, :k] @ torch.diag(S[:k]) @ Zh[:k]).float()
    dense = trained(tmp_path / "dense", None, base=reference)
    block = {"train": gamma, "serve": gamma, "rank": k, "how": "low_rank", "all_layers": True}
    trainer = trained(tmp_path / "lox", {"signed_vector": block}, subspace=full)
    ids = torch.arange(3, 15).view(1, -1)
    with torch.no_grad():
        served, expected, aligned = (model.eval()(ids).logits for model in (trainer.model, dense.model, tiny.model()))
    torch.testing.assert_close(served, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(served, aligned, rtol=1e-2, atol=1e-2)
    report = verify(tmp_path / "lox")
    assert "W_aligned + 1.25·V (by a frozen low-rank adapter in 21 layers)" in report.methods[0].summary


def test_resumed_accumulated_and_served_later(tmp_path: Path, gqa_subspace: AlignmentSubspace) -> None:
    block = {"signed_vector": {"train": -1.0, "serve": 0.5}}
    kwargs: dict[str, Any] = {"subspace": gqa_subspace, "save_strategy": "steps", "save_steps": 2}
    trained(tmp_path / "whole", block, **kwargs)
    checkpoint = read_report(tmp_path / "whole" / "checkpoint-2")
    assert not checkpoint.protected
    assert checkpoint.methods[0].summary.endswith("V is still to be added to the adapter")
    again = tiny.trainer(tmp_path / "again", safety=block, **tiny.WELL_CONDITIONED, **kwargs)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    again.save_model()
    assert tiny.identical(saved(tmp_path / "whole"), saved(tmp_path / "again"))
    assert verify(tmp_path / "again").methods[0].steps == (1, 4)
    accumulated = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    trained(tmp_path / "accumulated", block, subspace=gqa_subspace, **accumulated)
    assert tiny.largest_difference(saved(tmp_path / "accumulated"), saved(tmp_path / "whole")) < 1e-4
    # The same point in two steps: trained at (−1, 0), and served at 0.5 afterwards.
    trained(tmp_path / "first", {"signed_vector": {"train": -1.0, **PAIR}})
    gqa_subspace.save(tmp_path / "S.safetensors")
    line = ["correct", str(tmp_path / "first"), "-o", str(tmp_path / "then"), "-s", str(tmp_path / "S.safetensors")]
    result = CliRunner().invoke(app, [*line, "--method", "signed_vector", "--serve", "0.5"])
    assert result.exit_code == 0, (result.output, result.exception)
    assert tiny.identical(saved(tmp_path / "whole"), saved(tmp_path / "then"))
    (own,) = verify(tmp_path / "then").methods
    assert (own.settings["train"], own.settings["serve"], own.steps) == (-1.0, 0.5, (1, 4))
    assert own.summary.startswith("trained on W_aligned − 1·V")
    assert "0.5·V added" in own.summary
    result = CliRunner().invoke(app, ["methods"], env={"COLUMNS": "200"})
    assert "signed_vector" in result.output


@pytest.mark.parametrize(("train", "serve", "why"), [(1.0, 0.0, "serves less alignment"), (0.0, -0.5, "with serve = -0.5")])
def test_points_that_protect_nothing_are_not_reported_as_protection(
    tmp_path: Path, gqa_subspace: AlignmentSubspace, train: float, serve: float, why: str
) -> None:
    own = {"train": train, "serve": serve} if train == 0 else {"train": train, "serve": serve, "how": "low_rank"}
    trained(tmp_path, {"signed_vector": own}, subspace=gqa_subspace, max_steps=1)
    report = read_report(tmp_path)
    assert not report.protected
    assert "NOT a protection" in report.methods[0].summary
    assert why in report.methods[0].summary


REFUSED: dict[str, tuple[dict[str, Any], type[SafetyError], str]] = {
    "nothing named": ({"signed_vector": {}}, ConfigurationError, "names neither train nor serve"),
    "how without train": (
        {"signed_vector": {"serve": 1, "how": "low_rank"}},
        ConfigurationError,
        "how = 'low_rank' is used only in training",
    ),
    "rank that nothing reads": ({"signed_vector": {"train": -1, "rank": 4}}, ConfigurationError, "rank = 4 is used only with serve or how"),
    "cut without serve": ({"signed_vector": {"train": -1, "cut_to": 4}}, ConfigurationError, "cut_to = 4 is used only with serve"),
    "too many directions": ({"signed_vector": {"serve": 1, "rank": 9}}, SubspaceError, r"signed_vector\.rank = 9: the subspace has 8"),
    "too many to train on": (
        {"signed_vector": {"train": -1, "rank": 9, "how": "low_rank"}},
        SubspaceError,
        r"signed_vector\.rank = 9: the subspace has 8",
    ),
    "two buffers": ({"signed_vector": {"train": -1}, "alignment_buffer": {}}, ConfigurationError, "both buffers"),
    "two corrections": ({"signed_vector": {"serve": 1}, "csulora": {}}, ConfigurationError, "both rewrite the trained adapter"),
    "two vectors": ({"signed_vector": {"serve": 1}, "alignment_vector": {}}, ConfigurationError, "both rewrite the trained adapter"),
    "a merge": (
        {"signed_vector": {"serve": 1}, "buffer_reinforce": {"buffer": "b", "reinforce": "r"}},
        ConfigurationError,
        "signed_vector would be scaled down by buffer_reinforce's merge",
    ),
    "skipped modules": (
        {"signed_vector": {"train": -1, "serve": 1}, "skip_modules": ["q_proj"]},
        ConfigurationError,
        "acts on the whole model with how: weights",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_training(tmp_path: Path, gqa_subspace: AlignmentSubspace, case: str) -> None:
    safety, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        tiny.trainer(tmp_path, safety=safety, subspace=gqa_subspace)


def test_a_correction_among_the_callbacks(tmp_path: Path, gqa_subspace: AlignmentSubspace) -> None:
    callbacks = [SafeLoRACallback(gqa_subspace)]
    trainer = tiny.trainer(tmp_path, safety={"signed_vector": {"serve": 1.0}}, subspace=gqa_subspace, callbacks=callbacks)
    with pytest.raises(ConfigurationError, match="safe_lora and signed_vector would both rewrite"):
        trainer.train()
    shutil.rmtree(tmp_path)
