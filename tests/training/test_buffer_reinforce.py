"""Buffer-and-Reinforce through the real trainers: what trains, what is saved, what is merged, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from tests import references, tiny
from tests.training import providers
from trl_safety import BufferTrainer, ReinforceTrainer, SafeLoRACallback, SafeSFTTrainer, apply_safe_lora, merge_reinforce
from trl_safety.adapters.folder import AdapterFolder
from trl_safety.adapters.frozen import FrozenAdapter
from trl_safety.adapters.lora import lora_modules
from trl_safety.adapters.marks import kind_of, marks
from trl_safety.adapters.record import RECORD, AdapterRecord
from trl_safety.corrections.buffer_reinforce import USER_ADAPTER
from trl_safety.errors import AdapterError, ConfigurationError, ReportError, SafetyError
from trl_safety.reports.report import read_report, verify


@pytest.fixture(scope="module")
def provider(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    return providers.make(tmp_path_factory.mktemp("provider"))


def block(provider: Path, **options: Any) -> dict[str, Any]:
    return {"buffer_reinforce": {"buffer": str(provider / "buffer"), "reinforce": str(provider / "reinforce"), **options}}


def buffer_only(provider: Path) -> dict[str, Any]:
    return {"buffer_reinforce": {"buffer": str(provider / "buffer")}}


def logits(model: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(torch.arange(3, 27).view(2, 12)).logits


def updates(folder: Path) -> dict[str, torch.Tensor]:
    return {name: factors.scaling * factors.B @ factors.A for name, factors in AdapterFolder.open(folder).factors.items()}


def dense(model: Any, folder: Path, scale: float = 1.0) -> Any:
    """The model with a saved adapter's update added to its weights, as in the authors' code."""
    for name, factors in AdapterFolder.open(folder).factors.items():
        model.get_submodule(name).weight.data += scale * factors.scaling * factors.B @ factors.A
    return model


class TestProvider:
    def test_both_are_ordinary_adapters_marked_as_what_they_are(self, provider: Path) -> None:
        for kind in ("buffer", "reinforce"):
            folder = AdapterFolder.open(provider / kind)
            record = AdapterRecord.read(provider / kind)
            assert kind_of(folder.config) == record.kind == kind
            assert record.samples.keys() == folder.factors.keys()
            assert "LoRA" in (provider / kind / "README.md").read_text()
            PeftModel.from_pretrained(tiny.model(), str(provider / kind))
        assert "makes the model harmful" in (provider / "buffer" / "README.md").read_text()

    def test_the_buffer_is_plain_sft(self, provider: Path, tmp_path: Path) -> None:
        from trl import SFTConfig, SFTTrainer

        args = tiny.arguments(tmp_path, SFTConfig, **providers.RECIPE)
        config = tiny.lora(r=6, lora_alpha=9, target_modules=["q_proj", "k_proj", "down_proj"])
        plain = tiny.trainer(tmp_path, cls=SFTTrainer, args=args, peft_config=config)
        plain.train()
        plain.save_model()
        assert tiny.identical(
            load_file(tmp_path / "adapter_model.safetensors"), load_file(provider / "buffer" / "adapter_model.safetensors")
        )
        assert kind_of(config) == "user"

    def test_reinforce_trains_beside_the_frozen_buffer(self, provider: Path, tmp_path: Path) -> None:
        from trl import SFTConfig, SFTTrainer

        args = tiny.arguments(tmp_path, SFTConfig, **providers.RECIPE)
        config = tiny.lora(r=3, lora_alpha=5, use_rslora=True, target_modules=["q_proj", "o_proj", "down_proj"])
        base = dense(tiny.model(), provider / "buffer")
        plain = tiny.trainer(tmp_path, cls=SFTTrainer, args=args, peft_config=config, base=base, data=tiny.rows(32, seed=5))
        plain.train()
        plain.save_model()
        trained, expected = (load_file(folder / "adapter_model.safetensors") for folder in (provider / "reinforce", tmp_path))
        assert tiny.largest_difference(trained, expected) < 1e-4

    def test_every_checkpoint_is_marked_and_resumes(self, provider: Path, tmp_path: Path) -> None:
        from trl import SFTConfig

        args = tiny.arguments(tmp_path, SFTConfig, save_strategy="steps", save_steps=2)
        trainer = tiny.trainer(tmp_path, cls=BufferTrainer, args=args)
        trainer.train()
        whole = tiny.factors(trainer.model)
        assert AdapterRecord.read(tmp_path / "checkpoint-2").kind == "buffer"
        again = tiny.trainer(tmp_path, cls=BufferTrainer, args=args)
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert tiny.identical(whole, tiny.factors(again.model))

    def test_a_buffer_is_never_pushed(self, tmp_path: Path) -> None:
        from trl import SFTConfig

        with pytest.raises(ConfigurationError, match="push_to_hub = True: a BufferLoRA makes the model harmful"):
            tiny.trainer(tmp_path, cls=BufferTrainer, args=tiny.arguments(tmp_path, SFTConfig, push_to_hub=True, hub_token="none"))
        trainer = tiny.trainer(tmp_path, cls=BufferTrainer, args=tiny.arguments(tmp_path, SFTConfig))
        with pytest.raises(ConfigurationError, match="so it is never uploaded"):
            trainer.push_to_hub()

    @pytest.mark.parametrize("kind", ["buffer", "reinforce"])
    def test_refused_wherever_a_users_adapter_is_meant(self, provider: Path, tmp_path: Path, gqa_subspace: Any, kind: str) -> None:
        from trl_safety.config.safe_lora import SafeLoraConfig
        from trl_safety.corrections.folder import correct_folder
        from trl_safety.corrections.safe_lora import SafeLoraCorrection

        what = {"buffer": "BufferLoRA", "reinforce": "ReinforceLoRA"}[kind]
        # The mark stays where the record is lost.
        shutil.copytree(provider / kind, tmp_path / "copy")
        (tmp_path / "copy" / RECORD).unlink()
        model = PeftModel.from_pretrained(tiny.model(), str(tmp_path / "copy"), is_trainable=True)
        with pytest.raises(AdapterError, match=what):
            tiny.trainer(tmp_path, base=model, peft_config=None, safety={"asft": {}}, subspace=gqa_subspace)
        with pytest.raises(AdapterError, match=what):
            apply_safe_lora(model, gqa_subspace)
        with pytest.raises(AdapterError, match=what):
            correct_folder(tmp_path / "copy", tmp_path / "out", gqa_subspace, SafeLoraCorrection(SafeLoraConfig()))
        with pytest.raises(AdapterError, match=what):
            merge_reinforce(tmp_path / "copy", provider / "reinforce", tmp_path / "out")
        with pytest.raises(ReportError, match=what):
            verify(tmp_path / "copy")
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("config", "message"),
        [({"modules_to_save": ["lm_head"]}, "lm_head"), ({"lora_bias": True}, "lora_B"), ({"bias": "all"}, "besides LoRA factors")],
    )
    def test_more_than_factors_is_refused(self, tmp_path: Path, config: dict[str, Any], message: str) -> None:
        from trl import SFTConfig

        if config.get("bias"):
            pytest.skip("the tiny Llama has no bias to train")
        with pytest.raises(AdapterError, match=message):
            tiny.trainer(tmp_path, cls=BufferTrainer, args=tiny.arguments(tmp_path, SFTConfig), peft_config=tiny.lora(**config))

    def test_reinforce_needs_a_buffer(self, provider: Path, tmp_path: Path) -> None:
        from trl import SFTConfig

        for source, message in ((tmp_path / "none", "neither a folder"), (provider / "reinforce", "is a reinforce adapter")):
            with pytest.raises(AdapterError, match=message):
                tiny.trainer(
                    tmp_path,
                    cls=lambda source=source, **kwargs: ReinforceTrainer(**kwargs, buffer=source),
                    args=tiny.arguments(tmp_path, SFTConfig),
                )


class TestUserTraining:
    def test_trains_as_on_a_model_with_the_buffer_merged_in(self, provider: Path, tmp_path: Path) -> None:
        trainer = tiny.trainer(tmp_path, safety=buffer_only(provider), **tiny.WELL_CONDITIONED)
        trainer.train()
        plain = tiny.trainer(tmp_path, base=dense(tiny.model(), provider / "buffer"), **tiny.WELL_CONDITIONED)
        plain.train()
        assert tiny.largest_difference(tiny.factors(trainer.model), tiny.factors(plain.model)) < 1e-4
        # Negative control: without the buffer the same run ends elsewhere.
        alone = tiny.trainer(tmp_path, **tiny.WELL_CONDITIONED)
        alone.train()
        assert tiny.largest_difference(tiny.factors(trainer.model), tiny.factors(alone.model)) > 0.05

    def test_the_buffer_is_unchanged_and_in_no_file(self, provider: Path, tmp_path: Path) -> None:
        before = {path.name: path.read_bytes() for path in (provider / "buffer").iterdir()}
        trainer = tiny.trainer(tmp_path, safety=block(provider), save_strategy="steps", save_steps=2)
        frozen = trainer._safety.methods[0].frozen
        held = {name: (B.clone(), A.clone()) for name, (B, A) in frozen._factors.items()}
        trainer.train()
        trainer.save_model()
        for name, (B, A) in frozen._factors.items():
            assert torch.equal(B, held[name][0])
            assert torch.equal(A, held[name][1])
        assert before == {path.name: path.read_bytes() for path in (provider / "buffer").iterdir()}
        entries = {tuple(tensor.flatten()[:8].tolist()) for pair in held.values() for tensor in pair}
        folders = [path.parent for path in tmp_path.rglob("adapter_model.safetensors")]
        assert len(folders) == 4  # two checkpoints, the user's adapter alone, the merged one
        for folder in folders:
            for tensor in load_file(folder / "adapter_model.safetensors").values():
                assert tuple(tensor.flatten()[:8].tolist()) not in entries
            assert kind_of(AdapterFolder.open(folder).config) == "user"
        assert not list(tmp_path.rglob("buffer*"))

    @pytest.mark.parametrize("how", ["exception", "interrupt", "stop"])
    def test_detached_however_training_ends(self, provider: Path, tmp_path: Path, how: str) -> None:
        class Ends(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if how == "stop":
                    control.should_training_stop = True
                    return
                raise RuntimeError("ends") if how == "exception" else KeyboardInterrupt

        trainer = tiny.trainer(tmp_path, safety=block(provider), callbacks=[Ends()])
        hooks = {name: len(module._forward_hooks) for name, module in trainer.model.named_modules()}
        if how == "stop":
            trainer.train()
            assert verify_after(trainer, tmp_path).protected
        else:
            with pytest.raises((RuntimeError, KeyboardInterrupt)):
                trainer.train()
            report = verify_after(trainer, tmp_path)
            assert not report.protected
            assert "still to come" in report.methods[-1].summary
        assert all(len(module._forward_hooks) == hooks.get(name, 0) for name, module in trainer.model.named_modules())

    def test_an_exception_in_the_forward_pass_detaches_it_too(self, provider: Path, tmp_path: Path) -> None:
        trainer = tiny.trainer(tmp_path, safety=buffer_only(provider))
        layer = trainer.model.base_model.model.model.layers[-1]
        layer.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("ends")))
        with pytest.raises(RuntimeError, match="ends"):
            trainer.train()
        assert not any(m._forward_hooks for m in trainer.model.modules() if type(m).__module__.startswith("peft"))

    def test_evaluation_while_training_is_without_the_buffer(self, provider: Path, tmp_path: Path) -> None:
        seen: list[tuple[float, float]] = []

        class Evaluates(TrainerCallback):
            def on_evaluate(self, args: Any, state: Any, control: Any, *, model: Any, metrics: dict[str, float], **kwargs: Any) -> None:
                copy = PeftModel.from_pretrained(tiny.model(), str(tmp_path / f"checkpoint-{state.global_step}"))
                with torch.no_grad():
                    expected = tiny.trainer(tmp_path / "x", base=copy, peft_config=None, eval_dataset=tiny.rows(8, seed=2)).evaluate()
                seen.append((metrics["eval_loss"], expected["eval_loss"]))

        class Saves(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any) -> None:
                model.save_pretrained(str(tmp_path / f"checkpoint-{state.global_step}"))

        trainer = tiny.trainer(
            tmp_path,
            safety=buffer_only(provider),
            eval_dataset=tiny.rows(8, seed=2),
            eval_strategy="steps",
            eval_steps=2,
            callbacks=[Saves(), Evaluates()],
        )
        trainer.train()
        assert len(seen) == 2
        for found, expected in seen:
            assert found == pytest.approx(expected, rel=1e-5)
        last = seen[-1][0]
        with trainer._safety.methods[0].frozen.attached():
            assert trainer.evaluate()["eval_loss"] != pytest.approx(last, rel=1e-3)

    @pytest.mark.parametrize("checkpointing", [{"use_reentrant": False}, {"use_reentrant": True}])
    def test_gradient_checkpointing_changes_nothing(self, provider: Path, tmp_path: Path, checkpointing: dict[str, bool]) -> None:
        plain = tiny.trainer(tmp_path, safety=buffer_only(provider))
        plain.train()
        other = tiny.trainer(
            tmp_path, safety=buffer_only(provider), gradient_checkpointing=True, gradient_checkpointing_kwargs=checkpointing
        )
        other.train()
        assert tiny.largest_difference(tiny.factors(plain.model), tiny.factors(other.model)) < 1e-5

    def test_accumulation_and_resuming_change_nothing(self, provider: Path, tmp_path: Path) -> None:
        whole = tiny.trainer(tmp_path / "a", safety=block(provider), save_strategy="steps", save_steps=2)
        whole.train()
        merged = tiny.factors(whole.model)
        report = read_report(tmp_path / "a" / "checkpoint-2")
        assert not report.protected
        assert report.stage == "training"
        again = tiny.trainer(tmp_path / "a", safety=block(provider), save_strategy="steps", save_steps=2)
        again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
        assert tiny.identical(merged, tiny.factors(again.model))
        assert "optimizer steps 1 to 4" in again.safety_report.methods[-1].summary
        small = tiny.trainer(
            tmp_path / "b",
            safety=block(provider),
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            train_sampling_strategy="sequential",
        )
        small.train()
        large = tiny.trainer(tmp_path / "c", safety=block(provider), train_sampling_strategy="sequential")
        large.train()
        assert tiny.largest_difference(tiny.factors(small.model), tiny.factors(large.model)) < 1e-4

    def test_a_checkpoint_trained_without_it_is_reported(self, provider: Path, tmp_path: Path) -> None:
        tiny.trainer(tmp_path, save_strategy="steps", save_steps=2).train()
        trainer = tiny.trainer(tmp_path, safety=buffer_only(provider))
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        report = trainer.safety_report
        assert not report.protected
        assert "steps 1 to 2 were trained without it" in report.methods[0].summary

    def test_bfloat16_and_autocast(self, provider: Path, tmp_path: Path) -> None:
        trainer = tiny.trainer(tmp_path, base=tiny.model(dtype=torch.bfloat16), safety=block(provider), bf16=True)
        trainer.train()
        trainer.save_model()
        assert verify(tmp_path).protected

    def test_qlora_all_the_way(self, tmp_path: Path) -> None:
        """Both of the provider's adapters and the user's on 4-bit layers; bitsandbytes' CPU kernels need dimensions of 64."""
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM
        from trl import SFTConfig

        config = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
        LlamaForCausalLM(config).save_pretrained(tmp_path / "aligned")
        LlamaForCausalLM(config).save_pretrained(tmp_path / "other")
        options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)

        def load(name: str = "aligned") -> Any:
            return AutoModelForCausalLM.from_pretrained(tmp_path / name, quantization_config=options, device_map={"": "cpu"})

        for kind, cls in (("buffer", BufferTrainer), ("reinforce", lambda **kw: ReinforceTrainer(**kw, buffer=tmp_path / "buffer"))):
            trainer = tiny.trainer(tmp_path / kind, cls=cls, args=tiny.arguments(tmp_path / kind, SFTConfig, max_steps=2), base=load())
            trainer.train()
            trainer.save_model()
            assert AdapterRecord.read(tmp_path / kind).quantised
        trainer = tiny.trainer(tmp_path / "user", base=load(), safety=block(tmp_path), max_steps=2)
        trainer.train()
        trainer.save_model()
        assert "up to quantisation" in verify(tmp_path / "user").base_check
        # A plain adapter whose base model is a folder of 4-bit weights has no record to compare: its folder's weights are.
        for name, fits in (("aligned", True), ("other", False)):
            load(name).save_pretrained(tmp_path / f"stored-{name}")
            stored = AutoModelForCausalLM.from_pretrained(tmp_path / f"stored-{name}", device_map={"": "cpu"})
            get_peft_model(stored, tiny.lora()).save_pretrained(tmp_path / f"plain-{name}")
            if fits:
                report = merge_reinforce(tmp_path / f"plain-{name}", tmp_path / "reinforce", tmp_path / "merged")
                assert "up to quantisation" in report.base_check
            else:
                with pytest.raises(AdapterError, match="use the adapter that was made for this model"):
                    merge_reinforce(tmp_path / f"plain-{name}", tmp_path / "reinforce", tmp_path / "refused")
        # Also in full precision: the adapters are for the model, not for its quantised version.
        tiny.trainer(tmp_path / "full", base=AutoModelForCausalLM.from_pretrained(tmp_path / "aligned"), safety=block(tmp_path))
        with pytest.raises(AdapterError, match="use the adapter that was made for this model"):
            tiny.trainer(tmp_path / "no", base=load("other"), safety=block(tmp_path))

    def test_a_layer_that_goes_by_the_buffer_is_an_error(self, provider: Path, tmp_path: Path) -> None:
        trainer = tiny.trainer(tmp_path, safety=buffer_only(provider))
        attention = trainer.model.base_model.model.model.layers[1].self_attn
        # What Axolotl's fused kernels do: compute with the weights, without calling the module.
        attention.k_proj.forward, wrapped = attention.k_proj.forward, attention.k_proj
        attention._modules["k_proj"] = torch.nn.Identity()
        attention.k_proj.forward = lambda x: torch.nn.functional.linear(x, wrapped.weight)
        with pytest.raises(AdapterError, match=r"did not act in 1 of 9 layers, 'model.layers.1.self_attn.k_proj' first: a fused kernel"):
            trainer.train()


