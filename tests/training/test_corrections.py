"""The callbacks and functions that correct a trained adapter, through real trainers and real files."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from packaging.version import Version
from peft import PeftModel
from safetensors.torch import load_file
from transformers.integrations import peft as transformers_peft
from trl import SFTConfig, SFTTrainer

from tests import references, tiny
from trl_safety import AlignmentSubspace, CSULoRACallback, SafeLoRACallback, apply_csulora, apply_safe_lora
from trl_safety.adapters.folder import AdapterFolder
from trl_safety.adapters.lora import lora_modules
from trl_safety.config.csulora import CsuloraConfig
from trl_safety.config.safe_lora import SafeLoraConfig
from trl_safety.corrections.csulora import CsuloraCorrection
from trl_safety.corrections.folder import correct_folder
from trl_safety.corrections.safe_lora import SafeLoraCorrection
from trl_safety.errors import AdapterError, ConfigurationError, ReportError, SubspaceError
from trl_safety.reports.report import read_report, verify


def callback(method: str, subspace: Any, **kwargs: Any) -> Any:
    if method == "safe_lora":
        return SafeLoRACallback(subspace, **{"threshold": 1.0, **kwargs})
    return CSULoRACallback(subspace, **kwargs)


def correction(method: str) -> Any:
    return SafeLoraCorrection(SafeLoraConfig(threshold=1.0)) if method == "safe_lora" else CsuloraCorrection(CsuloraConfig())


def plain_trainer(output: Path, **kwargs: Any) -> Any:
    """TRL's own trainer, in which the callbacks must also work."""
    own = {key: kwargs.pop(key) for key in ("callbacks", "eval_dataset", "data", "peft_config", "base") if key in kwargs}
    return tiny.trainer(output, cls=SFTTrainer, args=tiny.arguments(output, SFTConfig, **kwargs), **own)


def updates(model: Any) -> dict[str, torch.Tensor]:
    """ΔW of every adapted layer, dense, in float64."""
    return {m.name: m.scaling * m.B.detach().double() @ m.A.detach().double() for m in lora_modules(model)}


