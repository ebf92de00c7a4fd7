"""Ways in which an unprotected adapter could look protected: found by trying, each closed here."""

import copy
import json
import pickle
import shutil
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from tests import tiny
from tests.tiny import DATA
from tests.training import providers
from trl_safety import (
    AlignmentSubspace,
    AlignmentVectorCallback,
    SafeLoRACallback,
    SafeSFTTrainer,
    SafetyEvalCallback,
    apply_alignment_vector,
    apply_safe_lora,
    merge_reinforce,
)
from trl_safety.adapters.fingerprint import Recognition, sample
from trl_safety.adapters.folder import AdapterFolder
from trl_safety.adapters.lora import lora_modules
from trl_safety.config.alignment_vector import AlignmentVectorConfig
from trl_safety.config.block import SafetyConfig
from trl_safety.config.safe_lora import SafeLoraConfig
from trl_safety.corrections.alignment_vector import AlignmentVectorCorrection
from trl_safety.corrections.buffer_reinforce import USER_ADAPTER
from trl_safety.corrections.folder import correct_folder
from trl_safety.corrections.prepared import prepare
from trl_safety.corrections.safe_lora import SafeLoraCorrection
from trl_safety.errors import AdapterError, ConfigurationError, ReportError, SubspaceError
from trl_safety.reports.report import read_report, verify
from trl_safety.scoring import Prompt
from trl_safety.training.mixin import SafetyMixin

ASFT = {"asft": {"weight": 1.0}}
BOTH = {**ASFT, "safe_lora": {"threshold": 1.0}}


def train_plainly(output: Path, model: Any, **kwargs: Any) -> Any:
    trainer = tiny.trainer(output, cls=SFTTrainer, args=tiny.arguments(output, SFTConfig, **kwargs), base=model, peft_config=None)
    trainer.train()
    return trainer


def never(weight: float = -1.0) -> SafeLoraCorrection:
    return SafeLoraCorrection(SafeLoraConfig(threshold=weight))


@pytest.mark.parametrize("block", [ASFT, BOTH])
def test_an_adapter_switched_after_the_trainer_was_made(tmp_path: Path, gqa_subspace: AlignmentSubspace, block: Any) -> None:
    trainer = tiny.trainer(tmp_path, safety=block, subspace=gqa_subspace)
    trainer.model.add_adapter("task", tiny.lora())
    trainer.model.set_adapter("task")
    with pytest.raises(AdapterError, match="active adapter was changed"):
        trainer.train()


def test_an_adapter_frozen_after_the_trainer_was_made(tmp_path: Path, gqa_subspace: AlignmentSubspace) -> None:
    trainer = tiny.trainer(tmp_path, safety=ASFT, subspace=gqa_subspace)
    for name, parameter in trainer.model.named_parameters():
        parameter.requires_grad_("lora_" not in name)
    with pytest.raises(AdapterError, match="is frozen"):
        trainer.train()


def test_parameters_unfrozen_after_the_trainer_was_made_are_reported(tmp_path: Path, gqa_subspace: AlignmentSubspace) -> None:
    trainer = tiny.trainer(tmp_path, safety=ASFT, subspace=gqa_subspace)
    trainer.model.get_input_embeddings().weight.requires_grad_()
    trainer.train()
    assert any("embed_tokens" in name for name in trainer.safety_report.not_covered)


class Interrupt(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt


@pytest.mark.parametrize("block", [ASFT, BOTH])
def test_an_interrupted_run_trained_on_without_protection(tmp_path: Path, gqa_subspace: AlignmentSubspace, block: Any) -> None:
    trainer = tiny.trainer(tmp_path, safety=block, subspace=gqa_subspace, callbacks=[Interrupt()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.model.save_pretrained(tmp_path / "interrupted")
    report = read_report(tmp_path / "interrupted")
    assert report.stage == "training"
    assert report.protected == (block is ASFT)
    train_plainly(tmp_path / "plain", trainer.model)
    trainer.model.save_pretrained(tmp_path / "further")
    assert not read_report(tmp_path / "further").protected


@pytest.mark.parametrize("block", [ASFT, BOTH])
def test_a_copy_trained_on_without_protection(tmp_path: Path, gqa_subspace: AlignmentSubspace, block: Any) -> None:
    trainer = tiny.trainer(tmp_path, safety=block, subspace=gqa_subspace)
    trainer.train()
    copied = copy.deepcopy(trainer.model)
    copied.save_pretrained(tmp_path / "copy")
    verify(tmp_path / "copy")
    train_plainly(tmp_path / "plain", copied)
    copied.save_pretrained(tmp_path / "further")
    assert not read_report(tmp_path / "further").protected
    trainer.save_model(tmp_path / "original")
    verify(tmp_path / "original")
    # Pickling the model pickles this with it.
    kept = pickle.loads(pickle.dumps(trainer.model._trl_safety_reports))["default"]  # noqa: S301
    assert kept.current(trainer.model).protected
    assert not kept.current(copied).protected


def test_only_modules_to_save_trained_on(tmp_path: Path, gqa_subspace: AlignmentSubspace) -> None:
    trainer = tiny.trainer(tmp_path, safety=ASFT, subspace=gqa_subspace, peft_config=tiny.lora(modules_to_save=["embed_tokens"]))
    trainer.train()
    with torch.no_grad():
        trainer.model.get_input_embeddings().modules_to_save["default"].weight.add_(1.0)
    assert not trainer.safety_report.protected


def test_a_stale_report_is_not_carried_over(tmp_path: Path, gqa_subspace: AlignmentSubspace) -> None:
    trainer = tiny.trainer(tmp_path, safety=ASFT, subspace=gqa_subspace)
    trainer.train()
    trainer.save_model(tmp_path / "adapter")
    correct_folder(tmp_path / "adapter", tmp_path / "fresh", gqa_subspace, never())
    assert [m.name for m in verify(tmp_path / "fresh").methods] == ["asft", "safe_lora"]
    plain = tiny.trainer(tmp_path / "plain", cls=SFTTrainer, args=tiny.arguments(tmp_path / "plain", SFTConfig))
    plain.train()
    plain.save_model(tmp_path / "adapter")
    with pytest.raises(ReportError, match="has changed since"):
        verify(tmp_path / "adapter")
    correct_folder(tmp_path / "adapter", tmp_path / "stale", gqa_subspace, never())
    assert not read_report(tmp_path / "stale").protected


def test_a_callback_used_again_reports_its_own_run(tmp_path: Path, gqa_subspace: AlignmentSubspace) -> None:
    callback = SafeLoRACallback(gqa_subspace, threshold=1.0)
    tiny.trainer(tmp_path, safety=ASFT, subspace=gqa_subspace, callbacks=[callback]).train()
    again = tiny.trainer(tmp_path, cls=SFTTrainer, args=tiny.arguments(tmp_path, SFTConfig), callbacks=[callback])
    again.train()
    again.save_model()
    assert [m.name for m in verify(tmp_path).methods] == ["safe_lora"]


def test_an_edited_configuration_is_seen(tmp_path: Path, gqa_subspace: AlignmentSubspace, gqa_model: Any) -> None:
    apply_safe_lora(gqa_model, gqa_subspace, threshold=1.0)
    gqa_model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "moved/elsewhere"}))
    verify(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 800}))
    with pytest.raises(ReportError, match="has changed since"):
        verify(tmp_path)