def verify_after(trainer: Any, folder: Path) -> Any:
    trainer.save_model()
    return read_report(folder)


class TestMerge:
    def test_what_is_in_memory_and_on_disk_is_the_dense_merge(self, provider: Path, tmp_path: Path) -> None:
        trainer = tiny.trainer(tmp_path, safety=block(provider, alpha=0.3, user_weight=0.8, reinforce_weight=0.4))
        trainer.train()
        trainer.save_model()
        user = AdapterFolder.open(tmp_path / USER_ADAPTER)
        reinforce = AdapterFolder.open(provider / "reinforce")
        expected = tiny.model()
        for name in {**user.factors, **reinforce.factors}:
            one, other = user.factors.get(name), reinforce.factors.get(name)
            if one and other:
                change = references.reinforced_merge(
                    (one.B, one.A, one.scaling), (other.B, other.A, other.scaling), 0.3, weights=(0.8, 0.4)
                )
            else:
                only, weight = (one, 0.8) if one else (other, 0.4)
                change = weight * only.scaling * only.B.double() @ only.A.double()
            expected.get_submodule(name).weight.data += change.float()
        assert len(user.factors) == len(reinforce.factors) == 9
        assert len(lora_modules(trainer.model)) == 12
        loaded = PeftModel.from_pretrained(tiny.model(), str(tmp_path))
        for model in (trainer.model, loaded, loaded.merge_and_unload()):
            torch.testing.assert_close(logits(model), logits(expected), rtol=1e-4, atol=1e-4)
        assert (logits(expected) - logits(tiny.model())).abs().max() > 0.1
        report = verify(tmp_path)
        assert [method.name for method in report.methods] == ["buffer_reinforce"]
        assert len(report.methods[0].layers) == 12
        assert "trained beside the frozen buffer in optimizer steps 1 to 4" in report.methods[0].summary
        assert "merged with the ReinforceLoRA in 12 layers" in report.methods[0].summary
        ranks = {name: factors.A.shape[0] for name, factors in AdapterFolder.open(tmp_path).factors.items()}
        assert sorted(set(ranks.values())) == [3, 4, 7]

    def test_the_command_gives_the_trainers_adapter(self, provider: Path, tmp_path: Path) -> None:
        from typer.testing import CliRunner

        from trl_safety.cli.app import app

        trainer = tiny.trainer(tmp_path, safety=block(provider, alpha=0.3))
        trainer.train()
        trainer.save_model()
        user = str(tmp_path / USER_ADAPTER)
        result = CliRunner().invoke(
            app, ["merge-reinforce", user, str(provider / "reinforce"), "-o", str(tmp_path / "merged"), "--alpha", "0.3"]
        )
        assert result.exit_code == 0, result.output
        one, other = (updates(folder) for folder in (tmp_path, tmp_path / "merged"))
        assert tiny.largest_difference(one, other) < 1e-6
        assert "trained beside the frozen buffer in optimizer steps 1 to 4; the buffer was then detached; merged" in result.output
        verify(tmp_path / "merged")
        result = CliRunner().invoke(
            app, ["merge-reinforce", str(tmp_path / "merged"), str(provider / "reinforce"), "-o", str(tmp_path / "m2")]
        )
        assert result.exit_code == 1
        assert "was already merged with a ReinforceLoRA" in result.output

    def test_cut_back_to_a_rank(self, provider: Path, tmp_path: Path) -> None:
        trainer = tiny.trainer(tmp_path, safety=block(provider, rank=4))
        trainer.train()
        trainer.save_model()
        assert max(factors.A.shape[0] for factors in AdapterFolder.open(tmp_path).factors.values()) == 4
        report = verify(tmp_path)
        assert "the cut to rank 4 lost" in report.methods[0].summary
        measured = [layer.measured for layer in report.methods[0].layers.values()]
        assert any(row["lost_norm"] > 0 for row in measured)
        with pytest.raises(ConfigurationError, match="rank = 7: the merged adapter has rank 7"):
            tiny.trainer(tmp_path, safety=block(provider, rank=7))

    def test_without_reinforce_the_users_adapter_stays_whole(self, provider: Path, tmp_path: Path) -> None:
        trainer = tiny.trainer(tmp_path, safety=buffer_only(provider))
        trainer.train()
        trainer.save_model()
        folder = AdapterFolder.open(tmp_path)
        assert not marks(folder.config)
        assert {factors.A.shape[0] for factors in folder.factors.values()} == {4}
        assert not (tmp_path / USER_ADAPTER).exists()
        assert verify(tmp_path).methods[0].acted

    def test_after_load_best_model_at_end(self, provider: Path, tmp_path: Path) -> None:
        trainer = tiny.trainer(
            tmp_path,
            safety=block(provider),
            eval_dataset=tiny.rows(8, seed=2),
            eval_strategy="steps",
            save_strategy="steps",
            eval_steps=2,
            save_steps=2,
            load_best_model_at_end=True,
        )
        trainer.train()
        best = Path(trainer.state.best_model_checkpoint)
        merge_reinforce(best, provider / "reinforce", tmp_path / "again")
        trainer.save_model(str(tmp_path / "final"))
        one, other = (updates(tmp_path / name) for name in ("final", "again"))
        assert tiny.largest_difference(one, other) < 1e-6

    def test_training_on_after_the_merge_is_refused(self, provider: Path, tmp_path: Path) -> None:
        trainer = tiny.trainer(tmp_path, safety=block(provider))
        trainer.train()
        with pytest.raises(AdapterError, match="already corrected by buffer_reinforce"):
            trainer.train()


