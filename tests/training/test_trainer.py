"""`SafeSFTTrainer` against its parent, and the invariances of the AsFT penalty, through real training."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from packaging.version import Version
from trl import SFTConfig, SFTTrainer

from tests import references, tiny
from trl_safety import AlignmentSubspace, CSULoRACallback, SafeLoRACallback, SafeSFTConfig, SafetyConfig, asft_penalty
from trl_safety.errors import AdapterError, ConfigurationError, SubspaceError
from trl_safety.reports.report import read_report, verify

ASFT = {"asft": {"weight": 2.0}}
SMOOTHING = pytest.param(
    {"label_smoothing_factor": 0.1},
    marks=pytest.mark.skipif(Version(trl.__version__) < Version("1.16"), reason="TRL 1.9's own compute_loss fails with label smoothing"),
)


def trained(output: Path, **kwargs: Any) -> dict[str, torch.Tensor]:
    trainer = tiny.trainer(output, **kwargs)
    trainer.train()
    return tiny.factors(trainer.model)


@pytest.mark.parametrize("variant", ["no block", "weight 0"])
def test_off_is_the_parent_bit_for_bit(tmp_path: Path, gqa_subspace: AlignmentSubspace, variant: str) -> None:
    parent = trained(tmp_path, cls=SFTTrainer, args=tiny.arguments(tmp_path, SFTConfig))
    ours = trained(tmp_path, **({} if variant == "no block" else {"safety": {"asft": {"weight": 0}}, "subspace": gqa_subspace}))
    assert tiny.identical(parent, ours)
    assert not tiny.identical(parent, trained(tmp_path, safety=ASFT, subspace=gqa_subspace))


def test_plain_sft_config_is_taken(tmp_path: Path, gqa_subspace: AlignmentSubspace) -> None:
    assert tiny.trainer(tmp_path, args=tiny.arguments(tmp_path, SFTConfig), safety=ASFT, subspace=gqa_subspace)._safety is not None


def test_first_step_adds_the_gradient_of_the_dense_penalty(tmp_path: Path, gqa_subspace: AlignmentSubspace) -> None:
    """SGD, one step: the difference from plain SFT is −lr·λ·∇penalty, from the dense float64 reference."""
    options = {"max_steps": 1, "optim": "sgd", "learning_rate": 1e-3, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
    plain = tiny.trainer(tmp_path, **options)
    start = {name: value.double().requires_grad_() for name, value in tiny.factors(plain.model).items()}
    plain.train()
    protected = trained(tmp_path, safety={"asft": {"weight": 3.0}}, subspace=gqa_subspace, **options)
    total = torch.zeros((), dtype=torch.float64)
    for name, B in start.items():
        if "lora_B" in name:
            layer = gqa_subspace.layers[name.removeprefix("base_model.model.").removesuffix(".lora_B.default.weight")]
            U, S, _ = layer.factors()
            M = U.double() @ torch.diag(S.double() ** 2 / layer.frobenius_norm) @ U.double().T
            total = total + references.penalty(B, start[name.replace("lora_B", "lora_A")], M)
    gradients = dict(zip(start, torch.autograd.grad(total, list(start.values())), strict=True))
    for name, value in tiny.factors(plain.model).items():
        torch.testing.assert_close((protected[name] - value).double(), -1e-3 * 3.0 * gradients[name], rtol=1e-3, atol=2e-7)


def test_the_penalty_keeps_the_update_smaller_outside_the_subspace(tmp_path: Path, gqa_subspace: AlignmentSubspace) -> None:
    plain, protected = tiny.trainer(tmp_path), tiny.trainer(tmp_path, safety={"asft": {"weight": 5.0}}, subspace=gqa_subspace)
    plain.train(), protected.train()
    assert asft_penalty(protected.model, gqa_subspace) < 0.7 * asft_penalty(plain.model, gqa_subspace)


@pytest.mark.parametrize("extra", [{}, {"average_tokens_across_devices": False}, {"loss_type": "dft"}, SMOOTHING])
def test_accumulation_does_not_change_the_update(tmp_path: Path, gqa_subspace: AlignmentSubspace, extra: dict[str, Any]) -> None:
    """24 rows in batches of 16: the second accumulation window is short. SGD, so that the size of a gradient matters."""
    data = tiny.rows(24)
    common = {"safety": ASFT, "subspace": gqa_subspace, "data": data, "optim": "sgd", "max_steps": -1, "num_train_epochs": 2, **extra}
    updates = {
        steps: trained(tmp_path, per_device_train_batch_size=16 // steps, gradient_accumulation_steps=steps, **common)
        for steps in (1, 2, 4, 8)
    }
    for steps in (2, 4, 8):
        assert tiny.largest_difference(updates[steps], updates[1]) < 2e-5
    # The negative control: plain SFT is equally invariant, but ends elsewhere.
    plain = trained(tmp_path, **{**common, "safety": None, "subspace": None}, per_device_train_batch_size=16)
    assert tiny.largest_difference(plain, updates[1]) > 1e-3


def test_accumulation_with_a_loss_that_the_trainer_divides(tmp_path: Path, gqa_subspace: AlignmentSubspace) -> None:
    """A model that takes no `num_items_in_batch` has its mean loss divided by the accumulation steps; rows of one length."""
    data = tiny.rows(64).filter(lambda row: len(row["completion"].split()) == 3)
    updates = []
    for steps in (1, 4):
        trainer = tiny.trainer(
            tmp_path,
            data=data,
            safety=ASFT,
            subspace=gqa_subspace,
            optim="sgd",
            per_device_train_batch_size=8 // steps,
            gradient_accumulation_steps=steps,
            max_steps=2,
        )
        trainer.model_accepts_loss_kwargs = False
        trainer.train()
        updates.append(tiny.factors(trainer.model))
    assert tiny.largest_difference(updates[1], updates[0]) < 2e-5


def test_paper_lambda_grows_with_accumulation(tmp_path: Path, gqa_subspace: AlignmentSubspace) -> None:
    """The authors' λ on n micro-batches is n times ours."""
    options = {"subspace": gqa_subspace, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "optim": "sgd", "max_steps": 2}
    paper = trained(tmp_path, safety={"asft": {"weight": 0.5, "paper_lambda": True}}, **options)
    assert tiny.largest_difference(paper, trained(tmp_path, safety={"asft": {"weight": 2.0}}, **options)) < 2e-5
    assert tiny.largest_difference(paper, trained(tmp_path, safety={"asft": {"weight": 0.5}}, **options)) > 1e-4


