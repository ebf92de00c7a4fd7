"""The signed vector after training: on live models, on folders, as a separate adapter, on whole checkpoints."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from tests import tiny
from trl_safety import AlignmentSubspace, AlignmentVectorCallback, apply_alignment_vector
from trl_safety.adapters.folder import AdapterFolder
from trl_safety.cli.app import app
from trl_safety.config.alignment_vector import AlignmentVectorConfig
from trl_safety.corrections.alignment_vector import AlignmentVectorCorrection
from trl_safety.corrections.alignment_vector_files import add_vector, write_alignment_adapter
from trl_safety.corrections.folder import correct_folder
from trl_safety.errors import AdapterError, CheckpointError, ConfigurationError, SubspaceError
from trl_safety.reports.report import verify

DATA = tiny.DATA


@pytest.fixture(scope="module")
def full() -> AlignmentSubspace:
    """V without truncation: every singular direction of every layer."""
    return AlignmentSubspace.from_pair(DATA / "gqa-base", DATA / "gqa-aligned", target_modules="all-linear", tolerance=1e-9, progress=False)


def vector() -> dict[str, torch.Tensor]:
    """V of every linear layer, dense."""
    base, aligned = tiny.model("gqa-base"), tiny.model("gqa-aligned")
    return {
        name: aligned.get_submodule(name).weight.data.double() - module.weight.data.double()
        for name, module in base.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }


def updates(folder: Path) -> dict[str, torch.Tensor]:
    return {name: f.scaling * f.B.double() @ f.A.double() for name, f in AdapterFolder.open(folder).factors.items()}


def close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert (one[name] - other[name]).norm() <= tolerance * other[name].norm().clamp(min=1e-9), name


def correct(output: Path, subspace: AlignmentSubspace, adapter: Path = DATA / "gqa-adapter", **options: Any) -> Any:
    return correct_folder(adapter, output, subspace, AlignmentVectorCorrection(AlignmentVectorConfig(**options)))


@pytest.mark.parametrize("options", [{}, {"gamma": 0.4, "kappa": 0.7}, {"gamma": -1.0}])
def test_folder_and_live_are_the_dense_sum(tmp_path: Path, full: AlignmentSubspace, gqa_model: Any, options: dict[str, float]) -> None:
    V, before = vector(), updates(DATA / "gqa-adapter")
    gamma, kappa = options.get("gamma", 1.0), options.get("kappa", 1.0)
    expected = {name: kappa * update + gamma * V[name] for name, update in before.items()}
    report = correct(tmp_path / "out", full, **options)
    close(updates(tmp_path / "out"), expected)
    assert report.protected == (gamma > 0)
    row = next(iter(report.methods[0].layers.values())).measured
    assert row["vector_share"] == pytest.approx(1, abs=1e-6)
    apply_alignment_vector(gqa_model, full, **options)
    gqa_model.save_pretrained(str(tmp_path / "live"))
    close(updates(tmp_path / "live"), expected)
    if gamma > 0:
        verify(tmp_path / "live")
    with pytest.raises(AdapterError, match="already corrected by alignment_vector"):
        apply_alignment_vector(gqa_model, full)


def test_gamma_zero_changes_no_bit(tmp_path: Path, full: AlignmentSubspace, gqa_model: Any) -> None:
    before = tiny.factors(gqa_model)
    report = apply_alignment_vector(gqa_model, full, gamma=0.0)
    assert tiny.identical(before, tiny.factors(gqa_model))
    assert not report.protected
    correct(tmp_path / "out", full, gamma=0.0)
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (DATA / "gqa-adapter", tmp_path / "out"))
    assert tiny.identical(one, other)


def test_leading_directions_and_the_cut(tmp_path: Path, full: AlignmentSubspace) -> None:
    V, before = vector(), updates(DATA / "gqa-adapter")
    report = correct(tmp_path / "k", full, rank=3)
    expected = {}
    for name, update in before.items():
        U, S, Zh = torch.linalg.svd(V[name], full_matrices=False)
        expected[name] = update + U[:, :3] @ torch.diag(S[:3]) @ Zh[:3]
        share = (S[:3].square().sum() / S.square().sum()).item()
        assert report.methods[0].layers[name].measured["vector_share"] == pytest.approx(share, rel=1e-4)
    close(updates(tmp_path / "k"), expected, 1e-4)
    report = correct(tmp_path / "cut", full, cut_to=4)
    assert {f.A.shape[0] for f in AdapterFolder.open(tmp_path / "cut").factors.values()} == {4}
    for name, update in before.items():
        whole = update + V[name]
        S = torch.linalg.svdvals(whole)
        lost = (S[4:].square().sum() / S.square().sum()).item()
        assert report.methods[0].layers[name].measured["energy_lost_by_rank"] == pytest.approx(lost, rel=1e-3, abs=1e-9)


def test_a_cut_that_cuts_nothing(tmp_path: Path, full: AlignmentSubspace) -> None:
    """Even if k is the subspace's own rank."""
    largest = max(layer.rank for layer in full.layers.values()) + 4
    with pytest.raises(ConfigurationError, match=f"cut_to = {largest}: the corrected adapter has rank {largest}"):
        correct(tmp_path / "out", full, cut_to=largest)
    correct(tmp_path / "out", full, cut_to=largest - 1)