class TestTogether:
    def test_with_asft_and_safe_lora_in_their_order(self, provider: Path, tmp_path: Path, gqa_subspace: Any) -> None:
        safety = {"asft": {"weight": 0.1}, "safe_lora": {"layers": 2}, **block(provider)}
        trainer = tiny.trainer(tmp_path, safety=safety, subspace=gqa_subspace)
        trainer.train()
        trainer.save_model()
        report = verify(tmp_path)
        assert [method.name for method in report.methods] == ["asft", "safe_lora", "buffer_reinforce"]
        assert all(method.acted for method in report.methods)
        # The merge takes the corrected adapter, which is what is kept beside it.
        assert marks(AdapterFolder.open(tmp_path / USER_ADAPTER).config) == ["safe_lora"]
        merge_reinforce(tmp_path / USER_ADAPTER, provider / "reinforce", tmp_path / "again")
        one, other = (updates(folder) for folder in (tmp_path, tmp_path / "again"))
        assert tiny.largest_difference(one, other) < 1e-6
        assert sorted(marks(AdapterFolder.open(tmp_path / "again").config)) == ["buffer_reinforce", "safe_lora"]
        assert sorted(marks(AdapterFolder.open(tmp_path).config)) == ["buffer_reinforce", "safe_lora"]

    def test_with_csulora_whose_rank_doubles(self, provider: Path, tmp_path: Path, gqa_subspace: Any) -> None:
        trainer = tiny.trainer(tmp_path, safety={"csulora": {}, **block(provider)}, subspace=gqa_subspace)
        trainer.train()
        trainer.save_model()
        assert [method.name for method in verify(tmp_path).methods] == ["csulora", "buffer_reinforce"]
        assert max(factors.A.shape[0] for factors in AdapterFolder.open(tmp_path).factors.values()) == 11
        loaded = PeftModel.from_pretrained(tiny.model(), str(tmp_path))
        torch.testing.assert_close(logits(loaded), logits(trainer.model), rtol=1e-4, atol=1e-5)

    def test_a_correction_callback_added_late_still_comes_first(self, provider: Path, tmp_path: Path, gqa_subspace: Any) -> None:
        trainer = tiny.trainer(tmp_path, safety=block(provider))
        trainer.add_callback(SafeLoRACallback(gqa_subspace, layers=2))
        trainer.train()
        trainer.save_model()
        assert [method.name for method in verify(tmp_path).methods] == ["safe_lora", "buffer_reinforce"]

    def test_with_dual_select(self, provider: Path, tmp_path: Path) -> None:
        options = {"dual_select": {"warmup_steps": 1, "references": 4, "keep": 4}, **block(provider)}
        trainer = tiny.trainer(tmp_path, safety=options, reference_dataset=tiny.rows(12, seed=8))
        trainer.train()
        trainer.save_model()
        assert [method.name for method in verify(tmp_path).methods] == ["dual_select", "buffer_reinforce"]
        # Samples are chosen by gradients of the model that is trained, with the buffer.
        merged = tiny.trainer(
            tmp_path / "b",
            base=dense(tiny.model(), provider / "buffer"),
            safety={"dual_select": options["dual_select"]},
            reference_dataset=tiny.rows(12, seed=8),
        )
        merged.train()
        one, other = (
            [json.loads(line)["indices"] for line in (folder / "selection.jsonl").open()] for folder in (tmp_path, tmp_path / "b")
        )
        assert one == other

    def test_prompts_alone_are_refused_beside_a_buffer(self, provider: Path, tmp_path: Path) -> None:
        prompts = tiny.rows(12, seed=8).remove_columns("completion")
        with pytest.raises(ConfigurationError, match="prompts without an answer"):
            tiny.trainer(
                tmp_path,
                safety={"dual_select": {"warmup_steps": 1, "references": 4}, **buffer_only(provider)},
                reference_dataset=prompts,
            )