def test_an_unknown_loss_scaling_is_an_error(tmp_path: Path, gqa_subspace: AlignmentSubspace) -> None:
    class Odd(SFTTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            return super().training_step(*args, **kwargs) / 3

    from trl_safety.training.mixin import SafetyMixin

    class SafeOdd(SafetyMixin, Odd):
        pass

    trainer = tiny.trainer(tmp_path, cls=SafeOdd, gradient_accumulation_steps=2, per_device_train_batch_size=4)
    trainer.start_safety(ASFT, gqa_subspace)
    with pytest.raises(ConfigurationError, match="scales the loss in a way"):
        trainer.train()


def test_resumed_run_ends_where_the_uninterrupted_one_does(tmp_path: Path, gqa_subspace: AlignmentSubspace) -> None:
    options = {
        "safety": {"asft": {"weight": 1.0}, "safe_lora": {"threshold": 1.0}},
        "subspace": gqa_subspace,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    whole = trained(tmp_path / "whole", **options)
    # What a kill after the save of step 2 leaves behind.
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "killed" / "checkpoint-2")
    resumed = tiny.trainer(tmp_path / "killed", **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    assert tiny.identical(tiny.factors(resumed.model), whole)


def test_metrics_are_in_every_log_and_true(tmp_path: Path, gqa_subspace: AlignmentSubspace) -> None:
    trainer = tiny.trainer(
        tmp_path, safety=ASFT, subspace=gqa_subspace, eval_dataset=tiny.rows(8, seed=9), eval_strategy="steps", eval_steps=2
    )
    trainer.train()
    history = trainer.state.log_history
    assert any("eval_loss" in row for row in history)
    for row in history:
        assert {
            "safety/asft_penalty",
            "safety/asft_loss",
            "safety/update_norm",
            "safety/inside_share",
            "safety/subspace_cosine",
        } <= row.keys()
    last = history[-1]
    assert last["safety/asft_penalty"] == pytest.approx(asft_penalty(trainer.model, gqa_subspace).item(), rel=1e-5)
    total = inside = 0.0
    for module in trainer._safety.prepared.covered:
        U = gqa_subspace.layers[module.name].left.double()
        update = module.scaling * module.B.detach().double() @ module.A.detach().double()
        total, inside = total + update.square().sum().item(), inside + (U.T @ update).square().sum().item()
    assert last["safety/update_norm"] == pytest.approx(total**0.5, rel=1e-5)
    assert last["safety/inside_share"] == pytest.approx(inside / total, rel=1e-5)


def test_evaluation_loss_has_no_penalty(tmp_path: Path, gqa_subspace: AlignmentSubspace) -> None:
    losses = [
        tiny.trainer(tmp_path, eval_dataset=tiny.rows(8, seed=9), **options).evaluate()["eval_loss"]
        for options in ({}, {"safety": {"asft": {"weight": 100.0}}, "subspace": gqa_subspace})
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": True},
        {"bf16": True},
        {"packing": True, "max_length": 12},
        {"torch_compile": True, "torch_compile_backend": "eager"},
        {"use_liger_kernel": False, "neftune_noise_alpha": 5.0},
    ],
    ids=lambda options: next(iter(options)),
)
def test_works_with_what_users_switch_on(tmp_path: Path, gqa_subspace: AlignmentSubspace, options: dict[str, Any]) -> None:
    trainer = tiny.trainer(tmp_path, safety={"asft": {"weight": 5.0}, "safe_lora": {"threshold": 1.0}}, subspace=gqa_subspace, **options)
    plain = tiny.trainer(tmp_path, **options)
    before = asft_penalty(trainer.model, gqa_subspace).item()
    trainer.train(), plain.train()
    logged = [row["safety/asft_penalty"] for row in trainer.state.log_history if "loss" in row]
    assert logged[-1] < before
    assert logged[-1] < asft_penalty(plain.model, gqa_subspace).item()
    assert trainer.safety_report is not None
    assert trainer.safety_report.protected


def test_the_penalty_is_in_float32_under_bf16_autocast(tmp_path: Path, gqa_subspace: AlignmentSubspace, gqa_model: Any) -> None:
    exact = asft_penalty(gqa_model, gqa_subspace)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(asft_penalty(gqa_model, gqa_subspace), exact)


@pytest.mark.parametrize("how", ["object", "mapping", "file", "args mapping", "args object", "args file"])
def test_the_block_is_taken_in_every_form(tmp_path: Path, gqa_subspace: AlignmentSubspace, how: str) -> None:
    path = gqa_subspace.save(tmp_path / "S.safetensors")
    block = {"subspace": str(path), "asft": {"weight": 2.0}}
    (tmp_path / "safety.yaml").write_text(json.dumps({"safety": block}))
    value: Any = {"object": SafetyConfig(**block), "mapping": block, "file": str(tmp_path / "safety.yaml")}[how.removeprefix("args ")]
    in_args = {"args": tiny.arguments(tmp_path, safety=value)} if how.startswith("args") else {"safety": value}
    trainer = tiny.trainer(tmp_path, **in_args)
    assert trainer._safety.config.asft.weight == 2.0
    json.dumps(trainer.args.to_dict())


def test_a_pair_in_the_block_is_built_for_the_adapted_layers(tmp_path: Path) -> None:
    block = {"subspace": {"base": str(tiny.DATA / "gqa-base"), "aligned": str(tiny.DATA / "gqa-aligned"), "rank": 4}, "asft": {}}
    trainer = tiny.trainer(tmp_path, safety=block)
    assert len(trainer._safety.subspace.layers) == 9
    assert AlignmentSubspace.load(tmp_path / "safety" / "built_subspace.safetensors").identity == trainer._safety.subspace.identity


def test_report_of_an_asft_run(tmp_path: Path, gqa_subspace: AlignmentSubspace) -> None:
    trainer = tiny.trainer(tmp_path, safety=ASFT, subspace=gqa_subspace, save_strategy="steps", save_steps=2)
    trainer.train()
    checkpoint = read_report(tmp_path / "checkpoint-2")
    assert (checkpoint.stage, checkpoint.protected) == ("training", True)
    assert "in optimizer steps 1 to 2" in checkpoint.methods[0].summary
    trainer.save_model()
    report = read_report(tmp_path)
    assert (report.stage, report.protected, report.not_covered) == ("final", True, [])
    assert len(report.methods[0].layers) == 9
    assert "Safety" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"peft_config": None, "safety": ASFT}, AdapterError, "has no adapter.*peft_config"),
        ({"safety": {"asft": {"weight": -1}}}, ConfigurationError, r"safety\.asft\.weight = -1"),
        ({"safety": {"asft": {"wieght": 1}}}, ConfigurationError, "did you mean 'weight'"),
        ({"safety": {"subspace": "x.safetensors", **ASFT}}, ConfigurationError, "keep one of them"),
        ({"safety": {}}, ConfigurationError, "names no method"),
        ({"safety": {**ASFT, "skip_modules": ["nope"]}}, SubspaceError, "skip_modules"),
        ({"safety": ASFT, "peft_config": tiny.lora(target_modules=["q_proj", "o_proj", "gate_proj"])}, None, ""),
        ({"safety": ASFT, "base": tiny.model("gqa-base")}, AdapterError, "the unaligned base of the pair"),
        ({"safety": ASFT, "base": tiny.model("mha-aligned")}, AdapterError, "another model"),
        ({"safety": {"asft": {"operator": "orthogonal"}}}, None, ""),
    ],
)
def test_what_would_not_act_is_an_error_before_training(
    tmp_path: Path, gqa_subspace: AlignmentSubspace, options: dict[str, Any], error: type[Exception] | None, message: str
) -> None:
    if error is None:
        assert tiny.trainer(tmp_path, subspace=gqa_subspace, **options)._safety is not None
        return
    with pytest.raises(error, match=message):
        tiny.trainer(tmp_path, subspace=gqa_subspace, **options)