def test_all_layers_of_the_subspace(tmp_path: Path, full: AlignmentSubspace, gqa_model: Any) -> None:
    V, before = vector(), updates(DATA / "gqa-adapter")
    expected = {name: before.get(name, 0) + V[name] for name in V}
    correct(tmp_path / "out", full, all_layers=True)
    close(updates(tmp_path / "out"), expected)
    assert len(expected) > len(before)
    apply_alignment_vector(gqa_model, full, all_layers=True)
    gqa_model.save_pretrained(str(tmp_path / "live"))
    close(updates(tmp_path / "live"), expected)
    loaded = PeftModel.from_pretrained(tiny.model(), str(tmp_path / "live"))
    ids = torch.arange(3, 15).view(1, -1)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, gqa_model.eval()(ids).logits, rtol=1e-4, atol=1e-5)


def test_through_the_trainer(tmp_path: Path, gqa_subspace: AlignmentSubspace) -> None:
    trainer = tiny.trainer(
        tmp_path, safety={"asft": {"weight": 0.1}, "alignment_vector": {"gamma": 0.5, "all_layers": True}}, subspace=gqa_subspace
    )
    trainer.train()
    trainer.save_model()
    report = verify(tmp_path)
    assert [method.name for method in report.methods] == ["asft", "alignment_vector"]
    assert len(report.methods[1].layers) == 21
    other = tiny.trainer(tmp_path / "b", callbacks=[AlignmentVectorCallback(gqa_subspace, gamma=0.5, dare=0.3)])
    other.train()
    other.save_model()
    assert "DARE dropped 30%" in verify(tmp_path / "b").methods[0].summary


def test_dare_is_the_same_again(tmp_path: Path, full: AlignmentSubspace) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        correct(tmp_path / name, full, dare=0.5, seed=seed)
    a, b, c = (updates(tmp_path / name) for name in "abc")
    assert tiny.identical(a, b)
    assert not tiny.identical(a, c)


def test_an_adapter_of_its_own_switches_on_and_off(tmp_path: Path, full: AlignmentSubspace) -> None:
    write_alignment_adapter(full, tmp_path / "V", gamma=0.5)
    close(updates(tmp_path / "V"), {name: 0.5 * V for name, V in vector().items()})
    model = PeftModel.from_pretrained(tiny.model(), str(DATA / "gqa-adapter"))
    ids = torch.arange(3, 15).view(1, -1)
    with torch.no_grad():
        alone = model(ids).logits
        model.load_adapter(str(tmp_path / "V"), "alignment")
        model.base_model.set_adapter(["default", "alignment"])
        both = model(ids).logits
        model.set_adapter("default")
        assert torch.equal(model(ids).logits, alone)
    correct(tmp_path / "out", full, gamma=0.5, all_layers=True)
    merged = PeftModel.from_pretrained(tiny.model(), str(tmp_path / "out"))
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, both, rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigurationError, match="gamma = 0"):
        write_alignment_adapter(full, tmp_path / "none", gamma=0)


