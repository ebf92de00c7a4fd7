"""`axolotl train` as a subprocess: each method's adapter against the same run through trl_safety."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from axolotl_plugin.plugin import loaded_by_axolotl
from tests import tiny
from tests.axolotl.conftest import DEEPSPEED, Axolotl, protect
from tests.training.test_corrections import assert_close, updates
from trl_safety import AlignmentSubspace, ServedVectorConfig, asft_penalty, correct, merge_reinforce
from trl_safety.adapters.folder import AdapterFolder
from trl_safety.adapters.marks import kind_of
from trl_safety.config.alignment_vector import AlignmentVectorConfig
from trl_safety.config.csulora import CsuloraConfig
from trl_safety.config.safe_lora import SafeLoraConfig
from trl_safety.corrections.buffer_reinforce import USER_ADAPTER
from trl_safety.corrections.folder import correct_folder
from trl_safety.corrections.registry import correction_for
from trl_safety.errors import ReportError
from trl_safety.reports.report import read_report, verify
from trl_safety.reports.selection import SELECTION, read_choices, read_selection


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def subspace(world: Path) -> AlignmentSubspace:
    return AlignmentSubspace.load(world / "S.safetensors")


def loaded(world: Path, folder: Path, **kwargs: Any) -> Any:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(world / "aligned"), str(folder), **kwargs)


def test_corrections_equal_those_of_the_saved_adapter_and_without_the_plugin_nothing_happens(
    world: Path, config: dict[str, Any], axolotl: Axolotl, tmp_path: Path
) -> None:
    axolotl("train", {**config, "output_dir": str(tmp_path / "plain")}, launcher=None)
    with pytest.raises(ReportError, match="no method of trl-safety protected it"):
        verify(tmp_path / "plain")
    blocks = {"safe_lora": SafeLoraConfig(threshold=1.0), "csulora": CsuloraConfig(), "alignment_vector": AlignmentVectorConfig()}
    for method, block in blocks.items():
        correct_folder(tmp_path / "plain", tmp_path / f"want-{method}", subspace(world), correction_for(block))
        options = protect({**config, "output_dir": str(tmp_path / method)}, world, **{method: block.model_dump(exclude_none=True)})
        axolotl("train", options, launcher=None)
        assert_close(updates(loaded(world, tmp_path / method)), updates(loaded(world, tmp_path / f"want-{method}")))
        report = verify(tmp_path / method)
        assert [m.name for m in report.methods] == [method]
        assert "A safety method acted" in (tmp_path / method / "README.md").read_text()
        with pytest.raises(AssertionError):
            assert_close(updates(loaded(world, tmp_path / "plain")), updates(loaded(world, tmp_path / method)))
        # Axolotl's own merge writes the corrected update into the base.
        axolotl("merge-lora", options, f"--lora-model-dir={tmp_path / method}")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / method / "merged")
        aligned = AutoModelForCausalLM.from_pretrained(world / "aligned")
        for name, update in updates(loaded(world, tmp_path / method)).items():
            change = merged.get_submodule(name).weight.double() - aligned.get_submodule(name).weight.double()
            assert (change - update).norm() <= 1e-3 * update.norm() + 1e-6


@pytest.mark.skipif(loaded_by_axolotl(), reason="a block alone is enough: test_entry_point.py")
def test_a_block_without_the_plugin_line_is_ignored_by_axolotl(
    world: Path, config: dict[str, Any], axolotl: Axolotl, tmp_path: Path
) -> None:
    """Only `verify` and `axolotl safety train` can detect it."""
    axolotl("train", {**config, "output_dir": str(tmp_path / "plain")})
    unprotected = protect({**config, "output_dir": str(tmp_path / "ignored")}, world, safe_lora={"threshold": 1.0})
    del unprotected["plugins"]
    axolotl("train", unprotected)
    assert tiny.identical(weights(tmp_path / "ignored"), weights(tmp_path / "plain"))
    with pytest.raises(ReportError):
        verify(tmp_path / "ignored")
    assert "Axolotl would ignore" in axolotl("safety train", unprotected, code=1)


def test_asft_adds_the_penaltys_gradient(world: Path, config: dict[str, Any], axolotl: Axolotl, tmp_path: Path) -> None:
    """One step of SGD over two micro-batches differs from the plain one by −lr·λ·∇penalty at the start."""
    config |= {"max_grad_norm": 0.0, "max_steps": 1}
    axolotl("train", {**config, "output_dir": str(tmp_path / "plain")})
    axolotl("safety train", {**protect(config, world, asft={"weight": 0.5}), "plugins": ["safety"]})
    model = loaded(world, world / "start", is_trainable=True)
    asft_penalty(model, subspace(world)).backward()
    gradients = {name.replace(".default", ""): p.grad for name, p in model.named_parameters() if p.requires_grad}
    plain, protected = weights(tmp_path / "plain"), weights(tmp_path / "out")
    for name, gradient in gradients.items():
        expected = -0.5 * 0.5 * gradient
        assert (protected[name] - plain[name] - expected).norm() <= 1e-3 * expected.norm(), name
    assert "in optimizer steps 1 to 1" in verify(tmp_path / "out").methods[0].summary


def test_qlora_is_corrected_as_its_saved_adapter_is(world: Path, config: dict[str, Any], axolotl: Axolotl, tmp_path: Path) -> None:
    config |= {"adapter": "qlora", "load_in_4bit": True}
    axolotl("train", {**config, "output_dir": str(tmp_path / "plain")})
    for method, block in {"safe_lora": SafeLoraConfig(layers=4), "csulora": CsuloraConfig(output_rank="original")}.items():
        correct_folder(tmp_path / "plain", tmp_path / f"want-{method}", subspace(world), correction_for(block))
        axolotl("train", protect({**config, "output_dir": str(tmp_path / method)}, world, **{method: block.model_dump(exclude_none=True)}))
        assert_close(updates(loaded(world, tmp_path / method)), updates(loaded(world, tmp_path / f"want-{method}")))
        assert "up to quantisation" in verify(tmp_path / method).base_check


def test_resuming_ends_where_the_uninterrupted_run_does(world: Path, config: dict[str, Any], axolotl: Axolotl, tmp_path: Path) -> None:
    options = protect(
        {**config, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}, world, asft={"weight": 0.5}, safe_lora={"threshold": 1.0}
    )
    axolotl("train", options)
    whole = weights(tmp_path / "out")
    with pytest.raises(ReportError, match="corrections and merges act when training ends"):
        verify(tmp_path / "out" / "checkpoint-2")
    axolotl("train", {**options, "resume_from_checkpoint": str(tmp_path / "out" / "checkpoint-2")})
    assert tiny.largest_difference(weights(tmp_path / "out"), whole) < 1e-5
    assert [m.acted for m in verify(tmp_path / "out").methods] == [True, True]


def test_two_processes_equal_one_with_twice_the_batch(
    world: Path, config: dict[str, Any], axolotl: Axolotl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = protect({**config, "gradient_accumulation_steps": 1}, world, asft={"weight": 0.5}, safe_lora={"threshold": 1.0})
    options["datasets"][0]["path"] = str(world / "same.jsonl")
    # Axolotl gives each of several processes the device of its rank; on a CPU, this puts the model where there is memory.
    options["max_memory"] = {"cpu": "8GiB"}
    axolotl("train", {**options, "output_dir": str(tmp_path / "one")})
    two = {**options, "output_dir": str(tmp_path / "two"), "micro_batch_size": 4, "ddp_backend": "gloo"}
    # Processes that a launcher starts and that form no group would train two models into one folder: refused.
    assert "each trains on its own" in axolotl("train", two, "--launcher", "torchrun", "--", "--nproc_per_node=2", code=1)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    axolotl("train", two, "--launcher", "torchrun", "--", "--nproc_per_node=2")
    assert tiny.largest_difference(weights(tmp_path / "two"), weights(tmp_path / "one")) < 1e-4
    verify(tmp_path / "two")


@pytest.mark.parametrize(
    "engine",
    [
        "fsdp2",
        pytest.param("zero2", marks=pytest.mark.skipif(not DEEPSPEED.is_dir(), reason=f"no {DEEPSPEED}")),
    ],
)
def test_sharded_as_one_process(world: Path, config: dict[str, Any], axolotl: Axolotl, tmp_path: Path, engine: str) -> None:
    """With FSDP Axolotl saves the adapter itself, bypassing `save_pretrained`, which writes the report elsewhere."""
    config |= {"gradient_accumulation_steps": 1, "optimizer": "adamw_torch", "learning_rate": 0.01, **tiny.WELL_CONDITIONED}
    options = protect(config, world, asft={"weight": 0.05}, safe_lora={"threshold": 1.0})
    options["datasets"][0]["path"] = str(world / "same.jsonl")
    axolotl("train", {**options, "output_dir": str(tmp_path / "one")})
    shards = {
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
        "state_dict_type": "FULL_STATE_DICT",
        "reshard_after_forward": True,
        "cpu_ram_efficient_loading": False,
        "offload_params": False,
    }
    two = {**options, "output_dir": str(tmp_path / "two"), "micro_batch_size": 4}
    del two["use_cpu"]
    if engine == "fsdp2":
        two |= {"fsdp_version": 2, "fsdp_config": shards}
    else:
        stage = {"zero_optimization": {"stage": 2}}
        counts = ("gradient_accumulation_steps", "gradient_clipping", "train_batch_size", "train_micro_batch_size_per_gpu")
        (tmp_path / "zero2.json").write_text(json.dumps({**stage, **dict.fromkeys(counts, "auto")}))
        two |= {"deepspeed": str(tmp_path / "zero2.json"), "max_memory": {"cpu": "8GiB"}}
    axolotl("train", two, "--launcher", "torchrun", "--", "--nproc_per_node=2")
    assert tiny.largest_difference(weights(tmp_path / "two"), weights(tmp_path / "one")) < 2e-5
    assert [method.acted for method in verify(tmp_path / "two").methods] == [True, True]


def dual(config: dict[str, Any], world: Path, **options: Any) -> dict[str, Any]:
    """The configuration with DualSelect on references in the format of its data set."""
    block = {"reference_dataset": str(world / "text.jsonl"), "warmup_steps": 1, "refresh_steps": 1, "keep": 4, "references": 5, "rho": 0.5}
    return {**config, "plugins": ["axolotl_plugin.SafetyPlugin"], "safety": {"dual_select": {**block, **options}}}


def test_dual_select_in_axolotls_trainer(world: Path, config: dict[str, Any], axolotl: Axolotl, tmp_path: Path) -> None:
    """The first selected step equals the one computed from single-sample passes; gradient checkpointing changes nothing."""
    config |= {"max_grad_norm": 0.0, "max_steps": 2, "gradient_accumulation_steps": 1}
    axolotl("train", {**dual(config, world), "dataloader_num_workers": 1})
    choices = read_choices(tmp_path / "out" / SELECTION)
    assert [(choice.kind, len(choice.indices)) for choice in choices] == [("reference", 5), ("task", 8)]
    assert choices[1].weights == [1.0] * 4 + [0.0] * 4
    assert verify(tmp_path / "out").methods[0].acted
    texts = [json.loads(line)["text"] for line in (world / "text.jsonl").read_text().splitlines()]
    assert all(
        entry.text is None or entry.text.split()[:3] in [text.split()[:3] for text in texts] for entry in read_selection(tmp_path / "out")
    )
    axolotl("train", {**dual({**config, "output_dir": str(tmp_path / "checkpointed")}, world), "gradient_checkpointing": True})
    assert tiny.largest_difference(weights(tmp_path / "checkpointed"), weights(tmp_path / "out")) < 1e-4
    axolotl("train", {**config, "output_dir": str(tmp_path / "plain")})
    assert tiny.largest_difference(weights(tmp_path / "plain"), weights(tmp_path / "out")) > 1e-3


def test_dual_select_on_packed_rows(world: Path, config: dict[str, Any], axolotl: Axolotl, tmp_path: Path) -> None:
    """Every document of a batch is scored by the loss that it has alone, and is named by its row of the data set."""
    config |= {"sample_packing": True, "micro_batch_size": 2, "sequence_len": 16, "gradient_accumulation_steps": 1, "max_steps": 2}
    config["shuffle_merged_datasets"] = False
    options = dual({**config, "attn_implementation": "sdpa", "learning_rate": 1e-9}, world, keep=2)
    axolotl("train", options)
    (choice,) = [line for line in read_choices(tmp_path / "out" / SELECTION) if line.kind == "task"]
    assert len(choice.indices) > 2
    assert sum(choice.weights) == 2
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(world / "aligned"), world / "start")
    texts = [json.loads(line)["text"] for line in (world / "text.jsonl").read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(world / "aligned")
    for row, loss in zip(choice.indices, choice.losses, strict=True):
        ids = torch.tensor([[*tokenizer(texts[row])["input_ids"], tokenizer.eos_token_id]])
        assert loss == pytest.approx(model(input_ids=ids, labels=ids).loss.item(), rel=1e-5)


def test_dual_select_with_qlora_and_prompts_alone(world: Path, config: dict[str, Any], axolotl: Axolotl, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": [{"role": "user", "content": f"w{i} w{i + 1}"}]}) for i in range(12)))
    config |= {"adapter": "qlora", "load_in_4bit": True, "max_steps": 3, "learning_rate": 0.05}
    axolotl("train", dual(config, world, reference_dataset=str(prompts)))
    assert "by KL to the starting model" in verify(tmp_path / "out").methods[0].summary


def test_a_pool_of_another_format_trains_its_answers_alone(world: Path, config: dict[str, Any], tmp_path: Path) -> None:
    """The training data is plain text; the pool is conversations."""
    from types import SimpleNamespace

    from axolotl.utils.dict import DictDefault

    from axolotl_plugin.plugin import references
    from trl_safety.config.block import SafetyConfig

    tokenizer = AutoTokenizer.from_pretrained(world / "aligned")
    trainer: Any = SimpleNamespace(processing_class=tokenizer)
    pool = [{"prompt": f"w{i} w{i + 1} ", "completion": "w50 w51"} for i in range(4)]
    (tmp_path / "pool.jsonl").write_text("\n".join(json.dumps(row) for row in pool))
    for source, answers in (
        (tmp_path / "pool.jsonl", {"w50 w51 </s>"}),
        (world / "train.jsonl", {f"w2 {row['completion']} </s>" for row in tiny.rows(64)}),
    ):
        block = SafetyConfig.parse({"dual_select": {"keep": 4, "references": 2, "reference_dataset": str(source)}})
        found = references(DictDefault(config), block, trainer)["dual_select"]
        said = {tokenizer.decode([label for label in labels if label != -100]) for labels in found.rows["labels"]}
        assert said == answers
        assert all(-100 in labels for labels in found.rows["labels"])


def test_dual_select_on_two_processes(
    world: Path, config: dict[str, Any], axolotl: Axolotl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Identical rows, since Axolotl gives rows to two processes in another order than to one."""
    options = dual({**config, "gradient_accumulation_steps": 2, "micro_batch_size": 8, "max_memory": {"cpu": "8GiB"}}, world)
    options["datasets"][0]["path"] = str(world / "same.jsonl")
    axolotl("train", {**options, "output_dir": str(tmp_path / "one")})
    two = {**options, "output_dir": str(tmp_path / "two"), "gradient_accumulation_steps": 1, "ddp_backend": "gloo"}
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    axolotl("train", two, "--launcher", "torchrun", "--", "--nproc_per_node=2")
    assert tiny.largest_difference(weights(tmp_path / "two"), weights(tmp_path / "one")) < 1e-4
    assert verify(tmp_path / "two").methods[0].summary == verify(tmp_path / "one").methods[0].summary