def test_no_subspace_and_no_block(tmp_path: Path, gqa_subspace: AlignmentSubspace) -> None:
    with pytest.raises(ConfigurationError, match=r"safety\.subspace is missing"):
        tiny.trainer(tmp_path, safety=ASFT)
    with pytest.raises(ConfigurationError, match="no safety block"):
        tiny.trainer(tmp_path, subspace=gqa_subspace)
    with pytest.raises(ConfigurationError, match=r"args\.safety"):
        tiny.trainer(tmp_path, safety=ASFT, subspace=gqa_subspace, args=tiny.arguments(tmp_path, safety=ASFT))


def test_missing_layer_is_an_error(tmp_path: Path) -> None:
    subspace = AlignmentSubspace.from_pair(
        tiny.DATA / "gqa-base", tiny.DATA / "gqa-aligned", target_modules=["q_proj", "v_proj"], rank=4, progress=False
    )
    with pytest.raises(SubspaceError, match=r"3 of 9 adapted layers.*down_proj"):
        tiny.trainer(tmp_path, safety=ASFT, subspace=subspace)
    trainer = tiny.trainer(tmp_path, safety={**ASFT, "skip_modules": ["down_proj"]}, subspace=subspace)
    trainer.train()
    trainer.save_model()
    assert len(read_report(tmp_path).skipped) == 3
    assert "Left alone on request" in (tmp_path / "README.md").read_text()


