"""The block in TRL's DPO, KTO and GRPO: what it changes and leaves alone, what the reference is compared with, and what is refused."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from tests import processes, tiny
from tests.training import preference, providers
from tests.training.preference import KINDS, SGD, trained
from trl_safety import AlignmentSubspace, SafetyMixin, asft_penalty
from trl_safety.errors import ConfigurationError, ReportError
from trl_safety.reports.report import read_report, verify

ASFT = {"asft": {"weight": 2.0}}
PAIR = {"base": str(tiny.DATA / "gqa-base"), "aligned": str(tiny.DATA / "gqa-aligned")}
BUFFER = {"alignment_buffer": PAIR}
SBR = {"sbr": {"prompts": ["w41", "w42 w43 w44"], "number": 2, "ask_first": False, "weight": 200.0}}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return providers.make(tmp_path_factory.mktemp("providers"))


@pytest.fixture(scope="module")
def full() -> AlignmentSubspace:
    """All of V in every linear layer."""
    return AlignmentSubspace.from_pair(*PAIR.values(), target_modules="all-linear", tolerance=1e-9, progress=False)


@pytest.mark.parametrize("kind", KINDS)
def test_off_is_the_parent_bit_for_bit(kind: str, tmp_path: Path, gqa_subspace: AlignmentSubspace) -> None:
    parent = trained(kind, tmp_path, safe=False)
    assert tiny.identical(parent, trained(kind, tmp_path))
    assert tiny.identical(parent, trained(kind, tmp_path, safety={"asft": {"weight": 0}}, subspace=gqa_subspace))
    assert not tiny.identical(parent, trained(kind, tmp_path, safety=ASFT, subspace=gqa_subspace))


@pytest.mark.parametrize("kind", KINDS)
def test_asft_counts_once_whatever_the_accumulation(kind: str, tmp_path: Path, gqa_subspace: AlignmentSubspace) -> None:
    """One step of SGD over one and over two micro-batches differs from the plain one by −lr·λ·∇penalty."""
    for steps in (1, 2):
        options = {**SGD, "max_steps": 1, "gradient_accumulation_steps": steps, "per_device_train_batch_size": 8 // steps}
        plain = preference.trainer(kind, tmp_path, safe=False, **options)
        asft_penalty(plain.model, gqa_subspace).backward()
        gradients = {name: parameter.grad.clone() for name, parameter in plain.model.named_parameters() if parameter.grad is not None}
        plain.model.zero_grad()
        plain.train()
        protected = trained(kind, tmp_path, safety={"asft": {"weight": 0.5}}, subspace=gqa_subspace, **options)
        for name, value in tiny.factors(plain.model).items():
            expected = -0.5 * 0.5 * gradients[name]
            assert (protected[name] - value - expected).norm() <= 1e-3 * expected.norm(), (steps, name)


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_accumulation_changes_nothing(kind: str, tmp_path: Path, gqa_subspace: AlignmentSubspace) -> None:
    safety = {**ASFT, **SBR, **BUFFER}
    runs = [
        trained(
            kind,
            tmp_path / str(steps),
            safety=safety,
            subspace=gqa_subspace,
            gradient_accumulation_steps=steps,
            per_device_train_batch_size=8 // steps,
            **{**SGD, "learning_rate": 0.05},
            **preference.SPREADS.get(kind, {}),
        )
        for steps in (1, 4)
    ]
    assert tiny.largest_difference(*runs) < 2e-5


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_with_a_correction(kind: str, tmp_path: Path, gqa_subspace: AlignmentSubspace) -> None:
    """Resumed and uninterrupted end at the same adapter; metrics in every log, the report beside every save, an evaluation without the term."""
    safety = {"asft": {"weight": 1.0}, **SBR, "safe_lora": {"threshold": 1.0}}
    options = {
        "safety": safety,
        "subspace": gqa_subspace,
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "eval_dataset": preference.rows(kind, 8, seed=9),
        "per_device_eval_batch_size": 4,
    }
    whole = preference.trainer(kind, tmp_path / "whole", **options)
    whole.train()
    whole.save_model()
    for row in whole.state.log_history:
        assert {"safety/asft_penalty", "safety/asft_loss", "safety/sbr", "safety/update_norm"} <= row.keys()
    assert any("eval_loss" in row for row in whole.state.log_history)
    report = verify(tmp_path / "whole")
    assert [(method.name, method.acted) for method in report.methods] == [("asft", True), ("sbr", True), ("safe_lora", True)]
    assert not read_report(tmp_path / "whole" / "checkpoint-2").methods[2].acted
    assert "A safety method acted" in (tmp_path / "whole" / "README.md").read_text()
    # What a kill after the save of step 2 leaves behind.
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "killed" / "checkpoint-2")
    resumed = preference.trainer(kind, tmp_path / "killed", **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    assert tiny.identical(tiny.factors(resumed.model), tiny.factors(whole.model))


@pytest.mark.parametrize("kind", KINDS)
def test_sbr_holds_the_states(kind: str, tmp_path: Path) -> None:
    moved = []
    for weight in (1e-9, 1000.0):
        block = {"sbr": {**SBR["sbr"], "weight": weight}}
        trainer = preference.trainer(
            kind, tmp_path, safety=block, max_steps=10, learning_rate=2e-2, peft_config=tiny.lora(init_lora_weights=True)
        )
        trainer.train()
        moved.append(trainer.state.log_history[-1]["safety/sbr"])
    assert moved[1] < 0.3 * moved[0]


def merged(world: Path) -> Any:
    """The aligned model with the provider's buffer in its weights."""
    return PeftModel.from_pretrained(tiny.model(), str(world / "buffer")).merge_and_unload()


