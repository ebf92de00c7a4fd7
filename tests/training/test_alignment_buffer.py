"""The data-free buffer: the weights during training, in evaluations, and afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, TrainerCallback

from tests import tiny
from trl_safety import AlignmentSubspace
from trl_safety.errors import AdapterError, CheckpointError, ConfigurationError, SubspaceError
from trl_safety.reports.report import read_report, verify

DATA = tiny.DATA
PAIR = {"base": str(DATA / "gqa-base"), "aligned": str(DATA / "gqa-aligned")}


def block(**options: Any) -> dict[str, Any]:
    return {"alignment_buffer": {**PAIR, **options}}


def frozen(model: Any) -> dict[str, torch.Tensor]:
    """The frozen weights, as they are now."""
    return {name: value.detach().clone() for name, value in model.named_parameters() if "lora_" not in name}


def taken_out(gamma: float) -> Any:
    """The aligned model with γ·V subtracted from every weight, dense."""
    aligned, base = tiny.model("gqa-aligned"), tiny.model("gqa-base").state_dict()
    for name, value in aligned.state_dict().items():
        value.copy_((value.double() - gamma * (value.double() - base[name].double())).to(value.dtype))
    return aligned


@pytest.mark.parametrize("gamma", [0.5, 1.0, 1.3])
def test_trains_on_the_model_without_v_and_gives_the_aligned_one_back(tmp_path: Path, gamma: float) -> None:
    trainer = tiny.trainer(tmp_path, safety=block(gamma=gamma), **tiny.WELL_CONDITIONED)
    before = frozen(trainer.model)
    trainer.train()
    assert tiny.identical(before, frozen(trainer.model))
    expected = tiny.trainer(tmp_path / "b", base=taken_out(gamma), **tiny.WELL_CONDITIONED)
    expected.train()
    assert tiny.largest_difference(tiny.factors(trainer.model), tiny.factors(expected.model)) < 2e-5
    plain = tiny.trainer(tmp_path / "c", **tiny.WELL_CONDITIONED)
    plain.train()
    assert tiny.largest_difference(tiny.factors(trainer.model), tiny.factors(plain.model)) > 1e-2
    trainer.save_model()
    report = verify(tmp_path)
    assert f"W_aligned − {gamma:g}·V" in report.methods[0].summary
    assert report.base_model is not None
    assert report.base_model.endswith("gqa-aligned")


def test_gamma_zero_is_plain_fine_tuning(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, safety=block(gamma=0.0))
    trainer.train()
    plain = tiny.trainer(tmp_path / "b")
    plain.train()
    assert tiny.identical(tiny.factors(trainer.model), tiny.factors(plain.model))
    assert not trainer.safety_report.protected


def test_low_rank_takes_the_subspaces_part_out(tmp_path: Path) -> None:
    full = AlignmentSubspace.from_pair(DATA / "gqa-base", DATA / "gqa-aligned", target_modules="all-linear", tolerance=1e-9, progress=False)
    trainer = tiny.trainer(tmp_path, safety={"alignment_buffer": {"how": "low_rank", "gamma": 0.7}}, subspace=full, **tiny.WELL_CONDITIONED)
    trainer.train()
    # Only the linear layers: a low-rank adapter does not cover embeddings and norms.
    reference, base = tiny.model("gqa-aligned"), tiny.model("gqa-base")
    for name in full.layers:
        weight, other = (model.get_submodule(name).weight.data for model in (reference, base))
        weight -= 0.7 * (weight - other)
    expected = tiny.trainer(tmp_path / "b", base=reference, **tiny.WELL_CONDITIONED)
    expected.train()
    assert tiny.largest_difference(tiny.factors(trainer.model), tiny.factors(expected.model)) < 2e-5
    assert not any(module._forward_hooks for module in trainer.model.modules())


def test_evaluation_is_on_the_aligned_model(tmp_path: Path) -> None:
    aligned = frozen(tiny.model())
    seen: list[bool] = []

    class Evaluates(TrainerCallback):
        def on_prediction_step(self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any) -> None:
            seen.append(
                tiny.identical(
                    aligned, {k.removeprefix("base_model.model.").replace(".base_layer", ""): v for k, v in frozen(model).items()}
                )
            )

    class Steps(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any) -> None:
            weight = model.base_model.model.model.embed_tokens.weight
            assert torch.equal(weight, tiny.model("gqa-base").model.embed_tokens.weight)

    trainer = tiny.trainer(
        tmp_path, safety=block(), eval_dataset=tiny.rows(8, seed=2), eval_strategy="steps", eval_steps=2, callbacks=[Evaluates(), Steps()]
    )
    trainer.train()
    trainer.predict(trainer.eval_dataset)
    assert seen
    assert all(seen)


@pytest.mark.parametrize("how", ["exception", "interrupt", "stop"])
def test_the_aligned_weights_are_back_however_training_ends(tmp_path: Path, how: str) -> None:
    class Ends(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if how != "stop":
                raise RuntimeError("ends") if how == "exception" else KeyboardInterrupt
            control.should_training_stop = True

    trainer = tiny.trainer(tmp_path, safety=block(), callbacks=[Ends()])
    before = frozen(trainer.model)
    if how == "stop":
        trainer.train()
    else:
        with pytest.raises((RuntimeError, KeyboardInterrupt)):
            trainer.train()
    assert tiny.identical(before, frozen(trainer.model))
    trainer.save_model()
    assert read_report(tmp_path).methods[0].steps == (1, 1) or how != "stop"


def test_with_asft_a_correction_and_dual_select(tmp_path: Path, gqa_subspace: AlignmentSubspace) -> None:
    safety = {
        "alignment_buffer": {"gamma": 1.0},
        "asft": {"weight": 0.1},
        "safe_lora": {"layers": 3},
        "dual_select": {"warmup_steps": 1, "references": 4},
    }
    trainer = tiny.trainer(tmp_path, safety=safety, subspace=gqa_subspace, reference_dataset=tiny.rows(12, seed=8))
    trainer.train()
    trainer.save_model()
    report = verify(tmp_path)
    assert [method.name for method in report.methods] == ["alignment_buffer", "dual_select", "asft", "safe_lora"]
    assert all(method.acted for method in report.methods)


def test_resuming_changes_nothing(tmp_path: Path) -> None:
    whole = tiny.trainer(tmp_path, safety=block(), save_strategy="steps", save_steps=2)
    whole.train()
    again = tiny.trainer(tmp_path, safety=block(), save_strategy="steps", save_steps=2)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert tiny.identical(tiny.factors(whole.model), tiny.factors(again.model))
    assert again.safety_report.methods[0].steps == (1, 4)


def test_qlora_quantises_the_base_and_gives_the_same_bits_back(tmp_path: Path) -> None:
    torch.manual_seed(1)
    for name in ("base", "aligned"):
        config = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
        LlamaForCausalLM(config).save_pretrained(tmp_path / name)
    options = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32
    )

    def load(name: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(tmp_path / name, quantization_config=options, device_map={"": "cpu"})

    seen: dict[str, bool] = {}

    class Compares(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any) -> None:
            base = load("base")
            for name, value in frozen(base).items():
                found = model.base_model.model.get_submodule(name.rpartition(".")[0])
                found = getattr(found, "base_layer", found).weight
                seen[name] = torch.equal(found.data.to(value.dtype), value)

    safety = {"alignment_buffer": {"base": str(tmp_path / "base"), "aligned": str(tmp_path / "aligned")}}
    trainer = tiny.trainer(tmp_path / "out", base=load("aligned"), safety=safety, callbacks=[Compares()])
    before = frozen(trainer.model)
    trainer.train()
    assert seen
    assert all(seen.values()), [name for name, same in seen.items() if not same]
    assert tiny.identical(before, frozen(trainer.model))


def test_vocabularies_that_differ(tmp_path: Path) -> None:
    for name, size in (("base", 60), ("aligned", 64)):
        model = tiny.model(f"gqa-{name}")
        model.resize_token_embeddings(size)
        model.save_pretrained(tmp_path / name)
    safety = {"alignment_buffer": {"base": str(tmp_path / "base"), "aligned": str(tmp_path / "aligned")}}
    aligned = AutoModelForCausalLM.from_pretrained(tmp_path / "aligned")
    trainer = tiny.trainer(tmp_path / "out", base=aligned, safety=safety)
    before = frozen(trainer.model)
    trainer.train()
    assert tiny.identical(before, frozen(trainer.model))


@pytest.mark.parametrize(
    ("safety", "kwargs", "error", "message"),
    [
        ({"alignment_buffer": {}}, {}, ConfigurationError, "alignment_buffer.base is missing"),
        ({"alignment_buffer": {"base": "missing"}}, {}, CheckpointError, "missing"),
        ({"alignment_buffer": {**PAIR, "base": PAIR["aligned"]}}, {}, AdapterError, "do not differ"),
        ({"alignment_buffer": {**PAIR, "base": str(DATA / "mha-base")}}, {}, CheckpointError, "name this model's pair"),
        ({"alignment_buffer": {"base": PAIR["aligned"], "aligned": PAIR["base"]}}, {}, AdapterError, "load the aligned model of the pair"),
        ({"alignment_buffer": {"how": "low_rank"}}, {}, ConfigurationError, "subspace is missing"),
        ({"alignment_buffer": {"how": "low_rank", "base": "x"}}, {}, ConfigurationError, "base = 'x' is not used with how: low_rank"),
        ({**block(), "buffer_reinforce": {"buffer": "x"}}, {}, ConfigurationError, "both buffers"),
        ({**block(), "skip_modules": ["q_proj"]}, {}, ConfigurationError, "skip_modules"),
    ],
)
def test_refused_before_training(
    tmp_path: Path, safety: dict[str, Any], kwargs: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        tiny.trainer(tmp_path, safety=safety, **kwargs)


def test_a_whole_subspace_is_no_low_rank_buffer(tmp_path: Path) -> None:
    whole = AlignmentSubspace.from_pair(DATA / "gqa-base", DATA / "gqa-aligned", target_modules="all-linear", whole=True, progress=False)
    with pytest.raises(SubspaceError, match="keeps V whole, which a low-rank buffer cannot subtract"):
        tiny.trainer(tmp_path, safety={"alignment_buffer": {"how": "low_rank"}}, subspace=whole)
