"""Validation through Axolotl's own loader, in process: what is refused, and every example."""

import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from axolotl.cli.config import load_cfg
from axolotl.integrations.base import PluginManager
from axolotl.utils.dict import DictDefault

from axolotl_plugin.cli import resolve
from axolotl_plugin.plugin import loaded_by_axolotl, safety_of
from axolotl_plugin.rules import REFUSED, table
from tests.axolotl.conftest import CPU, Axolotl, protect
from trl_safety.config.block import METHODS, SafetyConfig
from trl_safety.errors import ConfigurationError
from trl_safety.reports.report import verify

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = sorted((ROOT / "example_configs" / "axolotl").glob("*.yaml"))

WRONG = {
    "adapter": None,
    "peft_use_dora": True,
    "peft_init_lora_weights": "pissa",
    "lora_target_parameters": ["mlp.experts.down_proj"],
    "relora": True,
    "rl": "dpo",
    "fsdp_config": {"fsdp_version": 1},
    "fsdp_version": 2,
    "deepspeed": str(Path(__file__).parent / "zero3.json"),
    "context_parallel_size": 2,
    "trainer_cls": "some.Trainer",
    "save_safetensors": False,
    "lora_qkv_kernel": True,
    "sample_packing": True,
    "torch_compile": True,
    "streaming": True,
    "lora_modules_to_save": ["lm_head"],
    "load_in_8bit": True,
}


@pytest.fixture(autouse=True)
def _fresh_plugins() -> Any:
    """Axolotl's plugin manager is one for the process, and its validation sets variables for the engine that a configuration names."""
    PluginManager.get_instance().plugins.clear()
    environment = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(environment)
    PluginManager.get_instance().plugins.clear()


def validated(config: dict[str, Any]) -> Any:
    return load_cfg(DictDefault(config))


def test_the_block_survives_axolotls_validation(world: Path, config: dict[str, Any]) -> None:
    block = {"asft": {"weight": 0.25, "paper_lambda": True}, "csulora": {"lambda_partial": 3.0}, "skip_modules": ["down_proj"]}
    options = protect(config, world, **block)
    assert safety_of(validated(options)) == SafetyConfig.parse(options["safety"])


@pytest.mark.parametrize("rule", REFUSED, ids=lambda rule: rule.key.split(",")[0])
def test_every_rule_refuses_with_the_key_to_change(world: Path, config: dict[str, Any], rule: Any) -> None:
    key = next(key for key in rule.key.split(", ") if key in WRONG)
    if key == "fsdp_version":
        config["fsdp_config"] = {"reshard_after_forward": True}
    everything = set(rule.methods) == set(METHODS)
    wrong = WRONG[key] if key != "deepspeed" or everything else str(Path(__file__).parent / "zero2.json")
    options = protect({**config, key: wrong}, world, **{rule.methods[0]: {}, "safe_lora": {}})
    with pytest.raises(Exception, match="cannot act: ") as caught:
        validated(options)
    assert key in str(caught.value)
    if not everything:
        other = next(method for method in METHODS if method not in rule.methods)
        with pytest.raises(Exception) as raised:  # noqa: PT011  # Axolotl may have a complaint of its own
            validated({**protect({**config, key: wrong}, world, **{other: {}}), "base_model": "missing/model"})
        assert "cannot act" not in str(raised.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("safety"), "nothing would be protected"),
        (lambda c: c.update(safety={}), "nothing would be protected"),
        (lambda c: c.update(saftey=c.pop("safety")), "did you mean it by 'saftey'"),
        (lambda c: c["safety"].update(asft={"wieght": 1}), "did you mean 'weight'"),
        (lambda c: c["safety"].update(asft=None), "nothing behind it"),
        (lambda c: c["safety"].update(asf={}), "did you mean 'asft'"),
        (lambda c: c["safety"].update(safe_lora={}, csulora={}), "keep one of them"),
    ],
)
def test_wrong_blocks_are_errors(world: Path, config: dict[str, Any], change: Any, message: str) -> None:
    options = protect(config, world, asft={})
    change(options)
    with pytest.raises(Exception, match=message):
        validated(options)