def expected(method: str, subspace: AlignmentSubspace, before: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The corrected updates, from the dense formulas."""
    result = {}
    for name, update in before.items():
        U, S, Z = (x.double() for x in subspace.layers[name].factors())
        if method == "safe_lora":
            result[name] = U @ torch.diag(S**2) @ U.T @ update / subspace.layers[name].frobenius_norm
        else:
            F, M, O = references.split(update, U, Z)  # noqa: E741
            total = update.square().sum()
            result[name] = F + M / (1 + M.square().sum() / total) + O / (1 + O.square().sum() / total)
    return result


def assert_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert (one[name] - other[name]).norm() <= tolerance * other[name].norm(), name


@pytest.mark.parametrize("method", ["safe_lora", "csulora"])
@pytest.mark.parametrize("trainer_class", ["SFTTrainer", "SafeSFTTrainer"])
def test_the_saved_adapter_is_the_corrected_one(tmp_path: Path, gqa_subspace: AlignmentSubspace, method: str, trainer_class: str) -> None:
    plain = plain_trainer(tmp_path / "plain")
    plain.train()
    if trainer_class == "SFTTrainer":
        trainer = plain_trainer(tmp_path, callbacks=[callback(method, gqa_subspace)])
    else:
        options = {"safe_lora": {"threshold": 1.0}} if method == "safe_lora" else {"csulora": {}}
        trainer = tiny.trainer(tmp_path, safety=options, subspace=gqa_subspace)
    trainer.train()
    want = expected(method, gqa_subspace, updates(plain.model))
    assert_close(updates(trainer.model), want)
    trainer.save_model()
    # The adapter that plain PEFT loads from the folder has the effect of the dense update.
    loaded = PeftModel.from_pretrained(tiny.model(), str(tmp_path))
    assert_close(updates(loaded), want)
    tokens = torch.arange(12).view(1, 12)
    dense = tiny.model()
    with torch.no_grad():
        for name, update in want.items():
            dense.get_submodule(name).weight += update.float()
        torch.testing.assert_close(loaded(tokens).logits, dense(tokens).logits, rtol=1e-4, atol=1e-4)
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(merged(tokens).logits, dense(tokens).logits, rtol=1e-4, atol=1e-4)
    report = verify(tmp_path)
    assert report.methods[0].name == method
    assert report.methods[0].reconstruction == (method == "csulora")
    assert {row.action for row in report.methods[0].layers.values()} == {"corrected"}
    with pytest.raises(AssertionError):  # the negative control: the uncorrected adapter differs
        assert_close(updates(plain.model), want)


@pytest.mark.parametrize("method", ["safe_lora", "csulora"])
def test_model_and_folder_agree(tmp_path: Path, gqa_subspace: AlignmentSubspace, gqa_model: Any, method: str) -> None:
    want = expected(method, gqa_subspace, updates(gqa_model))
    (apply_safe_lora if method == "safe_lora" else apply_csulora)(
        gqa_model, gqa_subspace, **({"threshold": 1.0} if method == "safe_lora" else {})
    )
    gqa_model.save_pretrained(tmp_path / "model")
    correct_folder(tiny.DATA / "gqa-adapter", tmp_path / "folder", gqa_subspace, correction(method))
    for way in ("model", "folder"):
        assert_close(updates(PeftModel.from_pretrained(tiny.model(), str(tmp_path / way))), want)
        verify(tmp_path / way)


def test_csulora_cut_back_keeps_the_rank_and_reports_the_loss(tmp_path: Path, gqa_subspace: AlignmentSubspace, gqa_model: Any) -> None:
    want = expected("csulora", gqa_subspace, updates(gqa_model))
    report = apply_csulora(gqa_model, gqa_subspace, output_rank="original")
    assert {m.A.shape[0] for m in lora_modules(gqa_model)} == {4}
    got = updates(gqa_model)
    for name, row in report.methods[0].layers.items():
        lost = (got[name] - want[name]).square().sum() / want[name].square().sum()
        assert row.measured["energy_lost_by_rank"] == pytest.approx(lost.item(), rel=1e-3)


def test_nothing_to_do_changes_no_bit(tmp_path: Path, gqa_subspace: AlignmentSubspace, gqa_model: Any) -> None:
    before = tiny.factors(gqa_model)
    config = copy.deepcopy(gqa_model.peft_config["default"])
    apply_safe_lora(gqa_model, gqa_subspace, threshold=-1.0)
    apply_csulora(gqa_model, gqa_subspace, lambda_partial=0, lambda_outside=0)
    assert tiny.identical(tiny.factors(gqa_model), before)
    assert gqa_model.peft_config["default"].to_dict() == config.to_dict()
    gqa_model.save_pretrained(tmp_path)
    assert not read_report(tmp_path).protected
    with pytest.raises(ReportError, match="NOT protected"):
        verify(tmp_path)
    correct_folder(tiny.DATA / "gqa-adapter", tmp_path / "folder", gqa_subspace, SafeLoraCorrection(SafeLoraConfig(threshold=-1)))
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "folder", tiny.DATA / "gqa-adapter"))
    assert tiny.identical(one, other)


def test_correcting_twice_is_refused_everywhere(tmp_path: Path, gqa_subspace: AlignmentSubspace, gqa_model: Any) -> None:
    apply_safe_lora(gqa_model, gqa_subspace, threshold=1.0)
    with pytest.raises(AdapterError, match="already corrected by safe_lora"):
        apply_csulora(gqa_model, gqa_subspace)
    gqa_model.save_pretrained(tmp_path / "once")
    loaded = PeftModel.from_pretrained(tiny.model(), str(tmp_path / "once"), is_trainable=True)
    with pytest.raises(AdapterError, match="already"):
        apply_safe_lora(loaded, gqa_subspace, threshold=1.0)
    # The mark survives a save by a model that knows nothing of it.
    loaded.save_pretrained(tmp_path / "again")
    with pytest.raises(AdapterError, match="already"):
        correct_folder(tmp_path / "again", tmp_path / "twice", gqa_subspace, correction("csulora"))
    assert not (tmp_path / "twice").exists()
    with pytest.raises(AdapterError, match="already"):
        plain_trainer(tmp_path, base=loaded, peft_config=None, callbacks=[callback("safe_lora", gqa_subspace)]).train()


@pytest.mark.parametrize("block", [{"safe_lora": {"threshold": 1.0}}, {"csulora": {}}])
def test_corrected_twice_in_one_process_is_refused(tmp_path: Path, gqa_subspace: AlignmentSubspace, block: Any) -> None:
    trainer = tiny.trainer(tmp_path, safety=block, subspace=gqa_subspace)
    trainer.train()
    with pytest.raises(AdapterError, match="already"):
        trainer.train()


def test_checkpoints_stay_uncorrected_and_say_so(tmp_path: Path, gqa_subspace: AlignmentSubspace) -> None:
    plain = plain_trainer(tmp_path / "plain", save_strategy="steps", save_steps=2)
    plain.train()
    trainer = plain_trainer(
        tmp_path / "ours", save_strategy="steps", save_steps=2, callbacks=[callback("safe_lora", gqa_subspace, corrected_checkpoints=True)]
    )
    trainer.train()
    for step in (2, 4):
        checkpoint = tmp_path / "ours" / f"checkpoint-{step}"
        one, other = (load_file(tmp_path / who / f"checkpoint-{step}" / "adapter_model.safetensors") for who in ("plain", "ours"))
        assert tiny.identical(one, other)
        assert (read_report(checkpoint).stage, read_report(checkpoint).protected) == ("training", False)
        with pytest.raises(ReportError, match="corrections and merges act when training ends"):
            verify(checkpoint)
        verify(checkpoint / "safety" / "corrected")
    final = load_file(tmp_path / "ours" / "checkpoint-4" / "safety" / "corrected" / "adapter_model.safetensors")
    trainer.save_model()
    assert tiny.largest_difference(load_file(tmp_path / "ours" / "adapter_model.safetensors"), final) < 1e-6


def test_acts_on_the_best_model_that_is_loaded_at_the_end(tmp_path: Path, gqa_subspace: AlignmentSubspace) -> None:
    options: dict[str, Any] = {
        "eval_dataset": tiny.rows(8, seed=9),
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": True,
    }
    trainer = plain_trainer(tmp_path, callbacks=[callback("safe_lora", gqa_subspace)], **options)
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name != "checkpoint-4"
    correct_folder(best, tmp_path / "want", gqa_subspace, correction("safe_lora"))
    trainer.save_model()
    assert tiny.largest_difference(*(load_file(f / "adapter_model.safetensors") for f in (tmp_path, tmp_path / "want"))) < 1e-6


@pytest.mark.skipif(
    Version(peft.__version__) < Version(getattr(transformers_peft, "MIN_PEFT_VERSION", "0")),
    reason="this Transformers adds an adapter itself with a newer PEFT alone",
)
def test_works_in_a_transformers_trainer(tmp_path: Path, gqa_subspace: AlignmentSubspace) -> None:
    from transformers import Trainer, TrainingArguments

    model = tiny.model()
    model.add_adapter(tiny.lora())
    data = [{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]}] * 8
    args = TrainingArguments(str(tmp_path), max_steps=1, report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no")
    trainer = Trainer(model, args, train_dataset=data, callbacks=[callback("csulora", gqa_subspace)])
    trainer.train()
    trainer.save_model()
    verify(tmp_path)


@pytest.mark.parametrize("method", ["safe_lora", "csulora"])
@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (None, "has no adapter"),
        ({"target_modules": ["q_proj"], "use_dora": True}, "use_dora = True"),
        ({"target_modules": ["q_proj", "o_proj"]}, "3 of 6 adapted layers.*o_proj"),
    ],
)
def test_what_cannot_act_is_an_error_when_training_starts(tmp_path: Path, method: str, adapter: Any, message: str) -> None:
    subspace = AlignmentSubspace.from_pair(
        tiny.DATA / "gqa-base", tiny.DATA / "gqa-aligned", target_modules=["q_proj"], rank=4, progress=False
    )
    trainer = plain_trainer(tmp_path, peft_config=adapter and tiny.lora(**adapter), callbacks=[callback(method, subspace)])
    with pytest.raises((AdapterError, SubspaceError), match=message):
        trainer.train()
    assert trainer.state.global_step == 0


def test_bad_options() -> None:
    with pytest.raises(ConfigurationError, match="either threshold"):
        SafeLoRACallback("S.safetensors", threshold=0.1, layers=3)
    with pytest.raises(ConfigurationError, match=r"safe_lora\.threshold = 3"):
        SafeLoRACallback("S.safetensors", threshold=3)
    with pytest.raises(ConfigurationError, match=r"csulora\.lambda_partial = -1"):
        CSULoRACallback("S.safetensors", lambda_partial=-1)
    with pytest.raises(SubspaceError, match="no such file"):
        SafeLoRACallback("S.safetensors")


def test_csulora_needs_a_rank(gqa_model: Any) -> None:
    pair = {"base": tiny.DATA / "gqa-base", "aligned": tiny.DATA / "gqa-aligned", "target_modules": "all-linear", "progress": False}
    with pytest.raises(SubspaceError, match="keeps V whole"):
        apply_csulora(gqa_model, AlignmentSubspace.from_pair(**pair, whole=True))


def test_folder_is_checked_against_the_base_model_at_hand(tmp_path: Path, gqa_subspace: AlignmentSubspace) -> None:
    adapter = Path(shutil.copytree(tiny.DATA / "gqa-adapter", tmp_path / "adapter"))
    config = json.loads((adapter / "adapter_config.json").read_text())

    def name_base(path: Path) -> None:
        (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(path)}))

    name_base(tiny.DATA / "gqa-base")
    with pytest.raises(AdapterError, match=r"differs from the subspace's aligned model"):
        correct_folder(adapter, tmp_path / "out", gqa_subspace, correction("safe_lora"))
    name_base(tiny.DATA / "gqa-aligned")
    report = correct_folder(adapter, tmp_path / "out", gqa_subspace, correction("safe_lora"))
    assert "match the subspace's aligned model" in report.base_check
    name_base(Path("someone/else"))
    assert "not verified" in correct_folder(adapter, tmp_path / "other", gqa_subspace, correction("safe_lora")).base_check


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: (a / "adapter_model.safetensors").write_bytes((a / "adapter_model.safetensors").read_bytes()[:500]), "truncated"),
        (lambda a: (a / "adapter_config.json").unlink(), "has no adapter_config.json"),
        (lambda a: (a / "adapter_model.safetensors").rename(a / "adapter_model.bin"), "pickle"),
        (lambda a: edit(a, r=8), "has rank 4, but its configuration says 8"),
        (lambda a: edit(a, peft_type="IA3"), "only LoRA"),
        (lambda a: edit(a, use_dora=True), "use_dora"),
        (lambda a: edit(a, init_lora_weights="pissa"), "init_lora_weights"),
        (lambda a: edit(a, some_new_variant=True), "some_new_variant"),
        (lambda a: edit(a, fan_in_fan_out=True), "fan_in_fan_out"),
    ],
)
def test_bad_adapter_folders(tmp_path: Path, gqa_subspace: AlignmentSubspace, change: Any, message: str) -> None:
    adapter = Path(shutil.copytree(tiny.DATA / "gqa-adapter", tmp_path / "adapter"))
    change(adapter)
    with pytest.raises(AdapterError, match=message):
        correct_folder(adapter, tmp_path / "out", gqa_subspace, correction("safe_lora"))
    assert not (tmp_path / "out").exists()


def edit(adapter: Path, **changes: Any) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, **changes}))


def test_another_models_subspace_is_refused(tmp_path: Path) -> None:
    mha = AlignmentSubspace.from_pair(
        tiny.DATA / "mha-base", tiny.DATA / "mha-aligned", target_modules="all-linear", rank=4, progress=False
    )
    with pytest.raises(AdapterError, match="belongs to another model"):
        correct_folder(tiny.DATA / "gqa-adapter", tmp_path / "out", mha, correction("safe_lora"))


def test_output_is_never_overwritten_and_input_never_touched(tmp_path: Path, gqa_subspace: AlignmentSubspace) -> None:
    adapter = Path(shutil.copytree(tiny.DATA / "gqa-adapter", tmp_path / "adapter"))
    before = {file.name: file.read_bytes() for file in adapter.iterdir()}
    with pytest.raises(AdapterError, match="is the input"):
        correct_folder(adapter, adapter, gqa_subspace, correction("safe_lora"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    with pytest.raises(AdapterError, match="never overwritten"):
        correct_folder(adapter, tmp_path / "full", gqa_subspace, correction("safe_lora"))
    with pytest.raises(AdapterError, match="cannot be written"):
        correct_folder(adapter, tmp_path / "full" / "mine" / "out", gqa_subspace, correction("safe_lora"))
    assert {file.name: file.read_bytes() for file in adapter.iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "full"]


def test_a_deep_copy_saves_itself(tmp_path: Path, gqa_subspace: AlignmentSubspace, gqa_model: Any) -> None:
    apply_safe_lora(gqa_model, gqa_subspace, threshold=1.0)
    other = copy.deepcopy(gqa_model)
    with torch.no_grad():
        for module in lora_modules(other):
            module.B.zero_()
    other.save_pretrained(tmp_path)
    assert all(not f.B.any() for f in AdapterFolder.open(tmp_path).factors.values())


def test_verify_sees_changes(tmp_path: Path, gqa_subspace: AlignmentSubspace) -> None:
    correct_folder(tiny.DATA / "gqa-adapter", tmp_path / "out", gqa_subspace, correction("safe_lora"))
    verify(tmp_path / "out")
    shutil.copy(tiny.DATA / "gqa-adapter" / "adapter_model.safetensors", tmp_path / "out")
    with pytest.raises(ReportError, match="has changed since"):
        verify(tmp_path / "out")
    (tmp_path / "out" / "safety_report.json").write_text("{")
    with pytest.raises(ReportError, match="damaged"):
        verify(tmp_path / "out")
    with pytest.raises(ReportError, match=r"no method of trl-safety protected it"):
        verify(tiny.DATA / "gqa-adapter")


def test_metrics_alone_do_not_move_a_whole_v(tmp_path: Path) -> None:
    pair = {"base": tiny.DATA / "gqa-base", "aligned": tiny.DATA / "gqa-aligned", "target_modules": "all-linear", "progress": False}
    trainer = tiny.trainer(tmp_path, safety={"safe_lora": {"threshold": 1.0}}, subspace=AlignmentSubspace.from_pair(**pair, whole=True))
    trainer.train()
    logs = [row for row in trainer.state.log_history if "loss" in row]
    assert all("safety/update_norm" in row and "safety/subspace_cosine" not in row for row in logs)
    assert trainer.safety_report.protected


def test_layers_without_an_update_are_none_of_the_k(tmp_path: Path, gqa_model: Any, gqa_subspace: AlignmentSubspace) -> None:
    modules = lora_modules(gqa_model)
    with torch.no_grad():
        for module in modules[:3]:
            module.B.zero_()
    report = apply_safe_lora(gqa_model, gqa_subspace, layers=3)
    corrected = [name for name, layer in report.methods[0].layers.items() if layer.action == "corrected"]
    assert len(corrected) == 3
    assert not {module.name for module in modules[:3]} & set(corrected)
