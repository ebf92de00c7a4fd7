"""Validation through Axolotl's own loader, in process: what is refused, and every example."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from axolotl.cli.config import load_cfg
from axolotl.integrations.base import PluginManager
from axolotl.utils.dict import DictDefault

from axolotl_plugin.cli import resolve
from axolotl_plugin.plugin import loaded_by_axolotl, safety_of
from axolotl_plugin.rules import KEYS, axolotl_facts, check, refuse, table
from tests.axolotl.conftest import CPU, Axolotl, protect
from tests.test_error_paths import DAMAGES
from trl_safety.config.block import METHODS, SafetyConfig, options_class
from trl_safety.config.requirements import Fact, Facts, broken
from trl_safety.errors import AdapterError, ConfigurationError, SafetyError
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
    "torch_compile": True,
    "streaming": True,
    "lora_modules_to_save": ["lm_head"],
    "load_in_8bit": True,
}


@pytest.fixture(autouse=True)
def _fresh_plugins() -> Any:
    """Axolotl has one plugin manager per process, and its validation sets variables for the engine that a configuration names."""
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


MINIMAL: dict[str, dict[str, Any]] = {
    "alignment_buffer": {"how": "weights"},
    "buffer_reinforce": {"buffer": "buffer"},
    "sbr": {"prompts": "prompts.jsonl"},
    "signed_vector": {"train": -1.0},
}


def concerned(fact: str, value: Any) -> tuple[set[str], bool]:
    """The methods that a requirement stops at this value, with their defaults, and whether it is switched off instead."""
    block = {name: options_class(name)(**MINIMAL.get(name, {})) for name in METHODS}
    found = broken(block, Facts("axolotl", {fact: Fact(value, fact)}))
    return {name for violation in found for name in violation.methods}, any(v.requirement.switch_off == "always" for v in found)


@pytest.mark.parametrize("key", WRONG)
def test_every_rule_refuses_with_the_key_to_change(world: Path, config: dict[str, Any], key: str) -> None:
    if key == "fsdp_version":
        config["fsdp_config"] = {"reshard_after_forward": True}
    wrong = {**config, key: WRONG[key]}
    fact = next(fact for fact, keys in KEYS.items() if key in keys)
    value = axolotl_facts(DictDefault(wrong)).known[fact].value
    stopped, switched = concerned(fact, value)
    assert stopped
    for method in METHODS:
        written = protect(wrong, world, **{method: MINIMAL.get(method, {})})["safety"]
        if options_class(method)(**MINIMAL.get(method, {})).subspace_use == "none":
            del written["subspace"]
        block = SafetyConfig.parse(written)
        if method in stopped and not switched:
            with pytest.raises(SafetyError, match=f"{method} cannot act: ") as caught:
                refuse(DictDefault(wrong), block)
            assert key in str(caught.value)
        else:
            refuse(DictDefault(wrong), block)
    if not switched:
        with pytest.raises(Exception, match="cannot act: ") as caught:
            validated(protect(wrong, world, **{min(stopped): MINIMAL.get(min(stopped), {}), "safe_lora": {}}))
        assert key in str(caught.value)


def test_fused_kernels_are_switched_off_and_said(config: dict[str, Any]) -> None:
    cfg = DictDefault({**config, "lora_qkv_kernel": True, "lora_o_kernel": True, "lora_mlp_kernel": None})
    buffered, plain = (SafetyConfig.parse(block) for block in ({"buffer_reinforce": {"buffer": "b"}}, {"asft": {}}))
    assert check(cfg, plain, {"lora_qkv_kernel"}) == []
    assert cfg.lora_qkv_kernel is True
    (said,) = check(cfg, buffered, {"lora_qkv_kernel"})
    assert said.startswith("lora_qkv_kernel = True, lora_o_kernel = True was switched off: buffer_reinforce could not act")
    assert cfg.lora_qkv_kernel is False
    assert cfg.lora_o_kernel is False


def test_packed_rows_of_which_the_documents_see_each_other(config: dict[str, Any]) -> None:
    """Axolotl's validation tells; a packed batch of one row holds several documents."""
    block = SafetyConfig.parse({"dual_select": {"keep": 4}})
    packed = {**config, "sample_packing": True, "micro_batch_size": 1}
    with pytest.raises(
        ConfigurationError, match="sample_packing = True: dual_select cannot act: a sample that is cut anywhere, or attends"
    ):
        check(validated(packed), block, packed.keys())
    assert check(validated({**packed, "attn_implementation": "sdpa"}), block, packed.keys()) == []
    with pytest.raises(
        ConfigurationError, match="micro_batch_size = 1, gradient_accumulation_steps = 2: dual_select cannot act: every sample of 2"
    ):
        check(validated({**packed, "sample_packing": False}), block, packed.keys())