class TestRefused:
    """None of these would act, or act on the right model."""

    @pytest.mark.parametrize(
        ("options", "kwargs", "error", "message"),
        [
            ({"buffer": "missing"}, {}, AdapterError, "neither a folder nor a Hub repository"),
            ({"buffer": "REINFORCE"}, {}, AdapterError, "is a reinforce adapter"),
            ({"buffer": "BUFFER", "reinforce": "BUFFER"}, {}, AdapterError, "is a buffer adapter"),
            ({"buffer": "BUFFER", "alpha": 0.2}, {}, ConfigurationError, "alpha = 0.2 is used only in the merge"),
            ({"buffer": "BUFFER", "reinforce": "REINFORCE", "alpha": 1.5}, {}, ConfigurationError, "alpha = 1.5"),
            ({"reinforce": "REINFORCE"}, {}, ConfigurationError, "buffer"),
            ({"buffer": "BUFFER"}, {"torch_compile": True}, ConfigurationError, "torch_compile = True"),
            (
                {"buffer": "BUFFER", "reinforce": "REINFORCE"},
                {"peft_config": tiny.lora(modules_to_save=["lm_head"])},
                AdapterError,
                "modules_to_save",
            ),
            ({"buffer": "BUFFER", "reinforce": "REINFORCE"}, {"peft_config": tiny.lora(lora_bias=True)}, AdapterError, "lora_bias = True"),
        ],
    )
    def test_at_the_start(
        self, provider: Path, tmp_path: Path, options: dict[str, Any], kwargs: dict[str, Any], error: type[Exception], message: str
    ) -> None:
        names = {"BUFFER": str(provider / "buffer"), "REINFORCE": str(provider / "reinforce")}
        options = {key: names.get(value, value) if isinstance(value, str) else value for key, value in options.items()}
        with pytest.raises(error, match=message):
            tiny.trainer(tmp_path, safety={"buffer_reinforce": options}, **kwargs)

    def test_another_base_model(self, provider: Path, tmp_path: Path) -> None:
        for name in ("gqa-base", "mha-aligned"):
            with pytest.raises(AdapterError, match=r"use the adapter that was made for this model|made for another one"):
                tiny.trainer(tmp_path, base=tiny.model(name), safety=buffer_only(provider))
        plain = tiny.trainer(tmp_path / "user", base=tiny.model("gqa-base"))
        plain.train()
        plain.save_model()
        with pytest.raises(AdapterError, match="use the adapter that was made for this model"):
            merge_reinforce(tmp_path / "user", provider / "reinforce", tmp_path / "out")

    def test_a_plain_users_adapter_can_be_merged(self, provider: Path, tmp_path: Path) -> None:
        plain = tiny.trainer(tmp_path / "user")
        plain.train()
        plain.save_model()
        report = merge_reinforce(tmp_path / "user", provider / "reinforce", tmp_path / "out")
        assert "has no report on a buffer" in report.methods[0].summary
        assert "match those of" in report.base_check

    @pytest.mark.parametrize("damage", ["record", "mark", "layer", "json", "weights"])
    def test_damaged_files(self, provider: Path, tmp_path: Path, damage: str) -> None:
        folder = tmp_path / "buffer"
        shutil.copytree(provider / "buffer", folder)
        if damage == "record":
            (folder / RECORD).unlink()
        elif damage == "json":
            (folder / RECORD).write_text("{")
        elif damage == "mark":
            config = json.loads((folder / "adapter_config.json").read_text())
            (folder / "adapter_config.json").write_text(json.dumps({**config, "alpha_pattern": {}}))
        elif damage == "layer":
            facts = json.loads((folder / RECORD).read_text())
            facts["samples"].popitem()
            (folder / RECORD).write_text(json.dumps(facts))
        else:
            (folder / "adapter_model.safetensors").write_bytes((folder / "adapter_model.safetensors").read_bytes()[:500])
        with pytest.raises(SafetyError, match=r"safety_adapter.json|is a buffer adapter|its record does not know|truncated"):
            tiny.trainer(tmp_path / "out", safety={"buffer_reinforce": {"buffer": str(folder)}})

    def test_a_layer_that_the_model_lacks(self, provider: Path, tmp_path: Path) -> None:
        folder = tmp_path / "buffer"
        shutil.copytree(provider / "buffer", folder)
        tensors = load_file(folder / "adapter_model.safetensors")
        renamed = {name.replace("layers.2.", "layers.7."): tensor for name, tensor in tensors.items()}
        save_file(renamed, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        facts = json.loads((folder / RECORD).read_text())
        facts["samples"] = {name.replace("layers.2.", "layers.7."): value for name, value in facts["samples"].items()}
        (folder / RECORD).write_text(json.dumps(facts))
        with pytest.raises(AdapterError, match="is not in the model: it was made for another one"):
            tiny.trainer(tmp_path, safety={"buffer_reinforce": {"buffer": str(folder)}})


def test_no_block_no_difference(provider: Path, tmp_path: Path) -> None:
    model = tiny.model()
    before = logits(model)
    frozen = FrozenAdapter(model, AdapterFolder.open(provider / "buffer").factors, "buffer")
    with frozen.attached():
        assert not torch.equal(logits(model), before)
        torch.testing.assert_close(logits(model), logits(dense(tiny.model(), provider / "buffer")), rtol=1e-4, atol=1e-5)
    assert torch.equal(logits(model), before)
    assert SafeSFTTrainer is not BufferTrainer