def test_pickles_are_refused_before_anything_is_written(tmp_path: Path, gqa_subspace: AlignmentSubspace, gqa_model: Any) -> None:
    apply_safe_lora(gqa_model, gqa_subspace, threshold=1.0)
    with pytest.raises(ReportError, match="safe_serialization = False"):
        gqa_model.save_pretrained(tmp_path / "out", safe_serialization=False)
    assert not (tmp_path / "out").exists()


def test_resuming_from_an_unprotected_checkpoint_is_reported(tmp_path: Path, gqa_subspace: AlignmentSubspace) -> None:
    options = {"save_strategy": "steps", "save_steps": 2}
    tiny.trainer(tmp_path, cls=SFTTrainer, args=tiny.arguments(tmp_path, SFTConfig, **options)).train()
    trainer = tiny.trainer(tmp_path, safety=ASFT, subspace=gqa_subspace, **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    trainer.save_model()
    report = read_report(tmp_path)
    assert not report.protected
    assert "in optimizer steps 3 to 4; steps 1 to 2 were trained without it" in report.methods[0].summary


def test_resuming_from_a_protected_one_carries_it_on(tmp_path: Path, gqa_subspace: AlignmentSubspace) -> None:
    options = {"safety": ASFT, "subspace": gqa_subspace, "save_strategy": "steps", "save_steps": 2}
    tiny.trainer(tmp_path, **options).train()
    for checkpoint in ("checkpoint-2", "checkpoint-4"):
        trainer = tiny.trainer(tmp_path, **options)
        trainer.train(resume_from_checkpoint=str(tmp_path / checkpoint))
        trainer.save_model()
        assert "in optimizer steps 1 to 4" in verify(tmp_path).methods[0].summary


def test_a_checkpoint_before_its_correction_is_not_protected(tmp_path: Path, gqa_subspace: AlignmentSubspace) -> None:
    trainer = tiny.trainer(tmp_path, safety=BOTH, subspace=gqa_subspace, save_strategy="steps", save_steps=2)
    trainer.train()
    with pytest.raises(ReportError, match="corrections and merges act when training ends"):
        verify(tmp_path / "checkpoint-4")


@pytest.mark.parametrize("name", ["default", "mine"])
def test_corrected_copies_do_not_disturb_resuming(tmp_path: Path, gqa_subspace: AlignmentSubspace, name: str) -> None:
    from peft import get_peft_model

    def trainer(folder: Path) -> Any:
        torch.manual_seed(0)
        model = get_peft_model(tiny.model(), tiny.lora(), adapter_name=name)
        block = {"safe_lora": {"threshold": 1.0, "corrected_checkpoints": True}}
        return tiny.trainer(folder, base=model, peft_config=None, safety=block, subspace=gqa_subspace, save_strategy="steps", save_steps=2)

    whole = trainer(tmp_path / "whole")
    whole.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "killed" / "checkpoint-2")
    resumed = trainer(tmp_path / "killed")
    resumed.train(resume_from_checkpoint=True)
    assert list(resumed.model.peft_config) == [name]
    assert tiny.identical(tiny.factors(resumed.model), tiny.factors(whole.model))
    again = trainer(tmp_path / "killed")
    again.train(resume_from_checkpoint=str(tmp_path / "killed" / "checkpoint-2"))
    verify(tmp_path / "killed" / "checkpoint-4" / "safety" / "corrected")


def test_corrected_copies_of_no_checkpoint(tmp_path: Path, gqa_subspace: AlignmentSubspace) -> None:
    block = {"safe_lora": {"threshold": 1.0, "corrected_checkpoints": True}}
    trainer = tiny.trainer(tmp_path, safety=block, subspace=gqa_subspace, save_strategy="no")
    with pytest.raises(ConfigurationError, match=r"safe_lora.corrected_checkpoints = True: save_strategy = 'no'"):
        trainer.train()