def test_frozen_adapter_and_replaced_adapter_are_errors(tmp_path: Path, gqa_subspace: AlignmentSubspace) -> None:
    from peft import PeftModel

    frozen = PeftModel.from_pretrained(tiny.model(), str(tiny.DATA / "gqa-adapter"))
    with pytest.raises(AdapterError, match="is_trainable=True"):
        tiny.trainer(tmp_path, base=frozen, peft_config=None, safety=ASFT, subspace=gqa_subspace)
    trainer = tiny.trainer(tmp_path, safety=ASFT, subspace=gqa_subspace)
    trainer.model.delete_adapter("default")
    trainer.model.add_adapter("default", tiny.lora(r=8))
    trainer.model.set_adapter("default")
    with pytest.raises(AdapterError, match="active adapter was changed or replaced"):
        trainer.train()


def test_config_survives_its_own_serialisation(tmp_path: Path) -> None:
    args = tiny.arguments(tmp_path, safety={"subspace": "S.safetensors", "safe_lora": {"layers": 3}})
    again = SafeSFTConfig(**{key: value for key, value in args.to_dict().items() if not key.endswith("_token")})
    assert again.safety == args.safety == {"subspace": "S.safetensors", "safe_lora": {"layers": 3}}


def test_training_on_without_protection_is_seen(tmp_path: Path, gqa_subspace: AlignmentSubspace) -> None:
    for block in (ASFT, {"safe_lora": {"threshold": 1.0}}):
        trainer = tiny.trainer(tmp_path / "first", safety=block, subspace=gqa_subspace)
        trainer.train()
        trainer.save_model(tmp_path / "protected")
        assert read_report(tmp_path / "protected").protected
        trainer.model.to(torch.bfloat16)
        trainer.save_model(tmp_path / "cast")
        assert read_report(tmp_path / "cast").protected
        trainer.model.to(torch.float32)
        further = tiny.trainer(
            tmp_path / "second", cls=SFTTrainer, args=tiny.arguments(tmp_path, SFTConfig), base=trainer.model, peft_config=None
        )
        further.train()
        further.save_model(tmp_path / "further")
        report = read_report(tmp_path / "further")
        assert not report.protected
        assert "changed afterwards, without protection" in report.methods[0].summary