@pytest.mark.parametrize(
    ("kind", "how"), [*itertools.product(["dpo", "kto"], ["weights", "low_rank", "buffer_reinforce"]), ("dpo", "signed_vector")]
)
def test_policy_and_reference_see_the_same_buffer(kind: str, how: str, world: Path, full: AlignmentSubspace, tmp_path: Path) -> None:
    """The adapter is the one that trains on the model with the buffer in its weights, reference and all. Its first rewards are zero, since
    a fresh adapter is its reference, and it is evaluated on the aligned model against the aligned model."""
    blocks: dict[str, dict[str, Any]] = {
        "weights": BUFFER,
        "signed_vector": {"signed_vector": {**PAIR, "train": -1.0}},
        "low_rank": {"alignment_buffer": {"how": "low_rank", "gamma": 0.7}},
        "buffer_reinforce": {"buffer_reinforce": {"buffer": str(world / "buffer")}},
    }
    # A buffer beside a layer rounds differently from one in its weights, which Adam magnifies.
    options = {**SGD, "peft_config": tiny.lora(init_lora_weights=True), "max_steps": 3}
    options |= {"gradient_checkpointing": True, "eval_dataset": preference.rows(kind, 8, seed=9)}
    protected = preference.trainer(
        kind,
        tmp_path,
        safety=blocks[how],
        **({"subspace": full} if how == "low_rank" else {}),
        eval_strategy="steps",
        eval_steps=3,
        **options,
    )
    protected.train()
    first, evaluated = protected.state.log_history[0], next(row for row in protected.state.log_history if "eval_loss" in row)
    assert first["rewards/chosen"] == first["rewards/rejected"] == 0
    if how == "low_rank":
        # The linear layers alone: embeddings and norms are no low-rank adapter's.
        buffered, base = tiny.model(), tiny.model("gqa-base")
        for name in full.layers:
            weight, other = (model.get_submodule(name).weight.data for model in (buffered, base))
            weight -= 0.7 * (weight - other)
    else:
        buffered = merged(world) if how == "buffer_reinforce" else tiny.model("gqa-base")
    expected = trained(kind, tmp_path / "buffered", safe=False, base=buffered, **options)
    assert tiny.largest_difference(tiny.factors(protected.model), expected) < 2e-5
    plain = preference.trainer(kind, tmp_path / "plain", safe=False, **options)
    plain.train()
    assert tiny.largest_difference(tiny.factors(protected.model), tiny.factors(plain.model)) > 1e-2
    plain.model.load_state_dict(tiny.factors(protected.model), strict=False)
    assert plain.evaluate()["eval_loss"] == pytest.approx(evaluated["eval_loss"], rel=1e-6)
    protected.save_model()
    assert verify(tmp_path).methods[0].acted