def test_weights_that_cannot_be_read_are_not_called_verified(gqa_model: Any, gqa_subspace: AlignmentSubspace) -> None:
    for module in lora_modules(gqa_model):
        module.layer.get_base_layer().to("meta")
    assert prepare(gqa_model, gqa_subspace).base_check.startswith("not verified: no layer's weights could be read")


def test_a_method_with_nothing_behind_it_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "safety.yaml"
    path.write_text("subspace: S\nasft:\nsafe_lora: {}\n")
    with pytest.raises(ConfigurationError, match="asft is empty"):
        SafetyConfig.parse(path)
    path.write_text("subspace: S\nasft: {weight: 5}\nasft: {weight: 0}\n")
    with pytest.raises(ConfigurationError, match="'asft' appears twice"):
        SafetyConfig.parse(path)


def test_the_arguments_in_a_plain_trainer_are_an_error(tmp_path: Path) -> None:
    args = tiny.arguments(tmp_path, safety={"subspace": "S.safetensors", "asft": {}})
    with pytest.raises(ConfigurationError, match="not a SafeSFTTrainer"):
        tiny.trainer(tmp_path, cls=SFTTrainer, args=args).train()


def test_a_diverged_run_goes_on_as_without_us(tmp_path: Path, gqa_subspace: AlignmentSubspace) -> None:
    trainer = tiny.trainer(tmp_path, safety=ASFT, subspace=gqa_subspace)
    with torch.no_grad():
        next(m for m in trainer._safety.prepared.covered).B.fill_(float("nan"))
    trainer.train()
    assert trainer.state.log_history[-1]["safety/update_norm"] != trainer.state.log_history[-1]["safety/update_norm"]


def test_a_users_file_in_the_output_folder_stays(tmp_path: Path, gqa_subspace: AlignmentSubspace) -> None:
    mine = gqa_subspace.save(tmp_path / "alignment_subspace.safetensors").read_bytes()
    pair = {"base": str(tiny.DATA / "gqa-base"), "aligned": str(tiny.DATA / "gqa-aligned"), "rank": 2}
    tiny.trainer(tmp_path, safety={**ASFT, "subspace": pair})
    assert (tmp_path / "alignment_subspace.safetensors").read_bytes() == mine