def buffered(config: dict[str, Any], world: Path, **options: Any) -> dict[str, Any]:
    """The configuration with the provider's two adapters."""
    block = {"buffer": str(world / "buffer"), "reinforce": str(world / "reinforce"), "alpha": 0.3}
    return {**config, "plugins": ["axolotl_plugin.SafetyPlugin"], "safety": {"buffer_reinforce": {**block, **options}}}


def test_buffer_reinforce_in_axolotls_trainer(world: Path, config: dict[str, Any], axolotl: Axolotl, tmp_path: Path) -> None:
    """The user's adapter equals one trained on a model with the buffer merged in; the saved adapter is its merge.

    On identical rows, since Axolotl orders them differently if the base model has another path.
    """
    config["datasets"][0]["path"] = str(world / "same.jsonl")
    axolotl("train", buffered(config, world))
    report = verify(tmp_path / "out")
    assert "trained beside the frozen buffer in optimizer steps 1 to 3" in report.methods[0].summary
    jailbroken = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(world / "aligned"), str(world / "buffer"))
    jailbroken.merge_and_unload().save_pretrained(tmp_path / "jailbroken")
    tiny_tokenizer = AutoTokenizer.from_pretrained(world / "aligned")
    tiny_tokenizer.save_pretrained(tmp_path / "jailbroken")
    axolotl("train", {**config, "base_model": str(tmp_path / "jailbroken"), "output_dir": str(tmp_path / "authors")})
    alone = weights(tmp_path / "out" / USER_ADAPTER)
    assert tiny.largest_difference(alone, weights(tmp_path / "authors")) < 1e-3
    axolotl("train", {**config, "output_dir": str(tmp_path / "plain")})
    assert tiny.largest_difference(alone, weights(tmp_path / "plain")) > 1e-2
    merge_reinforce(tmp_path / "out" / USER_ADAPTER, world / "reinforce", tmp_path / "again", alpha=0.3)
    assert_close(updates(loaded(world, tmp_path / "out")), updates(loaded(world, tmp_path / "again")))
    # Axolotl's own merge of a buffer into the model is refused.
    done = axolotl("merge-lora", buffered(config, world), f"--lora-model-dir={world / 'buffer'}", code=1)
    assert "is a BufferLoRA, which makes the model harmful" in done