def test_a_callback_and_a_block_work_together_or_are_refused(tmp_path: Path, gqa_subspace: AlignmentSubspace) -> None:
    callback = SafeLoRACallback(gqa_subspace, threshold=1.0)
    trainer = tiny.trainer(tmp_path, safety=ASFT, subspace=gqa_subspace, callbacks=[callback])
    trainer.train()
    trainer.save_model()
    assert [(m.name, m.acted) for m in read_report(tmp_path).methods] == [("asft", True), ("safe_lora", True)]
    with pytest.raises(ConfigurationError, match="two corrections"):
        tiny.trainer(tmp_path, safety={"csulora": {}}, subspace=gqa_subspace, callbacks=[SafeLoRACallback(gqa_subspace)])
    both = [SafeLoRACallback(gqa_subspace), CSULoRACallback(gqa_subspace)]
    plain = tiny.trainer(tmp_path, cls=SFTTrainer, args=tiny.arguments(tmp_path, SFTConfig), callbacks=both)
    with pytest.raises(ConfigurationError, match="keep one of them"):
        plain.train()
    assert plain.state.global_step == 0


@pytest.mark.parametrize("correction", [{}, {"safe_lora": {"threshold": 1.0}}])
def test_what_the_host_switched_off_stands_in_the_report(
    tmp_path: Path, gqa_subspace: AlignmentSubspace, correction: dict[str, Any]
) -> None:
    trainer = tiny.trainer(tmp_path, max_steps=1)
    trainer.start_safety({"asft": {}, **correction}, gqa_subspace, switched_off=["lora_qkv_kernel = True was switched off"])
    trainer.train()
    trainer.save_model()
    assert verify(tmp_path).switched_off == ["lora_qkv_kernel = True was switched off"]
    assert "lora_qkv_kernel = True was switched off" in (tmp_path / "README.md").read_text()
    assert "switched_off" not in tiny_report(tmp_path / "without", gqa_subspace)


def tiny_report(output: Path, subspace: AlignmentSubspace) -> str:
    trainer = tiny.trainer(output, safety={"asft": {}}, subspace=subspace, max_steps=1)
    trainer.train()
    trainer.save_model()
    return (output / "safety_report.json").read_text()