def test_a_base_that_shares_no_name_is_not_verified(tmp_path: Path, gqa_subspace: AlignmentSubspace) -> None:
    from safetensors.torch import save_file

    shutil.copytree(tiny.DATA / "gqa-adapter", tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(tmp_path / "base")}))
    shutil.copytree(tiny.DATA / "gqa-aligned", tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    save_file({f"strange.{name}": torch.randn_like(value) for name, value in weights.items()}, tmp_path / "base" / "model.safetensors")
    assert "not verified" in correct_folder(tmp_path / "adapter", tmp_path / "out", gqa_subspace, never(1.0)).base_check


def test_loosely_matched_names_need_a_verified_base(tmp_path: Path, gqa_subspace: AlignmentSubspace) -> None:
    from safetensors.torch import save_file

    shutil.copytree(tiny.DATA / "gqa-adapter", tmp_path / "adapter")
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    renamed = {name.replace("model.model.layers", "model.model.text_model.layers"): value for name, value in weights.items()}
    save_file(renamed, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="base model is not available"):
        correct_folder(tmp_path / "adapter", tmp_path / "out", gqa_subspace, never(1.0))


def test_two_adapters_of_one_model_keep_their_reports(tmp_path: Path, gqa_subspace: AlignmentSubspace, gqa_model: Any) -> None:
    gqa_model.add_adapter("other", tiny.lora())
    apply_safe_lora(gqa_model, gqa_subspace, threshold=1.0, adapter="default")
    apply_safe_lora(gqa_model, gqa_subspace, threshold=1.0, adapter="other")
    gqa_model.save_pretrained(tmp_path)
    verify(tmp_path)
    verify(tmp_path / "other")


def test_the_card_and_the_property_see_further_training_too(tmp_path: Path, gqa_subspace: AlignmentSubspace) -> None:
    trainer = tiny.trainer(tmp_path, safety=BOTH, subspace=gqa_subspace)
    trainer.train()
    assert trainer.safety_report.protected
    train_plainly(tmp_path / "plain", trainer.model)
    assert not trainer.safety_report.protected
    trainer.create_model_card(model_name="x")
    assert "NOT protected" in (tmp_path / "README.md").read_text()


def test_a_small_merged_adapter_is_another_model(tmp_path: Path, gqa_subspace: AlignmentSubspace) -> None:
    model = tiny.model()
    with torch.no_grad():
        weight = model.get_submodule("model.layers.0.self_attn.q_proj").weight
        weight.add_(torch.randn_like(weight) * weight.std() * 1e-3)
    with pytest.raises(AdapterError, match="another model"):
        tiny.trainer(tmp_path, base=model, safety=ASFT, subspace=gqa_subspace)
    for dtype in (torch.bfloat16, torch.float16):
        tiny.trainer(tmp_path, base=tiny.model().to(dtype).float(), safety=ASFT, subspace=gqa_subspace)


@pytest.mark.parametrize("block", [{"safe_lora": {"threshold": 1.0}}, {"csulora": {}}])
def test_a_users_lora_config_serves_another_run(tmp_path: Path, gqa_subspace: AlignmentSubspace, block: Any) -> None:
    config = tiny.lora()
    before = copy.deepcopy(config.to_dict())
    for _ in range(2):
        trainer = tiny.trainer(tmp_path, peft_config=config, safety=block, subspace=gqa_subspace)
        trainer.train()
        assert trainer.safety_report.protected
    assert {**config.to_dict(), "base_model_name_or_path": None} == {**before, "base_model_name_or_path": None}


class TestBuffersAndVectors:
    """Found in a second search: each of these once ended with a report that said protected."""

    @pytest.fixture(scope="class")
    def provider(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        torch.manual_seed(0)
        return providers.make(tmp_path_factory.mktemp("provider"))

    @staticmethod
    def block(provider: Path) -> dict[str, Any]:
        return {"buffer_reinforce": {"buffer": str(provider / "buffer"), "reinforce": str(provider / "reinforce")}}

    def test_a_model_object_that_held_another_adapter(self, provider: Path, tmp_path: Path, gqa_subspace: AlignmentSubspace) -> None:
        model = tiny.model()
        first = tiny.trainer(tmp_path / "a", base=model, peft_config=tiny.lora(target_modules=["q_proj", "k_proj"]))
        first.train()
        with pytest.raises(AdapterError, match="left over from another adapter on the same model object"):
            tiny.trainer(tmp_path / "b", base=model, peft_config=tiny.lora(target_modules=["q_proj"]), safety=self.block(provider))
        # And on disk, where PEFT would leave the further factors out.
        first.save_model()
        config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
        (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["q_proj"]}))
        with pytest.raises(AdapterError, match="which its target_modules do not name"):
            merge_reinforce(tmp_path / "a", provider / "reinforce", tmp_path / "out")

    @pytest.mark.parametrize("layer", ["q_proj", "o_proj", "down_proj"])
    def test_a_stage_before_that_the_checkpoint_does_not_have(self, tmp_path: Path, layer: str) -> None:
        base = tiny.model()
        base.model.layers[1].get_submodule(f"self_attn.{layer}" if layer != "down_proj" else f"mlp.{layer}").weight.data.mul_(1.01)
        before = {name: value.clone() for name, value in base.state_dict().items()}
        pair = {"base": str(DATA / "gqa-base"), "aligned": str(DATA / "gqa-aligned")}
        with pytest.raises(AdapterError, match="load the aligned model of the pair"):
            tiny.trainer(tmp_path, base=base, safety={"alignment_buffer": pair}).train()
        now = {name.replace(".base_layer", ""): value for name, value in base.state_dict().items() if "lora_" not in name}
        assert tiny.identical(before, now)

    def test_alignment_in_few_layers_is_alignment(self, tmp_path: Path) -> None:
        aligned = tiny.model("gqa-base")
        aligned.model.layers[2].self_attn.v_proj.weight.data += 0.1
        aligned.save_pretrained(tmp_path / "aligned")
        pair = {"base": str(DATA / "gqa-base"), "aligned": str(tmp_path / "aligned")}
        tiny.trainer(tmp_path / "out", base=tiny.model(str(tmp_path / "aligned")), safety={"alignment_buffer": pair}).train()

    def test_a_pair_in_the_block_covers_all_layers(self, tmp_path: Path) -> None:
        pair = {"base": str(DATA / "gqa-base"), "aligned": str(DATA / "gqa-aligned"), "rank": 8}
        trainer = tiny.trainer(tmp_path / "a", safety={"subspace": pair, "alignment_vector": {"all_layers": True}})
        trainer.train()
        assert len(trainer.safety_report.methods[0].layers) == 21
        trainer = tiny.trainer(tmp_path / "b", safety={"subspace": pair, "alignment_buffer": {"how": "low_rank"}})
        trainer.train()
        assert "in 21 layers" in trainer.safety_report.methods[0].summary

    @pytest.mark.parametrize("options", [{"gamma": -1.0}, {"gamma": 0.0, "dare": 0.1}, {"gamma": 0.0, "kappa": 0.5}])
    def test_taking_alignment_out_is_no_protection(
        self, gqa_model: Any, gqa_subspace: AlignmentSubspace, options: dict[str, float]
    ) -> None:
        report = apply_alignment_vector(gqa_model, gqa_subspace, **options)
        assert not report.protected
        assert "NOT a protection" in report.methods[0].summary

    def test_an_untrained_buffer(self, tmp_path: Path) -> None:
        from trl import SFTConfig

        from trl_safety import BufferTrainer

        config = tiny.lora(init_lora_weights=True)
        tiny.trainer(tmp_path / "b", cls=BufferTrainer, args=tiny.arguments(tmp_path / "b", SFTConfig), peft_config=config).save_model()
        with pytest.raises(AdapterError, match="its update is zero in every layer"):
            tiny.trainer(tmp_path, safety={"buffer_reinforce": {"buffer": str(tmp_path / "b")}})

    def test_skip_modules_beside_a_buffer(self, provider: Path, tmp_path: Path, gqa_subspace: AlignmentSubspace) -> None:
        with pytest.raises(ConfigurationError, match="cannot leave layers alone"):
            tiny.trainer(tmp_path, safety={"skip_modules": ["q_proj"], "asft": {}, **self.block(provider)}, subspace=gqa_subspace)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_added_layers_do_not_round_the_trained_ones(self, provider: Path, tmp_path: Path, dtype: torch.dtype) -> None:
        trainer = tiny.trainer(tmp_path, base=tiny.model(dtype=dtype), safety=self.block(provider), learning_rate=1e-5)
        trainer.train()
        trainer.save_model()
        merge_reinforce(tmp_path / USER_ADAPTER, provider / "reinforce", tmp_path / "again")
        one, other = (
            {name: f.scaling * f.B.double() @ f.A.double() for name, f in AdapterFolder.open(folder).factors.items()}
            for folder in (tmp_path, tmp_path / "again")
        )
        assert tiny.largest_difference(one, other) < 1e-6

    def test_biases_of_lora_and_added_layers(self, tmp_path: Path, gqa_subspace: AlignmentSubspace) -> None:
        with pytest.raises(AdapterError, match="lora_bias = True"):
            tiny.trainer(
                tmp_path, peft_config=tiny.lora(lora_bias=True), safety={"alignment_vector": {"all_layers": True}}, subspace=gqa_subspace
            )

    def test_the_vector_and_the_merge_by_another_way(self, provider: Path, tmp_path: Path, gqa_subspace: AlignmentSubspace) -> None:
        with pytest.raises(ConfigurationError, match="weighted down by buffer_reinforce's merge"):
            tiny.trainer(tmp_path, safety=self.block(provider), callbacks=[AlignmentVectorCallback(gqa_subspace)])
        correct_folder(DATA / "gqa-adapter", tmp_path / "v", gqa_subspace, AlignmentVectorCorrection(AlignmentVectorConfig()))
        with pytest.raises(AdapterError, match="contains the alignment vector"):
            merge_reinforce(tmp_path / "v", provider / "reinforce", tmp_path / "out")

    def test_resuming_with_other_settings(self, tmp_path: Path) -> None:
        pair = {"base": str(DATA / "gqa-base"), "aligned": str(DATA / "gqa-aligned")}
        tiny.trainer(tmp_path, safety={"alignment_buffer": {**pair, "gamma": 0.01}}, save_strategy="steps", save_steps=2).train()
        trainer = tiny.trainer(tmp_path, safety={"alignment_buffer": pair})
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert not trainer.safety_report.protected
        assert "steps 1 to 2 were trained without it" in trainer.safety_report.methods[0].summary

    def test_a_buffer_as_a_second_adapter(self, provider: Path, tmp_path: Path, gqa_subspace: AlignmentSubspace) -> None:
        model = PeftModel.from_pretrained(tiny.model(), str(DATA / "gqa-adapter"), is_trainable=True)
        model.load_adapter(str(provider / "buffer"), "buf")
        model.set_adapter("default")
        with pytest.raises(AdapterError, match="adapter 'buf' of the model is a BufferLoRA"):
            tiny.trainer(tmp_path, base=model, peft_config=None, safety={"asft": {}}, subspace=gqa_subspace)

    def test_added_tokens_are_left_alone(self, tmp_path: Path) -> None:
        pair = {"base": str(DATA / "gqa-base"), "aligned": str(DATA / "gqa-aligned")}
        for config in (tiny.lora(), tiny.lora(modules_to_save=["embed_tokens", "lm_head"]), tiny.lora(trainable_token_indices=[3, 4])):
            base = tiny.model()
            base.resize_token_embeddings(70)
            trainer = tiny.trainer(tmp_path, base=base, peft_config=config, safety={"alignment_buffer": pair})
            before = {name: value.clone() for name, value in trainer.model.named_parameters() if not value.requires_grad}
            trainer.train()
            assert tiny.identical(before, {name: value for name, value in trainer.model.named_parameters() if name in before})

    def test_a_place_for_the_users_adapter(self, provider: Path, tmp_path: Path) -> None:
        (tmp_path / "safety").write_text("a file")
        with pytest.raises(AdapterError, match="the user's adapter is kept there"):
            tiny.trainer(tmp_path, safety=self.block(provider)).train()