@pytest.mark.skipif(loaded_by_axolotl(), reason="the short name works: test_entry_point.py")
def test_the_short_name_dies_in_axolotl_itself(world: Path, config: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="not enough values to unpack"):
        validated({**protect(config, world, asft={}), "plugins": ["safety"]})


def test_a_missing_trl_safety_cannot_be_swallowed(world: Path, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Axolotl catches an ImportError of the plugin's own import only; ours come from a hook."""
    import sys

    monkeypatch.setitem(sys.modules, "trl_safety.errors", None)
    with pytest.raises(ImportError):
        validated(protect(config, world, asft={}))


def test_the_documented_table_is_the_rules() -> None:
    assert table() in (ROOT / "example_configs" / "axolotl" / "README.md").read_text(encoding="utf-8")


def tiny_version(options: dict[str, Any], world: Path, tmp_path: Path) -> dict[str, Any]:
    """An example with its model, data and length swapped; all other keys stay."""
    options["base_model"] = str(world / "aligned")
    options["datasets"][0]["path"] = str(world / "train.jsonl")
    options |= {"output_dir": str(tmp_path / "out"), "dataset_prepared_path": str(tmp_path / "prepared"), "max_steps": 2, "val_set_size": 0}
    options |= {"sequence_len": 64, "special_tokens": {"pad_token": "<pad>"}, "logging_steps": 1, **CPU}
    if "dual_select" in options["safety"]:
        options["safety"]["dual_select"] |= {"reference_dataset": str(world / "train.jsonl"), "references": 4, "warmup_steps": 1}
        return options
    if "alignment_buffer" in options["safety"]:
        options["safety"]["alignment_buffer"] |= {"base": str(world / "base")}
        return options
    if "buffer_reinforce" in options["safety"]:
        options["safety"]["buffer_reinforce"] |= {"buffer": str(world / "buffer"), "reinforce": str(world / "reinforce")}
        return options
    source = options["safety"]["subspace"]
    if isinstance(source, dict):
        source |= {"base": str(world / "base"), "aligned": str(world / "aligned"), "rank": 8}
    else:
        options["safety"]["subspace"] = str(world / "S.safetensors")
    if "safe_lora" in options["safety"]:
        options["safety"]["safe_lora"] = {**options["safety"]["safe_lora"], "layers": 99, "threshold": None}
    return options


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_is_valid_and_runs(path: Path, world: Path, tmp_path: Path, axolotl: Axolotl) -> None:
    text = yaml.safe_load(path.read_text())
    validated(
        {
            **text,
            "datasets": [{**text["datasets"][0], "path": str(world / "train.jsonl")}],
            "base_model": str(world / "aligned"),
            "output_dir": str(tmp_path / "validated"),
            **CPU,
            "bf16": False,
        }
    )
    axolotl("train", tiny_version(text, world, tmp_path))
    report = verify(tmp_path / "out")
    assert [method.name for method in report.methods] == list(SafetyConfig.parse(text["safety"]).methods())
    assert all(method.acted for method in report.methods)


def test_every_method_has_an_example() -> None:
    assert {path.stem for path in EXAMPLES} >= set(METHODS)


def test_own_commands_are_there(axolotl: Axolotl, world: Path, tmp_path: Path) -> None:
    import subprocess
    import sys

    binary = Path(sys.executable).parent / "axolotl"
    out = tmp_path / "S.safetensors"
    line = [
        str(binary),
        "safety",
        "subspace",
        str(world / "base"),
        str(world / "aligned"),
        "-o",
        str(out),
        "--target-modules",
        "q_proj",
        "--rank",
        "4",
    ]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert out.is_file()
    verified = subprocess.run([str(binary), "safety", "verify", str(tmp_path)], capture_output=True, text=True, check=False)
    assert verified.returncode == 1
    (tmp_path / "c.yaml").write_text("base_model: x\n")
    with pytest.raises(ConfigurationError, match="nothing would be protected"):
        resolve(tmp_path / "c.yaml")
