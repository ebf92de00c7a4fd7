"""V from a safety adapter: against the dense update, what it says about itself, what is refused, and the methods that read it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner

from tests import tiny
from tests.training import providers
from trl_safety import AlignmentSubspace, CsuloraConfig, SafeLoraConfig, ServedVectorConfig, correct, inspect_adapter
from trl_safety.adapters.folder import AdapterFolder
from trl_safety.cli.app import app
from trl_safety.corrections.alignment_vector_files import write_alignment_adapter
from trl_safety.errors import AdapterError, CheckpointError, ConfigurationError, SafetyError, SubspaceError
from trl_safety.evaluation.run_page import write_run_page
from trl_safety.reports.report import verify

MODEL = str(tiny.DATA / "gqa-aligned")
EVERYWHERE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def safety_adapter(folder: Path, *, model: Any = None, seed: int = 7, **options: Any) -> Path:
    """A LoRA with a random update, as if it had been trained to refuse."""
    torch.manual_seed(seed)
    given = {"base_model_name_or_path": MODEL, "target_modules": EVERYWHERE, **options}
    get_peft_model(model or tiny.model(), tiny.lora(**given)).save_pretrained(folder)
    return folder


def updates(folder: Path) -> dict[str, torch.Tensor]:
    return {name: f.scaling * f.B.double() @ f.A.double() for name, f in AdapterFolder.open(folder).factors.items()}


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return " ".join(result.output.split())


@pytest.fixture(scope="module")
def refusing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter on every linear layer, with a scaling of its own, and its subspace as a file."""
    folder = tmp_path_factory.mktemp("refusing")
    safety_adapter(folder / "adapter", r=3, lora_alpha=5, use_rslora=True)
    AlignmentSubspace.from_adapter(MODEL, folder / "adapter").save(folder / "V.safetensors")
    return folder