class TestPairs:
    """Pairs that are not pairs, or are the wrong way round."""

    @pytest.fixture
    def pair(self, tmp_path: Path) -> Path:
        """A base a fifth away from the aligned model, in every weight; layers of 64 for bitsandbytes."""
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
        model = LlamaForCausalLM(config)
        model.save_pretrained(tmp_path / "aligned")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * parameter.std() * 0.2)
        model.save_pretrained(tmp_path / "base")
        return tmp_path

    def test_one_model_in_two_precisions(self, tmp_path: Path) -> None:
        tiny.model(dtype=torch.bfloat16).save_pretrained(tmp_path / "rounded")
        pair = {"base": str(tmp_path / "rounded"), "aligned": str(DATA / "gqa-aligned")}
        with pytest.raises(SubspaceError, match="identical in the base and the aligned model up to rounding"):
            tiny.trainer(tmp_path / "a", safety={"subspace": {**pair, "rank": 4}, "asft": {}})
        with pytest.raises(AdapterError, match="do not differ by more than rounding"):
            tiny.trainer(tmp_path / "b", safety={"alignment_buffer": pair})

    @pytest.mark.parametrize("loaded", ["aligned", "base"])
    def test_a_quantised_base_and_a_swapped_pair(self, pair: Path, loaded: str) -> None:
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)

        def block(base: str, aligned: str) -> dict[str, Any]:
            return {"alignment_buffer": {"base": str(pair / base), "aligned": str(pair / aligned)}}

        def made(safety: dict[str, Any]) -> Any:
            model = AutoModelForCausalLM.from_pretrained(pair / loaded, quantization_config=quantised, device_map={"": "cpu"})
            return tiny.trainer(pair / "out", base=model, safety=safety)

        other = "base" if loaded == "aligned" else "aligned"
        with pytest.raises(AdapterError, match=r"as far as its quantisation shows: load the aligned|load the aligned model of the pair"):
            made(block(loaded, other))
        assert made(block(other, loaded))._safety.prepared.base_check.endswith(", up to quantisation")

    def test_a_checkpoint_holds_the_aligned_models_embeddings(self, tmp_path: Path) -> None:
        """After a resized vocabulary PEFT saves the embeddings with the adapter, even while V is subtracted from them."""
        model = tiny.model("gqa-base")
        with torch.no_grad():
            model.get_input_embeddings().weight.add_(0.1)
        model.save_pretrained(tmp_path / "base")
        pair = {"base": str(tmp_path / "base"), "aligned": str(DATA / "gqa-aligned")}
        aligned = tiny.model().get_input_embeddings().weight

        def made() -> Any:
            base = tiny.model()
            torch.manual_seed(1)
            base.resize_token_embeddings(70)
            options = {"save_strategy": "steps", "save_steps": 2}
            return tiny.trainer(tmp_path / "out", base=base, safety={"alignment_buffer": pair}, **options)

        whole = made()
        whole.train()
        saved = load_file(tmp_path / "out" / "checkpoint-2" / "adapter_model.safetensors")
        (embeddings,) = [value for name, value in saved.items() if "embed_tokens" in name]
        assert torch.equal(embeddings[: len(aligned)], aligned)
        resumed = made()
        resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
        assert tiny.largest_difference(tiny.factors(resumed.model), tiny.factors(whole.model)) < 1e-5

    def test_the_users_own_evaluation_is_on_the_aligned_model(self, tmp_path: Path) -> None:
        aligned = tiny.model().get_submodule("model.layers.0.mlp.down_proj").weight
        seen = []

        class Judge:
            name, knows_refusals = "looks", True

            def verdicts(self, prompts: Any, completions: Any) -> list[str]:
                layer = trainer.model.get_submodule("base_model.model.model.layers.0.mlp.down_proj").base_layer
                seen.append(torch.equal(layer.weight, aligned))
                return ["refused"] * len(prompts)

        pair = {"base": str(DATA / "gqa-base"), "aligned": str(DATA / "gqa-aligned")}
        callback = SafetyEvalCallback({"harmful": [Prompt("w3")]}, tiny.tokenizer(), steps=2, judge=Judge(), new_tokens=2)
        trainer = tiny.trainer(tmp_path, safety={"alignment_buffer": pair}, callbacks=[callback])
        trainer.train()
        assert seen
        assert all(seen)

    def test_quantised_weights_are_told_apart_only_where_that_is_certain(self) -> None:
        """Thirty pairs whose V is a thousandth of W: the right model is never refused, and the base is never accepted as verified."""

        for seed in range(30):
            torch.manual_seed(seed)
            for size, certain in ((0.001, False), (0.1, True)):
                verdicts = {}
                layers = [torch.randn(64, 64) for _ in range(8)]
                changes = [size * torch.randn(64, 64) for _ in layers]
                for which, sign in (("aligned", 1), ("base", 0)):
                    found = verdicts[which] = Recognition()
                    for base, change in zip(layers, changes, strict=True):
                        loaded = base + sign * change
                        rounded = loaded + 0.1 * torch.randn(64, 64)
                        assert found.add(rounded, torch.stack([sample(base), sample(base + change)]), quantised=True) == 0
                assert not verdicts["aligned"].unaligned
                assert verdicts["base"].qualifier != ", up to quantisation"
                if certain:
                    assert verdicts["base"].unaligned
                    assert verdicts["aligned"].qualifier == ", up to quantisation"