def test_the_whole_vector_on_a_merged_model(tmp_path: Path) -> None:
    merged = PeftModel.from_pretrained(tiny.model(), str(DATA / "gqa-adapter")).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged", max_shard_size="20KB")
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) > 1
    line = ["add-vector", str(tmp_path / "merged"), "--base", str(DATA / "gqa-base"), "--aligned", str(DATA / "gqa-aligned")]
    result = CliRunner().invoke(app, [*line, "-o", str(tmp_path / "out"), "--gamma", "0.5", "--kappa", "0.8"])
    assert result.exit_code == 0, result.output
    found, base, aligned = (
        AutoModelForCausalLM.from_pretrained(folder) for folder in (tmp_path / "out", DATA / "gqa-base", DATA / "gqa-aligned")
    )
    states = [model.state_dict() for model in (found, merged, base, aligned)]
    for name in states[0]:
        new, old, unaligned, before = (state[name].double() for state in states)
        torch.testing.assert_close(new, before + 0.8 * (old - before) + 0.5 * (before - unaligned), rtol=1e-5, atol=1e-6)
    with pytest.raises(ConfigurationError, match="would stay as it is"):
        add_vector(tmp_path / "merged", DATA / "gqa-base", DATA / "gqa-aligned", tmp_path / "no", gamma=0)
    with pytest.raises(CheckpointError, match="do not differ"):
        add_vector(tmp_path / "merged", DATA / "gqa-base", DATA / "gqa-base", tmp_path / "no")
    with pytest.raises(CheckpointError, match="check that base and aligned are not swapped"):
        add_vector(tmp_path / "merged", DATA / "gqa-aligned", DATA / "gqa-base", tmp_path / "no")
    with pytest.raises(ConfigurationError, match="would remove alignment"):
        add_vector(tmp_path / "merged", DATA / "gqa-base", DATA / "gqa-aligned", tmp_path / "no", gamma=-1)
    tiny.model(dtype=torch.bfloat16).save_pretrained(tmp_path / "rounded")
    with pytest.raises(CheckpointError, match="by more than rounding"):
        add_vector(tmp_path / "merged", tmp_path / "rounded", DATA / "gqa-aligned", tmp_path / "no")
    with pytest.raises(CheckpointError, match="name this model's pair"):
        add_vector(tmp_path / "merged", DATA / "mha-base", DATA / "mha-aligned", tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_refused(tmp_path: Path, full: AlignmentSubspace, gqa_subspace: AlignmentSubspace) -> None:
    whole = AlignmentSubspace.from_pair(DATA / "gqa-base", DATA / "gqa-aligned", target_modules="all-linear", whole=True, progress=False)
    with pytest.raises(SubspaceError, match="keeps V whole, which cannot become a low-rank adapter"):
        tiny.trainer(tmp_path, safety={"alignment_vector": {}}, subspace=whole)
    with pytest.raises(SubspaceError, match=r"alignment_vector.rank = 9: the subspace has 8 directions"):
        tiny.trainer(tmp_path, safety={"alignment_vector": {"rank": 9}}, subspace=gqa_subspace)
    with pytest.raises(AdapterError, match="layers cannot be added to an adapter with modules_to_save"):
        tiny.trainer(
            tmp_path, safety={"alignment_vector": {"all_layers": True}}, subspace=full, peft_config=tiny.lora(modules_to_save=["lm_head"])
        )
    with pytest.raises(ConfigurationError, match="safe_lora and alignment_vector both rewrite"):
        tiny.trainer(tmp_path, safety={"alignment_vector": {}, "safe_lora": {}}, subspace=full)
    with pytest.raises(ConfigurationError, match="scaled down by buffer_reinforce's merge"):
        tiny.trainer(tmp_path, safety={"alignment_vector": {}, "buffer_reinforce": {"buffer": "b", "reinforce": "r"}}, subspace=full)
    shutil.copytree(DATA / "gqa-adapter", tmp_path / "loose")
    tensors = load_file(tmp_path / "loose" / "adapter_model.safetensors")
    renamed = {name.replace("base_model.model.model.", "base_model.model."): tensor for name, tensor in tensors.items()}
    save_file(renamed, tmp_path / "loose" / "adapter_model.safetensors", metadata={"format": "pt"})
    # With a task, the names alone say that the adapter is for the model without its head, which is refused earlier.
    tiny.rewrite_json(tmp_path / "loose" / "adapter_config.json", task_type=None)
    with pytest.raises(AdapterError, match="has another name in the subspace"):
        correct(tmp_path / "out", full, adapter=tmp_path / "loose", all_layers=True)