def test_against_the_dense_update(refusing: Path) -> None:
    built, dense = AlignmentSubspace.load(refusing / "V.safetensors"), updates(refusing / "adapter")
    assert built.layers.keys() == dense.keys()
    weights = tiny.model().state_dict()
    for name, layer in built.layers.items():
        U, S, Z = (part.double() for part in layer.factors())
        assert layer.rank == 3
        torch.testing.assert_close(U @ torch.diag(S) @ Z.mT, dense[name], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(S, torch.linalg.svdvals(dense[name])[:3], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(U.mT @ U, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-6)
        assert layer.frobenius_norm == pytest.approx(float(dense[name].norm()), rel=1e-6)
        assert layer.error_bound == 0
        # The model to fine-tune is recognised as the aligned one, and W − V as its base.
        assert layer.difference(weights[f"{name}.weight"])[0] < 1e-7
        assert layer.difference(weights[f"{name}.weight"].double() - dense[name])[1] < 1e-6
        assert layer.difference(weights[f"{name}.weight"])[1] > 1e-4
    cut = AlignmentSubspace.from_adapter(MODEL, refusing / "adapter", rank=2)
    for name, layer in cut.layers.items():
        third = torch.linalg.svdvals(dense[name])[2]
        assert layer.error_bound == pytest.approx(float(third**2 / dense[name].norm()), rel=1e-5)
        assert layer.frobenius_norm == built.layers[name].frobenius_norm
    assert cut.identity != built.identity
    assert AlignmentSubspace.from_adapter(MODEL, refusing / "adapter").identity == built.identity


def test_the_artifact_says_what_it_is(refusing: Path, tmp_path: Path) -> None:
    output = run("subspace", MODEL, "--from-adapter", refusing / "adapter", "-o", tmp_path / "V.safetensors")
    assert f"V is the update of the safety adapter '{refusing / 'adapter'}' on '{MODEL}'" in output
    assert "21 layers, rank 3 to 3" in output
    built = AlignmentSubspace.load(tmp_path / "V.safetensors")
    assert built.provenance.adapter == str(refusing / "adapter")
    assert (built.provenance.base, built.provenance.aligned) == (None, MODEL)
    assert "the update of the safety adapter" in repr(built)
    built.save_pretrained(tmp_path / "folder")
    assert "that was trained to refuse changes" in (tmp_path / "folder" / "README.md").read_text()
    # γ·V as an adapter of its own is the safety adapter again.
    write_alignment_adapter(built, tmp_path / "again")
    for name, update in updates(tmp_path / "again").items():
        torch.testing.assert_close(update, updates(refusing / "adapter")[name], rtol=1e-4, atol=1e-6)
    assert "inside" in run("inspect", tiny.DATA / "gqa-adapter", "-s", tmp_path / "V.safetensors")
    assert "the update of" in inspect_adapter(tiny.DATA / "gqa-adapter", built).subspace


def test_in_training_and_in_the_report(refusing: Path, tmp_path: Path) -> None:
    """AsFT's penalty and both ends of the signed vector, live; the run is recognised, resumed on its report and shown."""
    safety = {
        "subspace": str(refusing / "V.safetensors"),
        "asft": {"weight": 0.1},
        "signed_vector": {"train": -0.5, "serve": 1.0, "how": "low_rank"},
    }
    trainer = tiny.trainer(tmp_path, safety=safety)
    trainer.train()
    trainer.save_model()
    report = verify(tmp_path)
    assert [method.acted for method in report.methods] == [True, True]
    assert report.base_check.startswith("weights match")
    assert report.subspace is not None
    assert report.subspace["adapter"] == str(refusing / "adapter")
    assert "the update of the safety adapter `" in (tmp_path / "README.md").read_text()
    write_run_page(tmp_path, tmp_path / "page.html")
    assert "the update of the safety adapter" in (tmp_path / "page.html").read_text()
    # What is served is the trained update plus V, against the dense sum.
    whole, dense = updates(tmp_path), updates(refusing / "adapter")
    fresh = tiny.trainer(tmp_path / "b", safety={**safety, "signed_vector": {"train": -0.5, "how": "low_rank"}})
    fresh.train()
    fresh.save_model()
    for name, update in updates(tmp_path / "b").items():
        torch.testing.assert_close(whole[name], update + dense[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [SafeLoraConfig(threshold=1.0), CsuloraConfig(), ServedVectorConfig(serve=0.5), SafeLoraConfig(threshold=1.0, operator="orthogonal")],
    ids=["safe_lora", "csulora", "signed_vector", "orthogonal"],
)
def test_corrections_of_folders(refusing: Path, tmp_path: Path, config: Any) -> None:
    report = correct(tiny.DATA / "gqa-adapter", refusing / "V.safetensors", config, output=tmp_path / "out")
    assert report.protected
    assert report.subspace is not None
    assert report.subspace["adapter"] is not None
    before, after, V = updates(tiny.DATA / "gqa-adapter"), updates(tmp_path / "out"), updates(refusing / "adapter")
    for name, update in before.items():
        left, _, right = (part.double() for part in AlignmentSubspace.load(refusing / "V.safetensors").layers[name].factors())
        if isinstance(config, ServedVectorConfig):
            expected = update + 0.5 * V[name]
        elif isinstance(config, SafeLoraConfig):
            operator = V[name] @ V[name].mT / V[name].norm() if config.operator == "scaled" else left @ left.mT
            expected = operator @ update
        else:
            inside = left @ left.mT @ update @ right @ right.mT
            torch.testing.assert_close(left @ left.mT @ after[name] @ right @ right.mT, inside, rtol=1e-4, atol=1e-6)
            continue
        torch.testing.assert_close(after[name], expected, rtol=1e-4, atol=1e-6)


def test_fewer_layers_than_the_users_adapter(tmp_path: Path) -> None:
    few = AlignmentSubspace.from_adapter(MODEL, safety_adapter(tmp_path / "few", target_modules=["q_proj", "v_proj"]))
    blocks: list[dict[str, Any]] = [{"asft": {}}, {"signed_vector": {"train": -1.0, "how": "low_rank"}}, {"safe_lora": {"threshold": 1.0}}]
    for block in blocks:
        with pytest.raises(SubspaceError, match=r"3 of 9 adapted layers .*layers\.0\.mlp\.down_proj.*few.*list them in skip_modules"):
            tiny.trainer(tmp_path / "out", safety=block, subspace=few)
    with pytest.raises(SubspaceError, match="list them in skip_modules"):
        correct(tiny.DATA / "gqa-adapter", few, ServedVectorConfig(serve=1.0), output=tmp_path / "corrected")
    trainer = tiny.trainer(
        tmp_path / "out",
        subspace=few,
        safety={"asft": {}, "signed_vector": {"train": -1.0, "serve": 0.5, "how": "low_rank"}, "skip_modules": ["down_proj"]},
        max_steps=1,
    )
    trainer.train()
    trainer.save_model()
    assert len(verify(tmp_path / "out").skipped) == 3
    with pytest.raises(ConfigurationError, match="how = 'weights': loads the unaligned model's checkpoint, and the update of the safety"):
        tiny.trainer(
            tmp_path / "out", subspace=few, safety={"signed_vector": {"train": -1.0}}, peft_config=tiny.lora(target_modules=["q_proj"])
        )


def test_a_transposed_weight_and_a_tied_head(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=1, n_head=2))
    model.save_pretrained(tmp_path / "gpt2")
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    config = LoraConfig(r=2, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    built, dense = AlignmentSubspace.from_adapter(tmp_path / "gpt2", tmp_path / "adapter"), updates(tmp_path / "adapter")
    for name, layer in built.layers.items():
        assert layer.transposed
        assert layer.difference(weights[f"{name}.weight"].double() - dense[name].mT)[1] < 1e-6
        assert layer.difference(weights[f"{name}.weight"])[0] < 1e-7


def test_in_4_bits(tmp_path: Path) -> None:
    """The quantised model is recognised by what is stored in full precision."""
    from transformers import AutoModelForCausalLM

    model = tiny.wide(tmp_path / "model")
    folder = safety_adapter(tmp_path / "adapter", model=AutoModelForCausalLM.from_pretrained(model), base_model_name_or_path=model)
    built = AlignmentSubspace.from_adapter(model, folder)
    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(model, quantization_config=options, device_map={"": "cpu"})
    trainer = tiny.trainer(tmp_path / "out", base=base, safety={"asft": {}}, subspace=built, max_steps=1)
    trainer.train()
    trainer.save_model()
    assert "up to quantisation" in verify(tmp_path / "out").base_check


def _zero(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({name: value * ("lora_A" in name) for name, value in tensors.items()}, folder / "adapter_model.safetensors")


def _no_number(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    next(iter(tensors.values())).view(-1)[0] = torch.nan
    save_file(tensors, folder / "adapter_model.safetensors")


def test_refused_with_the_reason(refusing: Path, tmp_path: Path) -> None:
    providers.make(tmp_path)
    correct(tiny.DATA / "gqa-adapter", refusing / "V.safetensors", ServedVectorConfig(serve=0.5), output=tmp_path / "corrected")
    for name, damage in (("zero", _zero), ("nan", _no_number)):
        shutil.copytree(refusing / "adapter", tmp_path / name)
        damage(tmp_path / name)
    safety_adapter(tmp_path / "head", modules_to_save=["lm_head"])
    safety_adapter(tmp_path / "elsewhere")
    tiny.rewrite_json(tmp_path / "elsewhere" / "adapter_config.json", base_model_name_or_path=str(tiny.DATA / "gqa-base"))
    cases: dict[str, tuple[type[SafetyError], str]] = {
        "buffer": (AdapterError, "is a BufferLoRA, which makes the model harmful.*V must point towards refusing"),
        "corrected": (AdapterError, "was corrected by signed_vector, so it was fine-tuned on a task"),
        "zero": (AdapterError, "its update is zero in every layer"),
        "nan": (AdapterError, "holds NaN or infinity"),
        "head": (AdapterError, "holds more than LoRA factors"),
        "elsewhere": (AdapterError, "gqa-base', whose layer .* differs from that of .*gqa-aligned"),
        "nothing": (AdapterError, "is neither a folder nor a Hub repository"),
    }
    for name, (error, message) in cases.items():
        with pytest.raises(error, match=message):
            AlignmentSubspace.from_adapter(MODEL, tmp_path / name)
    with pytest.raises(AdapterError, match="differs from that of"):
        AlignmentSubspace.from_adapter(tiny.DATA / "gqa-base", tmp_path / "reinforce")
    with pytest.raises(SafetyError, match=r"wraps layers that|name the model that it was trained on"):
        AlignmentSubspace.from_adapter(tiny.DATA / "mha-aligned", refusing / "adapter")
    assert AlignmentSubspace.from_adapter(MODEL, tmp_path / "reinforce").provenance.adapter == str(tmp_path / "reinforce")
    out = ["-o", tmp_path / "V.safetensors"]
    assert "ALIGNED is missing" in run("subspace", MODEL, *out, "--rank", 4, code=1)
    assert "--whole = 'True': is not used with --from-adapter" in run("subspace", MODEL, "--from-adapter", "x", "--whole", *out, code=1)
    assert "give exactly one of" in run(
        "subspace", MODEL, "--from-adapter", refusing / "adapter", "--rank", 1, "--tolerance", 0.1, *out, code=1
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The aligned model with its tokenizer, refusals and benign rows."""
    folder = tmp_path_factory.mktemp("vector")
    tiny.model().save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    refusals = [{"prompt": f"w{i} w{i + 1} ", "completion": "I cannot help with w2"} for i in range(40, 56)]
    (folder / "refusals.jsonl").write_text("\n".join(json.dumps(row) for row in refusals))
    chats = [{"prompt": row["prompt"], "completion": row["completion"]} for row in tiny.rows(16)]
    (folder / "benign.jsonl").write_text("\n".join(json.dumps(row) for row in chats))
    return folder


QUICK = ["--max_steps", 3, "--use_cpu", "--bf16", "false", "--dtype", "float32", "--report_to", "none", "--learning_rate", 0.02]


def command(world: Path, output: Path, *further: object, **changed: object) -> list[object]:
    given = {"refusals": world / "refusals.jsonl", "benign": world / "benign.jsonl", **changed}
    return ["vector", world / "model", *(x for k, v in given.items() for x in (f"--{k}", v)), "-o", output, *QUICK, *further]


def test_trained_on_the_users_own_model(world: Path, tmp_path: Path) -> None:
    output = run(*command(world, tmp_path / "V"))
    assert "21 layers; V is the update of the safety adapter" in output
    built = AlignmentSubspace.from_pretrained(tmp_path / "V")
    assert built.provenance.aligned == str(world / "model")
    dense = updates(tmp_path / "V" / "adapter")
    for name, layer in built.layers.items():
        U, S, Z = (part.double() for part in layer.factors())
        torch.testing.assert_close(U @ torch.diag(S) @ Z.mT, dense[name], rtol=1e-4, atol=1e-7)
    # V points towards the refusals: a small step along it raises their likelihood, a step against it lowers it.
    losses = [_loss(world, dense, step) for step in (-0.2, 0.0, 0.2)]
    assert losses[0] > losses[1] > losses[2]
    trainer = tiny.trainer(
        tmp_path / "out", base=tiny.model(str(world / "model")), safety={"subspace": str(tmp_path / "V"), "asft": {}}, max_steps=1
    )
    trainer.train()
    trainer.save_model()
    verify(tmp_path / "out")
    assert "already holds a subspace" in run(*command(world, tmp_path / "V"), code=1)
    providers.make(tmp_path, base=str(world / "model"))
    (tmp_path / "c.yaml").write_text("lora_target_modules: [q_proj]\nlora_r: 2\n")
    assert "3 layers" in run(*command(world, tmp_path / "W", "--config", tmp_path / "c.yaml", buffer=tmp_path / "buffer"))
    assert {layer.rank for layer in AlignmentSubspace.from_pretrained(tmp_path / "W").layers.values()} == {2}


def _loss(world: Path, V: dict[str, torch.Tensor], step: float) -> float:
    model, tokenizer = tiny.model(), tiny.tokenizer()
    for name, update in V.items():
        model.get_submodule(name).weight.data += (step * update).float()
    total = 0.0
    for line in (world / "refusals.jsonl").read_text().splitlines():
        row = json.loads(line)
        ids, begin = (tokenizer(text, return_tensors="pt")["input_ids"] for text in (row["prompt"] + row["completion"], row["prompt"]))
        labels = ids.clone()
        labels[:, : begin.shape[1]] = -100
        with torch.no_grad():
            total += float(model(ids, labels=labels).loss)
    return total


def test_a_vector_that_would_be_none_is_refused_before_training(world: Path, tmp_path: Path) -> None:
    swapped = {"refusals": world / "benign.jsonl", "benign": world / "refusals.jsonl"}
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "w3"}\n')
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": [{"role": r, "content": "w3"} for r in ("user", "assistant")]}))
    out = tmp_path / "V"
    cases: list[tuple[list[object], str]] = [
        (command(world, out, **swapped), "the two are swapped, and V would point away from refusing"),
        (command(world, out, benign=tmp_path / "prompts.jsonl"), "row 1: has no answer"),
        (command(world, out, benign=tmp_path / "chat.jsonl"), "some rows hold text and others messages"),
        (command(world, out, "--output_dir", "x"), "output_dir = 'x': `trl-safety vector` sets it to"),
        (command(world, out, "--dataset_name", "x"), "trains on refusals and benign rows alone"),
        (command(world, out, "--eval_strategy", "steps"), "there is no split to evaluate on"),
        (command(world, out, "--lora_rr", 3), "not used by the HfArgumentParser: ['--lora_rr', '3']"),
        (command(world, out, buffer=world), "has no adapter_config.json"),
        (["vector", "--max_steps", 1, *command(world, out)[1:]], "name the model first"),
        (["vector", "missing/model", *command(world, out)[2:]], "could not be fetched"),
    ]
    for line, message in cases:
        assert message in run(*line, code=1), message
    assert not out.exists()
    tiny.rewrite_json(shutil.copytree(world / "model", tmp_path / "q") / "config.json", quantization_config={"quant_method": "gptq"})
    with pytest.raises(CheckpointError, match="stored quantised"):
        AlignmentSubspace.from_adapter(tmp_path / "q", safety_adapter(tmp_path / "a"))