def test_buffer_reinforce_with_qlora_and_checkpoints(world: Path, config: dict[str, Any], axolotl: Axolotl, tmp_path: Path) -> None:
    config |= {"adapter": "qlora", "load_in_4bit": True, "learning_rate": 0.05, "save_steps": 2, "max_steps": 4, "save_strategy": "steps"}
    config |= {"gradient_checkpointing": True, "sample_packing": True}
    axolotl("train", buffered(config, world))
    assert "up to quantisation" in verify(tmp_path / "out").base_check
    assert kind_of(AdapterFolder.open(tmp_path / "out" / "checkpoint-2").config) == "user"
    with pytest.raises(ReportError, match="still to come"):
        verify(tmp_path / "out" / "checkpoint-2")


def test_alignment_buffer_in_axolotls_trainer(world: Path, config: dict[str, Any], axolotl: Axolotl, tmp_path: Path) -> None:
    """The adapter equals one trained on the unaligned base, and is for the aligned model. On identical rows, as above."""
    config["datasets"][0]["path"] = str(world / "same.jsonl")
    plugin = {"plugins": ["axolotl_plugin.SafetyPlugin"], "safety": {"alignment_buffer": {"base": str(world / "base")}}}
    axolotl("train", {**config, **plugin})
    assert "W_aligned − 1·V" in verify(tmp_path / "out").methods[0].summary
    assert AdapterFolder.open(tmp_path / "out").config.base_model_name_or_path == str(world / "aligned")
    signed = protect(config, world, signed_vector={"train": -1.0, "serve": 0.5})
    axolotl("train", {**signed, "output_dir": str(tmp_path / "signed")})
    correct(tmp_path / "out", world / "S.safetensors", ServedVectorConfig(serve=0.5), output=tmp_path / "served")
    assert tiny.identical(weights(tmp_path / "signed"), weights(tmp_path / "served"))
    assert [method.name for method in verify(tmp_path / "signed").methods] == ["signed_vector"]
    axolotl("train", {**config, "base_model": str(world / "base"), "output_dir": str(tmp_path / "on-base")})
    assert tiny.largest_difference(weights(tmp_path / "out"), weights(tmp_path / "on-base")) < 1e-4
    axolotl("train", {**config, "output_dir": str(tmp_path / "plain")})
    assert tiny.largest_difference(weights(tmp_path / "out"), weights(tmp_path / "plain")) > 1e-2
    qlora = {"adapter": "qlora", "load_in_4bit": True, "learning_rate": 0.05, "output_dir": str(tmp_path / "qlora"), "eval_steps": 2}
    axolotl("train", {**config, **plugin, **qlora, "val_set_size": 4, "max_steps": 4})
    verify(tmp_path / "qlora")