class TestArguments:
    """A block in the arguments, given to a trainer that ignores it."""

    def test_with_an_optimizer_of_ones_own(self, tmp_path: Path, gqa_subspace: AlignmentSubspace) -> None:
        model = PeftModel.from_pretrained(tiny.model(), str(DATA / "gqa-adapter"), is_trainable=True)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
        with pytest.raises(ConfigurationError, match=r"args\.safety is set, but the trainer is not a SafeSFTTrainer"):
            SFTTrainer(
                model, args=tiny.arguments(tmp_path, safety=ASFT), train_dataset=tiny.rows(8), processing_class=tiny.tokenizer(),
                optimizers=(optimizer, scheduler),
            )  # fmt: skip

    def test_after_they_served_a_protected_one(self, tmp_path: Path, gqa_subspace: AlignmentSubspace) -> None:
        args = tiny.arguments(tmp_path, safety=ASFT)
        assert tiny.trainer(tmp_path, args=args, subspace=gqa_subspace)._safety
        with pytest.raises(ConfigurationError, match="use SafeSFTTrainer"):
            tiny.trainer(tmp_path, cls=SFTTrainer, args=args)

    def test_stopping_for_what_a_callback_corrects(self, tmp_path: Path, gqa_subspace: AlignmentSubspace) -> None:
        (tmp_path / "h.jsonl").write_text(json.dumps({"prompt": "w3"}))
        block = {**ASFT, "eval": {"harmful": str(tmp_path / "h.jsonl"), "stop_above": 0.5}}
        trainer = tiny.trainer(tmp_path, safety=block, subspace=gqa_subspace, callbacks=[SafeLoRACallback(gqa_subspace, threshold=1.0)])
        with pytest.raises(ConfigurationError, match="before safe_lora acts"):
            trainer.train()

    def test_of_a_protected_trainer_and_from_its_checkpoint(self, tmp_path: Path, gqa_subspace: AlignmentSubspace) -> None:
        trainer = tiny.trainer(tmp_path, args=tiny.arguments(tmp_path, safety=ASFT), subspace=gqa_subspace)
        trainer.train()
        trainer.save_model()
        for args in (trainer.args, torch.load(tmp_path / "training_args.bin", weights_only=False)):
            with pytest.raises(ConfigurationError, match="use SafeSFTTrainer"):
                tiny.trainer(tmp_path, cls=SFTTrainer, args=args)
        assert tiny.trainer(tmp_path, args=trainer.args, subspace=gqa_subspace)._safety

    def test_stopping_for_what_a_callback_corrects_in_a_plain_trainer(self, tmp_path: Path, gqa_subspace: AlignmentSubspace) -> None:
        watching = SafetyEvalCallback({"harmful": [Prompt("w3")]}, tiny.tokenizer(), steps=1, new_tokens=2, stop_above=0.5)
        callbacks = [watching, SafeLoRACallback(gqa_subspace, threshold=1.0)]
        trainer = tiny.trainer(tmp_path, cls=SFTTrainer, args=tiny.arguments(tmp_path, SFTConfig), callbacks=callbacks)
        with pytest.raises(ConfigurationError, match="before safe_lora acts"):
            trainer.train()