def test_an_adapter_that_was_trained_before_is_its_own_reference(tmp_path: Path) -> None:
    """TRL keeps a frozen copy of it beside it, which passes through the same buffer; a resumed run takes up both."""
    start = get_peft_model(tiny.model(), tiny.lora())
    start.save_pretrained(tmp_path / "start")

    def model(name: str) -> Any:
        return PeftModel.from_pretrained(tiny.model(name), str(tmp_path / "start"), is_trainable=True)

    options = {**tiny.WELL_CONDITIONED, "peft_config": None, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    protected = preference.trainer("dpo", tmp_path / "a", base=model("gqa-aligned"), safety=BUFFER, **options)
    protected.train()
    assert protected.state.log_history[0]["rewards/chosen"] == 0
    expected = trained("dpo", tmp_path / "b", safe=False, base=model("gqa-base"), **options)
    found = tiny.factors(protected.model)
    assert any(".ref." in name for name in found)
    assert tiny.largest_difference(found, expected) < 2e-5
    shutil.rmtree(tmp_path / "a" / "checkpoint-4")
    resumed = preference.trainer("dpo", tmp_path / "a", base=model("gqa-aligned"), safety=BUFFER, **options)
    resumed.train(resume_from_checkpoint=True)
    assert tiny.identical(tiny.factors(resumed.model), found)
    resumed.save_model()
    assert verify(tmp_path / "a").methods[0].steps == (1, 4)
    # The copy is what the run began with, and nothing protected it.
    assert (tmp_path / "a" / "ref" / "adapter_model.safetensors").is_file()
    with pytest.raises(ReportError):
        verify(tmp_path / "a" / "ref")


def refusals(world: Path) -> dict[str, tuple[str, dict[str, Any], dict[str, Any], str]]:
    hooks = {"buffer_reinforce": {"buffer": str(world / "buffer")}}
    generates = "the trainer is a SafeGRPOTrainer|the trainer is a GRPOTrainer"
    second = {"ref_model": tiny.model()}
    return {
        "dual_select in DPO": (
            "dpo",
            {"dual_select": {}},
            {},
            "the trainer is a DPOTrainer: dual_select cannot act: it chooses samples by",
        ),
        "dual_select in KTO": ("kto", {"dual_select": {}}, {}, "the trainer is a KTOTrainer: dual_select cannot act"),
        "dual_select in GRPO": ("grpo", {"dual_select": {}}, {}, "the trainer is a GRPOTrainer: dual_select cannot act"),
        "weights in GRPO": ("grpo", BUFFER, {}, f"({generates}): alignment_buffer cannot act: what the model generates"),
        "hooks in GRPO": ("grpo", hooks, {}, f"({generates}): buffer_reinforce cannot act"),
        "weights beside a precomputed reference": (
            "dpo",
            BUFFER,
            {"precompute_ref_log_probs": True},
            "precompute_ref_log_probs = True: alignment_buffer cannot act: the reference's log-probabilities come from",
        ),
        "hooks beside a precomputed reference": ("kto", hooks, {"precompute_ref_log_probs": True}, "buffer_reinforce cannot act"),
        "weights beside a second model": ("dpo", BUFFER, second, "ref_model is a LlamaForCausalLM: alignment_buffer cannot act"),
        "hooks beside a second model": ("kto", hooks, second, "ref_model is a LlamaForCausalLM: buffer_reinforce cannot act"),
    }


def test_what_would_compare_two_models_is_refused(world: Path, tmp_path: Path) -> None:
    """Before the model is loaded: there is none of that name."""
    for kind, block, options, message in refusals(world).values():
        with pytest.raises(ConfigurationError, match=message):
            preference.trainer(kind, tmp_path, base="no/model", safety=block, **options)


def test_another_reference_without_a_buffer(tmp_path: Path, gqa_subspace: AlignmentSubspace) -> None:
    """A reference computed before training has the aligned weights, and so has the policy."""
    options = {**SGD, "max_steps": 2, "safety": ASFT, "subspace": gqa_subspace}
    here = trained("dpo", tmp_path, **options)
    assert tiny.largest_difference(here, trained("dpo", tmp_path, **options, precompute_ref_log_probs=True)) < 1e-5
    assert tiny.largest_difference(here, trained("dpo", tmp_path, **options, ref_model=tiny.model())) < 1e-5


@pytest.mark.parametrize("iterations", [1, 2])
def test_grpo_generates_from_the_model_that_will_be_used(iterations: int, tmp_path: Path, gqa_subspace: AlignmentSubspace) -> None:
    """What is rewarded is what a freshly loaded aligned model says that has the adapter of that step, also where it serves several steps."""
    heard = []

    def rewards(prompts: list[str], completions: list[str], **kwargs: Any) -> list[float]:
        fresh = get_peft_model(tiny.model(), tiny.lora())
        fresh.load_state_dict(tiny.factors(trainer.model), strict=False)
        words = tiny.tokenizer()
        asked = words(prompts, return_tensors="pt")["input_ids"]
        said = fresh.generate(
            asked, attention_mask=torch.ones_like(asked), do_sample=False, max_new_tokens=6, eos_token_id=2, pad_token_id=0
        )
        assert words.batch_decode(said[:, asked.shape[1] :], skip_special_tokens=True) == completions
        heard.append(completions)
        return preference.reward(completions)

    options = {"num_iterations": iterations, "max_steps": 4, "generation_kwargs": {"do_sample": False}, "learning_rate": 0.1}
    trainer = preference.trainer("grpo", tmp_path, safety=ASFT, subspace=gqa_subspace, reward_funcs=rewards, **options)
    trainer.train()
    assert len(heard) == 4 // iterations


def test_any_other_by_the_mixin(tmp_path: Path, gqa_subspace: AlignmentSubspace) -> None:
    """ORPO, which has no reference: a buffer is trained on as the base model is."""
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    class SafeORPOTrainer(SafetyMixin, ORPOTrainer):
        pass

    def made(cls: Any, name: str, base: str = "gqa-aligned") -> Any:
        args = ORPOConfig(
            str(tmp_path / name),
            max_steps=3,
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
            max_length=16,
            per_device_train_batch_size=4,
            disable_tqdm=True,
            seed=3,
            **{**SGD, "learning_rate": 0.02},
        )
        torch.manual_seed(0)
        model = get_peft_model(tiny.model(base), tiny.lora())
        return cls(model=model, args=args, train_dataset=preference.rows("dpo"), processing_class=tiny.tokenizer())

    trainer = made(SafeORPOTrainer, "asft")
    trainer.start_safety({**ASFT, "safe_lora": {"threshold": 1.0}}, gqa_subspace)
    before = asft_penalty(trainer.model, gqa_subspace).item()
    trainer.train()
    trainer.save_model()
    assert all(method.acted for method in verify(tmp_path / "asft").methods)
    assert trainer.state.log_history[-1]["safety/asft_penalty"] < before
    buffered, expected = made(SafeORPOTrainer, "buffer"), made(ORPOTrainer, "base", "gqa-base")
    buffered.start_safety(BUFFER)
    buffered.train(), expected.train()
    assert tiny.largest_difference(tiny.factors(buffered.model), tiny.factors(expected.model)) < 2e-5


def test_two_processes_equal_one(tmp_path: Path, gqa_subspace: AlignmentSubspace) -> None:
    path = gqa_subspace.save(tmp_path / "S.safetensors")
    for name, count, batch in (("one", 1, 8), ("two", 2, 4)):
        for done in processes.run("tests.training.two_processes_preference", tmp_path / name, batch, path, processes=count):
            assert done.returncode == 0, done.output[-3000:]
    for kind in KINDS:
        one, two = (load_file(tmp_path / name / kind / "adapter_model.safetensors") for name in ("one", "two"))
        assert tiny.largest_difference(two, one) < 2e-5
        assert all(method.acted for method in verify(tmp_path / "two" / kind).methods)