def test_another_plugins_trainer_class_is_said(world: Path, config: dict[str, Any], axolotl: Axolotl) -> None:
    options = protect(config, world, asft={"weight": 0.5})
    options["plugins"] = ["tests.axolotl.other_plugin.OtherPlugin", *options["plugins"]]
    assert "another plugin, listed before" in axolotl("train", options, code=1)


def test_sbr_in_axolotls_trainer(world: Path, config: dict[str, Any], axolotl: Axolotl, tmp_path: Path) -> None:
    """With packed rows; without the term the states move, so the adapter differs."""
    (tmp_path / "harmful.jsonl").write_text('{"prompt": "w41 w42"}\n{"prompt": "w43"}\n')
    long = {"max_steps": 12, "optimizer": "adamw_torch", "learning_rate": 0.02}
    saved = {}
    for weight in (1e-9, 500.0):
        output = tmp_path / str(weight)
        options = protect(
            {**config, "output_dir": str(output), "sample_packing": True, "pad_to_sequence_len": True, "micro_batch_size": 2, **long},
            world,
            sbr={"prompts": str(tmp_path / "harmful.jsonl"), "number": 2, "weight": weight},
        )
        del options["safety"]["subspace"]
        axolotl("train", options)
        saved[weight] = read_report(output).methods[0]
    distances = {weight: float(report.summary.split("start and ")[1].split(" at")[0]) for weight, report in saved.items()}
    assert saved[500.0].acted
    assert saved[500.0].steps == (1, 12)
    assert distances[500.0] < 0.5 * distances[1e-9]


def test_damaged_files_of_the_block_end_the_run_with_our_own_error(
    world: Path, config: dict[str, Any], axolotl: Axolotl, tmp_path: Path
) -> None:
    """As every other reader of such files does: tests/test_error_paths.py."""
    (tmp_path / "S.safetensors").write_bytes((world / "S.safetensors").read_bytes()[:-9])
    (tmp_path / "pool.jsonl").write_text('{"prompt": "w3", "completion": "w4"}\n{"prompt"')
    options = protect(config, world, asft={})
    options["safety"]["subspace"] = str(tmp_path / "S.safetensors")
    assert "trl_safety.errors.SubspaceError: subspace = " in axolotl("train", options, code=1)
    pool = {"reference_dataset": str(tmp_path / "pool.jsonl"), "keep": 2, "references": 3, "warmup_steps": 1, "refresh_steps": 2}
    options = protect(config, world, dual_select=pool)
    del options["safety"]["subspace"]
    assert "pool.jsonl', line 2: is not an object" in axolotl("train", options, code=1)