class OwnLoss(SafeSFTTrainer):
    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        inputs.pop("safety_row", None)
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


class OwnStep(SafeSFTTrainer):
    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        model.train()
        loss = self.compute_loss(model, self._prepare_inputs(inputs), num_items_in_batch=num_items_in_batch)
        self.accelerator.backward(loss)
        return loss.detach()


class WrongOrder(SFTTrainer, SafetyMixin):
    pass


PAIR = {"base": str(DATA / "gqa-base"), "aligned": str(DATA / "gqa-aligned")}
DUAL: dict[str, Any] = {"dual_select": {"warmup_steps": 1, "keep": 4, "references": 8}}


class TestTrainersThatGoBy:
    """A trainer that bypasses a method is stopped in its first step, and its adapter is not reported as protected."""

    @pytest.fixture(scope="class")
    def buffer(self, tmp_path_factory: pytest.TempPathFactory) -> str:
        return str(providers.make(tmp_path_factory.mktemp("provider")) / "buffer")

    def stopped(self, trainer: Any, folder: Path, name: str) -> None:
        with pytest.raises(ConfigurationError, match=f"{name}.* did not act in optimizer step 1: training bypasses SafetyMixin"):
            trainer.train()
        trainer.save_model(str(folder / "saved"))
        with pytest.raises(ReportError, match=r"NOT protected|has no safety_report|did not act"):
            verify(folder / "saved")

    def test_a_loss_of_its_own(self, tmp_path: Path, gqa_subspace: AlignmentSubspace) -> None:
        self.stopped(tiny.trainer(tmp_path / "a", cls=OwnLoss, safety=ASFT, subspace=gqa_subspace), tmp_path / "a", "asft")
        trainer = tiny.trainer(tmp_path / "d", cls=OwnLoss, safety=DUAL, reference_dataset=tiny.rows(16, seed=9))
        self.stopped(trainer, tmp_path / "d", "dual_select")

    def test_an_assigned_loss_and_a_model_out_of_training_mode(self, tmp_path: Path, gqa_subspace: AlignmentSubspace) -> None:
        trainer = tiny.trainer(tmp_path / "a", safety=ASFT, subspace=gqa_subspace)
        trainer.compute_loss = MethodType(OwnLoss.compute_loss, trainer)
        self.stopped(trainer, tmp_path / "a", "asft")
        trainer = tiny.trainer(tmp_path / "b", safety=ASFT, subspace=gqa_subspace)
        trainer.model.eval()
        trainer.model.train = lambda mode=True: trainer.model
        self.stopped(trainer, tmp_path / "b", "asft")

    def test_a_step_of_its_own(self, tmp_path: Path, buffer: str, gqa_subspace: AlignmentSubspace) -> None:
        trainer = tiny.trainer(tmp_path / "b", cls=OwnStep, safety={"buffer_reinforce": {"buffer": buffer}})
        self.stopped(trainer, tmp_path / "b", "buffer_reinforce")
        trainer = tiny.trainer(tmp_path / "d", cls=OwnStep, safety=DUAL, reference_dataset=tiny.rows(16, seed=9))
        self.stopped(trainer, tmp_path / "d", "dual_select's gradient")
        low_rank = {"alignment_buffer": {"how": "low_rank"}}
        trainer = tiny.trainer(tmp_path / "l", cls=OwnStep, safety=low_rank, subspace=gqa_subspace)
        self.stopped(trainer, tmp_path / "l", "alignment_buffer")

    @pytest.mark.parametrize("safety", [ASFT, {"alignment_buffer": PAIR}], ids=["asft", "alignment_buffer"])
    def test_the_mixin_behind_the_trainer(self, tmp_path: Path, gqa_subspace: AlignmentSubspace, safety: dict[str, Any]) -> None:
        trainer = tiny.trainer(tmp_path, cls=WrongOrder, args=tiny.arguments(tmp_path, SFTConfig))
        trainer.start_safety(safety, gqa_subspace if "asft" in safety else None)
        self.stopped(trainer, tmp_path, next(iter(safety)))