def test_all_violations_are_said_at_once(config: dict[str, Any]) -> None:
    cfg = DictDefault({**config, "peft_use_dora": True, "relora": True, "streaming": True})
    with pytest.raises(ConfigurationError) as raised:
        refuse(cfg, SafetyConfig.parse({"dual_select": {}}))
    lines = str(raised.value).splitlines()
    assert [line.split(" = ")[0] for line in lines] == ["peft_use_dora", "relora", "streaming"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("safety"), "nothing would be protected"),
        (lambda c: c.update(safety={}), "nothing would be protected"),
        (lambda c: c.update(saftey=c.pop("safety")), "is 'saftey' a misspelling"),
        (lambda c: c["safety"].update(asft={"wieght": 1}), "did you mean 'weight'"),
        (lambda c: c["safety"].update(asft=None), "asft is empty"),
        (lambda c: c["safety"].update(asf={}), "did you mean 'asft'"),
        (lambda c: c["safety"].update(safe_lora={}, csulora={}), "keep one of them"),
    ],
)
def test_wrong_blocks_are_errors(world: Path, config: dict[str, Any], change: Any, message: str) -> None:
    options = protect(config, world, asft={})
    change(options)
    with pytest.raises(Exception, match=message):
        validated(options)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_adapter_to_go_on_from(world: Path, config: dict[str, Any], tmp_path: Path, damage: Any) -> None:
    shutil.copytree(world / "start", tmp_path / "start")
    options = {**protect(config, world, asft={}), "lora_model_dir": str(tmp_path / "start")}
    assert safety_of(validated(options)).asft is not None
    damage(tmp_path / "start")
    with pytest.raises(AdapterError, match=r"lora_model_dir = '.*start': .*adapter"):
        validated(options)
    # Without a block it is Axolotl's own affair.
    del options["safety"], options["plugins"]
    validated(options)


def test_an_adapter_with_damaged_weights_to_go_on_from(world: Path, config: dict[str, Any], tmp_path: Path) -> None:
    shutil.copytree(world / "start", tmp_path / "start")
    weights = tmp_path / "start" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    options = {**protect(config, world, asft={}), "lora_model_dir": str(tmp_path / "start")}
    weights.write_bytes(whole[:-7])
    with pytest.raises(AdapterError, match=r"lora_model_dir = .*truncated or not a safetensors"):
        validated(options)
    weights.write_bytes(whole)
    options["lora_model_dir"] = "somebody/adapter"
    assert safety_of(validated(options)).asft is not None


@pytest.mark.skipif(loaded_by_axolotl(), reason="the short name works: test_entry_point.py")
def test_the_short_name_dies_in_axolotl_itself(world: Path, config: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="not enough values to unpack"):
        validated({**protect(config, world, asft={}), "plugins": ["safety"]})


def test_a_missing_trl_safety_cannot_be_swallowed(world: Path, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Axolotl catches only the ImportError of the plugin's own import; ours comes from a hook."""
    import sys

    monkeypatch.setitem(sys.modules, "trl_safety.errors", None)
    with pytest.raises(ImportError):
        validated(protect(config, world, asft={}))


def test_the_documented_table_is_the_rules() -> None:
    assert table() in (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")


def data_of(options: dict[str, Any]) -> str:
    """The tiny data of an example's kind."""
    return f"{options.get('rl', 'train')}.jsonl"


def tiny_version(options: dict[str, Any], world: Path, tmp_path: Path) -> dict[str, Any]:
    """An example with its model, data and length swapped; all other keys stay."""
    options["base_model"] = str(world / "aligned")
    options["datasets"][0]["path"] = str(world / data_of(options))
    options |= {"output_dir": str(tmp_path / "out"), "dataset_prepared_path": str(tmp_path / "prepared"), "max_steps": 2, "val_set_size": 0}
    options |= {"sequence_len": 64, "special_tokens": {"pad_token": "<pad>"}, "logging_steps": 1, **CPU}
    if "dual_select" in options["safety"]:
        options["safety"]["dual_select"] |= {"reference_dataset": str(world / "train.jsonl"), "references": 4, "warmup_steps": 1}
        return options
    if "sbr" in options["safety"]:
        (tmp_path / "prompts.jsonl").write_text('{"prompt": "w3 w4"}\n{"prompt": "w5"}\n')
        options["safety"]["sbr"] |= {"prompts": str(tmp_path / "prompts.jsonl"), "number": 2}
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
            "datasets": [{**text["datasets"][0], "path": str(world / data_of(text))}],
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
