"""Every shipped YAML is found, and run with its model and data swapped for tiny ones."""

import json
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from tests import tiny
from tests.training import preference, providers
from trl_safety import AlignmentSubspace
from trl_safety.adapters.record import AdapterRecord
from trl_safety.cli.app import app
from trl_safety.config.block import METHODS, SafetyConfig
from trl_safety.reports.report import verify

EXAMPLES = sorted((Path(__file__).parent.parent / "example_configs" / "trl").glob("*.yaml"))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("pair")
    config = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    for name in ("base", "aligned"):
        LlamaForCausalLM(config).save_pretrained(folder / name)
        tiny.tokenizer().save_pretrained(folder / name)
    (folder / "train.jsonl").write_text("\n".join(json.dumps(row) for row in tiny.rows(16)))
    AlignmentSubspace.from_pair(folder / "base", folder / "aligned", target_modules="all-linear", rank=8, progress=False).save(
        folder / "S.safetensors"
    )
    return providers.make(folder, base=str(folder / "aligned"))


def tiny_version(config: dict[str, Any], pair: Path, output: Path) -> dict[str, Any]:
    """The example with model, data, subspace source and length replaced; all other keys stay."""
    config["model_name_or_path"] = str(pair / "aligned")
    config["datasets"][0]["data_files"] = str(pair / "train.jsonl")
    config |= {
        "output_dir": str(output),
        "max_steps": 2,
        "use_cpu": True,
        "bf16": False,
        "dtype": "float32",
        "report_to": "none",
    }
    if "dual_select" in config["safety"]:
        config["safety"]["dual_select"] |= {"reference_dataset": str(pair / "train.jsonl"), "references": 4, "warmup_steps": 1}
        return config
    if "sbr" in config["safety"]:
        (pair / "prompts.jsonl").write_text('{"prompt": "w3 w4"}\n{"prompt": "w5"}\n')
        config["safety"]["sbr"] |= {"prompts": str(pair / "prompts.jsonl"), "number": 2}
        return config
    if "alignment_buffer" in config["safety"]:
        config["safety"]["alignment_buffer"] |= {"base": str(pair / "base")}
        (pair / "prompts.jsonl").write_text('{"prompt": "w3 w4"}\n{"prompt": "w5"}\n')
        config["safety"]["eval"] |= {"harmful": str(pair / "prompts.jsonl"), "benign": str(pair / "prompts.jsonl"), "stop_above": None}
        return config
    if "buffer_reinforce" in config["safety"]:
        config["safety"]["buffer_reinforce"] |= {"buffer": str(pair / "buffer"), "reinforce": str(pair / "reinforce")}
        return config
    subspace = config["safety"]["subspace"]
    if isinstance(subspace, dict):
        subspace |= {"base": str(pair / "base"), "aligned": str(pair / "aligned"), "rank": 8}
    else:
        config["safety"]["subspace"] = str(pair / "S.safetensors")
    if "safe_lora" in config["safety"]:
        # Random weights have cosines of their own; every layer is to be corrected here.
        config["safety"]["safe_lora"] = {**config["safety"]["safe_lora"], "layers": 99, "threshold": None}
    return config


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(path: Path, pair: Path, tmp_path: Path) -> None:
    config = yaml.safe_load(path.read_text())
    methods = list(SafetyConfig.parse(config["safety"]).methods())
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tiny_version(config, pair, tmp_path / "out")))
    result = CliRunner().invoke(app, ["sft", "--config", str(tmp_path / "config.yaml")])
    assert result.exit_code == 0, (result.output, result.exception)
    report = verify(tmp_path / "out")
    assert [method.name for method in report.methods] == methods
    assert all(method.acted for method in report.methods)


def test_the_providers_examples_run(pair: Path, tmp_path: Path) -> None:
    for command in ("buffer", "reinforce"):
        config = yaml.safe_load((EXAMPLES[0].parent.parent / "provider" / f"{command}.yaml").read_text())
        config = tiny_version({**config, "safety": {"dual_select": {}}}, pair, tmp_path / command)
        del config["safety"]
        if command == "reinforce":
            config["buffer"] = str(tmp_path / "buffer")
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        result = CliRunner().invoke(app, [command, "--config", str(tmp_path / "config.yaml")])
        assert result.exit_code == 0, (result.output, result.exception)
        assert AdapterRecord.read(tmp_path / command).kind == command
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**config, "safety": {"asft": {}}}))
    result = CliRunner().invoke(app, ["reinforce", "--config", str(tmp_path / "config.yaml")])
    assert result.exit_code == 1
    assert "safety: unknown key" in result.output


@pytest.mark.parametrize("kind", preference.KINDS)
def test_the_scripts_of_the_other_trainers_run(kind: str, pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preference.rows(kind, 16).to_json(str(tmp_path / "rows.jsonl"))
    (tmp_path / "safety.yaml").write_text(
        yaml.safe_dump({"subspace": str(pair / "S.safetensors"), "asft": {}, "safe_lora": {"layers": 99}})
    )
    options = {
        "model_name_or_path": pair / "aligned",
        "dataset_name": tmp_path / "rows.jsonl",
        "output_dir": tmp_path / "out",
        "safety": tmp_path / "safety.yaml",
        "lora_target_modules": "all-linear",
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "report_to": "none",
        "bf16": False,
        **({"num_generations": 2, "max_completion_length": 4} if kind == "grpo" else {}),
        **({"train_sampling_strategy": "sequential"} if kind == "kto" else {}),
    }
    line = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", [f"{kind}.py", "--use_peft", "--use_cpu", *line])
    runpy.run_path(str(EXAMPLES[0].parent / f"{kind}.py"), run_name="__main__")
    assert [(method.name, method.acted) for method in verify(tmp_path / "out").methods] == [("asft", True), ("safe_lora", True)]


def test_every_method_has_an_example() -> None:
    assert {path.stem for path in EXAMPLES} >= set(METHODS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("safety"), "safety is missing"),
        (lambda c: c.update(saftey=c.pop("safety")), "saftey: unknown key, did you mean 'safety'"),
        (lambda c: c.update(use_peft=False), "use_peft = False"),
        (lambda c: c["safety"]["asft"].update(wait=1), "wait = 1: unknown option"),
        (lambda c: c.pop("datasets"), "name the training data"),
    ],
)
def test_a_run_that_would_be_unprotected_is_refused(pair: Path, tmp_path: Path, change: Any, message: str) -> None:
    config = tiny_version(yaml.safe_load((EXAMPLES[0].parent / "asft.yaml").read_text()), pair, tmp_path / "out")
    change(config)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    result = CliRunner().invoke(app, ["sft", "--config", str(tmp_path / "config.yaml")])
    assert result.exit_code == 1
    assert message in result.output
    assert not (tmp_path / "out").exists()


def test_options_on_the_command_line_override(pair: Path, tmp_path: Path) -> None:
    config = tiny_version(yaml.safe_load((EXAMPLES[0].parent / "asft.yaml").read_text()), pair, tmp_path / "out")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    block = json.dumps({"subspace": str(pair / "S.safetensors"), "csulora": {}})
    result = CliRunner().invoke(app, ["sft", "--config", str(tmp_path / "config.yaml"), "--max_steps", "1", "--safety", block])
    assert result.exit_code == 0, (result.output, result.exception)
    assert [method.name for method in verify(tmp_path / "out").methods] == ["csulora"]
    shutil.rmtree(tmp_path / "out")