class TestWhatWasTrainedWithout:
    """Earlier steps of the adapter in which a method did not act."""

    def test_the_best_checkpoint_is_one_of_the_warm_up(self, tmp_path: Path) -> None:
        strategies = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
        block = {"dual_select": {**DUAL["dual_select"], "warmup_steps": 3}}
        trainer = tiny.trainer(
            tmp_path, safety=block, reference_dataset=tiny.rows(16, seed=9), eval_dataset=tiny.rows(8, seed=4), max_steps=5,
            load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=True, learning_rate=0.05, **strategies,
        )  # fmt: skip
        trainer.train()
        assert trainer.state.best_model_checkpoint.endswith(("-1", "-2", "-3"))
        trainer.save_model()
        with pytest.raises(ReportError, match="has not left its warm-up"):
            verify(tmp_path)

    @pytest.mark.parametrize("safety", [DUAL, {"alignment_buffer": PAIR}], ids=["dual_select", "alignment_buffer"])
    def test_an_adapter_that_was_trained_before(self, tmp_path: Path, safety: dict[str, Any]) -> None:
        pool = {"reference_dataset": tiny.rows(16, seed=9)} if safety is DUAL else {}
        fresh = tiny.lora(init_lora_weights=True)
        plain = tiny.trainer(tmp_path / "plain", cls=SFTTrainer, args=tiny.arguments(tmp_path / "plain", SFTConfig), peft_config=fresh)
        plain.train()
        plain.save_model()

        def made(folder: Path, base: Any, peft_config: Any) -> Any:
            return tiny.trainer(
                folder, base=base, peft_config=peft_config, safety=safety, save_strategy="steps", save_steps=2, **pool
            )  # fmt: skip

        model = PeftModel.from_pretrained(tiny.model(), str(tmp_path / "plain"), is_trainable=True)
        made(tmp_path / "on", model, None).train()
        for name in ("checkpoint-2", "checkpoint-4"):
            with pytest.raises(ReportError, match="came with an update of norm"):
                verify(tmp_path / "on" / name)
        resumed = made(tmp_path / "on", tiny.model(), fresh)
        resumed.train(resume_from_checkpoint=str(tmp_path / "on" / "checkpoint-2"))
        resumed.save_model()
        with pytest.raises(ReportError, match="NOT protected"):
            verify(tmp_path / "on")
        made(tmp_path / "fresh", tiny.model(), fresh).train()
        assert verify(tmp_path / "fresh" / "checkpoint-4").methods[0].acted

    def test_a_state_beside_another_runs_adapter(self, tmp_path: Path) -> None:
        def made(cls: Any = None, **kwargs: Any) -> Any:
            options = {"save_strategy": "steps", "save_steps": 3, "max_steps": 3, **kwargs}
            if cls:
                return tiny.trainer(tmp_path, cls=cls, args=tiny.arguments(tmp_path, SFTConfig, **options))
            return tiny.trainer(tmp_path, safety=DUAL, reference_dataset=tiny.rows(16, seed=9), **options)

        made().train()
        made(SFTTrainer).train()
        resumed = made(max_steps=6)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
        resumed.save_model()
        with pytest.raises(ReportError, match="steps 1 to 3 were trained without it"):
            verify(tmp_path)

    def test_other_layers_another_subspace_another_pair(self, tmp_path: Path, gqa_subspace: AlignmentSubspace) -> None:
        saving = {"save_strategy": "steps", "save_steps": 2}

        def made(name: str, safety: dict[str, Any], subspace: AlignmentSubspace | None = gqa_subspace) -> Any:
            return tiny.trainer(tmp_path / name, safety=safety, subspace=subspace, **saving)

        def resumed(name: str, safety: dict[str, Any], subspace: AlignmentSubspace | None = gqa_subspace) -> Any:
            trainer = made(name, safety, subspace)
            trainer.train(resume_from_checkpoint=str(tmp_path / name / "checkpoint-2"))
            return trainer.safety_report

        other = AlignmentSubspace.from_pair(**PAIR, target_modules="all-linear", rank=1, progress=False)
        made("layers", {**ASFT, "skip_modules": ["q_proj"]}).train()
        assert not resumed("layers", ASFT).protected
        made("subspace", ASFT, other).train()
        assert not resumed("subspace", ASFT).protected
        near = tiny.model("gqa-aligned")
        with torch.no_grad():
            for parameter in near.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
        near.save_pretrained(tmp_path / "near")
        made("pair", {"subspace": {**PAIR, "base": str(tmp_path / "near"), "rank": 4}, "alignment_buffer": {}}, None).train()
        assert not resumed("pair", {"subspace": {**PAIR, "rank": 4}, "alignment_buffer": {}}, None).protected
        assert resumed("pair", {"subspace": {**PAIR, "base": str(tmp_path / "near"), "rank": 4}, "alignment_buffer": {}}, None).protected

    def test_a_callback_of_an_interrupted_run(self, tmp_path: Path, gqa_subspace: AlignmentSubspace) -> None:
        class Interrupt(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                raise KeyboardInterrupt

        callback = SafeLoRACallback(gqa_subspace, threshold=0.0)
        with pytest.raises(KeyboardInterrupt):
            tiny.trainer(tmp_path / "a", safety=ASFT, subspace=gqa_subspace, callbacks=[callback, Interrupt()]).train()
        plain = tiny.trainer(tmp_path / "b", cls=SFTTrainer, args=tiny.arguments(tmp_path / "b", SFTConfig), callbacks=[callback])
        plain.train()
        plain.save_model()
        assert [method.name for method in read_report(tmp_path / "b").methods] == ["safe_lora"]

    def test_a_scaling_that_was_changed_afterwards(self, tmp_path: Path, gqa_subspace: AlignmentSubspace) -> None:
        trainer = tiny.trainer(tmp_path, safety=ASFT, subspace=gqa_subspace)
        trainer.train()
        trainer.model.peft_config["default"].lora_alpha = 800
        trainer.save_model()
        with pytest.raises(ReportError, match="was changed afterwards"):
            verify(tmp_path)


class TestWeightsThatAreNoParameters:
    def test_packed_layers_are_refused(self, tmp_path: Path) -> None:
        """As GPTQ, AWQ and EETQ store them; only the embeddings would have been exchanged."""
        base = tiny.model("gqa-base")
        with torch.no_grad():
            base.get_input_embeddings().weight.add_(0.1)
        base.save_pretrained(tmp_path / "base")
        model = tiny.model()
        for name in ("o_proj", "down_proj"):
            layer = next(module for path, module in model.named_modules() if path.endswith(name))
            weight = layer._parameters.pop("weight").data
            layer.register_buffer("weight", weight)
        with pytest.raises(AdapterError, match="in a form that is not a parameter"):
            tiny.trainer(tmp_path, base=model, safety={"alignment_buffer": {**PAIR, "base": str(tmp_path / "base")}})
