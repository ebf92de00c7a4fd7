"""Axolotl 0.21 and newer load the plugin by themselves: a `safety:` block alone, the short name, and no block at all."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from axolotl.cli.config import load_cfg
from axolotl.integrations.base import PluginManager
from axolotl.integrations.config import merge_input_args
from axolotl.utils.dict import DictDefault

from axolotl_plugin import PLUGIN
from axolotl_plugin.cli import resolve
from axolotl_plugin.plugin import loaded_by_axolotl, safety_of
from tests import tiny
from tests.axolotl.conftest import Axolotl, protect
from tests.axolotl.test_config import _fresh_plugins  # noqa: F401  # a fixture for every test
from tests.axolotl.test_train import weights
from trl_safety.config.block import SafetyConfig
from trl_safety.reports.report import verify

pytestmark = pytest.mark.skipif(not loaded_by_axolotl(), reason="this Axolotl reads no entry points of plugins")

NAMES: dict[str, dict[str, Any]] = {
    "block alone": {},
    "short name": {"plugins": ["safety"]},
    "full name": {"plugins": [PLUGIN]},
    "entry point's form": {"plugins": ["axolotl_plugin:SafetyPlugin"]},
    "both names": {"plugins": ["safety", PLUGIN]},
}


def block(config: dict[str, Any], world: Path, **methods: Any) -> dict[str, Any]:
    """The configuration with a safety block and no plugin line."""
    options = protect(config, world, **methods)
    del options["plugins"]
    return options


@pytest.fixture
def hidden(tmp_path: Path) -> Path:
    """A folder that, first on the path, hides the entry points of the installed package: the first of two of a name counts."""
    information = tmp_path / "hidden" / "trl_safety-0.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: trl-safety\nVersion: 0\n")
    return tmp_path / "hidden"


def numbers(folder: Path) -> list[dict[str, Any]]:
    """The log of every step, without times."""
    state = json.loads((folder / "checkpoint-3" / "trainer_state.json").read_text())
    return [{name: value for name, value in entry.items() if not re.search("runtime|per_sec", name)} for entry in state["log_history"]]


@pytest.mark.parametrize("plugins", NAMES.values(), ids=NAMES)
def test_every_way_to_name_it_validates_the_block(world: Path, config: dict[str, Any], plugins: dict[str, Any]) -> None:
    options = block(config, world, asft={"weight": 0.25})
    validated = load_cfg(DictDefault({**options, **plugins}))
    assert safety_of(validated) == SafetyConfig.parse(options["safety"])


def test_every_way_to_name_it_trains_alike(world: Path, config: dict[str, Any], axolotl: Axolotl, tmp_path: Path) -> None:
    """The full name's numbers are those of trl_safety in test_train.py."""
    options = block(config, world, asft={"weight": 0.5}, safe_lora={"threshold": 1.0})
    for name, launcher in {"full name": "python", "block alone": None, "short name": "python"}.items():
        said = axolotl("train", {**options, **NAMES[name], "output_dir": str(tmp_path / name)}, launcher=launcher)
        assert tiny.identical(weights(tmp_path / name), weights(tmp_path / "full name"))
        assert [method.acted for method in verify(tmp_path / name).methods] == [True, True]
        assert "A safety method acted" in (tmp_path / name / "README.md").read_text()
        assert "Could not load" not in said
    axolotl("train", {**config, "output_dir": str(tmp_path / "plain")})
    assert tiny.largest_difference(weights(tmp_path / "plain"), weights(tmp_path / "full name")) > 1e-2


def test_dual_select_and_a_buffer_with_the_block_alone(world: Path, config: dict[str, Any], axolotl: Axolotl, tmp_path: Path) -> None:
    """Methods that replace the loss, or the weights under the adapter."""
    references = {"reference_dataset": str(world / "text.jsonl"), "warmup_steps": 1, "keep": 4, "references": 5}
    config["safety"] = {"dual_select": references, "alignment_buffer": {"base": str(world / "base")}}
    for name in ("full name", "block alone"):
        axolotl("train", {**config, **NAMES[name], "output_dir": str(tmp_path / name)})
    assert tiny.identical(weights(tmp_path / "block alone"), weights(tmp_path / "full name"))
    assert [method.acted for method in verify(tmp_path / "block alone").methods] == [True, True]


def test_without_a_block_as_without_the_package(
    config: dict[str, Any], axolotl: Axolotl, tmp_path: Path, hidden: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file is equal bit for bit, except for times; the only new output is Axolotl's own two lines on each plugin that it finds."""
    # PEFT writes a set of module names in the order of its hashes.
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    config |= {"save_strategy": "steps", "save_steps": 2, "val_set_size": 4, "eval_steps": 2, "seed": 7, "lora_dropout": 0.1}
    del config["lora_model_dir"]
    out = Path(config["output_dir"])
    said = axolotl("train", config, "--launcher", "python", first=[tmp_path])
    out.rename(tmp_path / "with")
    without = axolotl("train", config, "--launcher", "python", first=[hidden])
    assert PLUGIN not in without
    lines = [line for line in said.splitlines() if "safety" in line.lower().replace("safetensors", "")]
    assert len(lines) == 2
    assert lines[0].endswith(f"Attempting to load plugin: {PLUGIN}")
    assert lines[1].endswith(f"Plugin loaded successfully: {PLUGIN}")
    with_it, without_it = (
        {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file() and "events.out" not in path.name}
        for folder in (tmp_path / "with", out)
    )
    assert with_it.keys() == without_it.keys()
    assert "adapter_model.safetensors" in with_it
    different = {Path(name).name for name, content in with_it.items() if content != without_it[name]}
    assert different <= {"debug.log", "trainer_state.json"}, different
    assert numbers(tmp_path / "with") == numbers(out)
    assert "safety" not in (tmp_path / "with" / "debug.log").read_text().lower().replace("safetensors", "")


def test_without_a_block_nothing_is_in_axolotls_schema(config: dict[str, Any]) -> None:
    validated = load_cfg(DictDefault(config))
    assert "safety" not in validated
    assert PLUGIN in PluginManager.get_instance().plugins
    assert not any("safety" in schema.model_fields for schema in merge_input_args())


def test_a_run_without_a_block_after_one_with_it(world: Path, config: dict[str, Any]) -> None:
    """Several configurations in one process, as in a notebook."""
    assert safety_of(load_cfg(DictDefault(block(config, world, asft={})))).asft is not None
    assert "safety" not in load_cfg(DictDefault(config))
    assert safety_of(load_cfg(DictDefault(block(config, world, csulora={})))).csulora is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(safety={}), "nothing would be protected"),
        (lambda c: c.update(safety=None), "nothing would be protected"),
        (lambda c: c.update(saftey=c.pop("safety")), "is 'saftey' a misspelling"),
        (lambda c: c.update(safety="asft"), "safety"),
        (lambda c: c["safety"].update(asft={"wieght": 1}), "did you mean 'weight'"),
        (lambda c: c["safety"].update(asft=None), "asft is empty"),
        (lambda c: c["safety"].update(asf={}), "did you mean 'asft'"),
        (lambda c: c["safety"].update(safe_lora={}, csulora={}), "keep one of them"),
        (lambda c: c.update(peft_use_dora=True), "cannot act"),
        (lambda c: c.update(plugins=["safety"]) or c.pop("safety"), "plugins names safety"),
    ],
)
def test_wrong_blocks_are_errors_without_a_plugin_line(world: Path, config: dict[str, Any], change: Any, message: str) -> None:
    options = block(config, world, asft={})
    change(options)
    with pytest.raises(Exception, match=message):
        load_cfg(DictDefault(options))


def test_other_keys_that_look_like_it_are_left_alone(config: dict[str, Any]) -> None:
    validated = load_cfg(DictDefault({**config, "safely": {"a": 1}, "safetyy": "asft"}))
    assert "safety" not in validated


@pytest.mark.parametrize("command", ["train", "preprocess", "evaluate", "merge-lora"])
def test_a_wrong_block_stops_the_command(world: Path, config: dict[str, Any], axolotl: Axolotl, tmp_path: Path, command: str) -> None:
    """`train` with its default launcher: Accelerate starts the process that reads the block."""
    said = axolotl(command, block(config, world, asft={"wieght": 1}), code=1, launcher=None if command == "train" else "python")
    assert "did you mean 'weight'" in said
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("name", ["block alone", "short name"])
def test_the_other_commands(world: Path, config: dict[str, Any], axolotl: Axolotl, tmp_path: Path, name: str) -> None:
    options = {**block({**config, "val_set_size": 4}, world, asft={"weight": 0.5}, safe_lora={"threshold": 1.0}), **NAMES[name]}
    axolotl("preprocess", options)
    assert list((tmp_path / "prepared").rglob("*.arrow"))
    axolotl("train", options)
    trained = weights(tmp_path / "out")
    verify(tmp_path / "out")
    options["lora_model_dir"] = str(tmp_path / "out")
    axolotl("evaluate", options)
    assert "loss" in (tmp_path / "out" / "eval_summary.csv").read_text()
    assert "w3" in axolotl("inference", options, "--launcher", "python", say="w3 w4")
    axolotl("merge-lora", options)
    assert (tmp_path / "out" / "merged" / "config.json").is_file()
    assert tiny.identical(weights(tmp_path / "out"), trained)
    verify(tmp_path / "out")


def test_own_commands_need_no_plugin_line(world: Path, config: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(block(config, world, asft={"weight": 0.5})))
    assert resolve(path) is None


def test_another_plugins_trainer_class_is_said_at_every_place(world: Path, config: dict[str, Any], axolotl: Axolotl) -> None:
    """Axolotl puts the entry point's plugin before all others; unlisted, it comes last, so that no other is silently overruled."""
    options = {**block(config, world, asft={"weight": 0.5}), "plugins": ["tests.axolotl.other_plugin.OtherPlugin"]}
    assert "another plugin, listed before" in axolotl("train", options, code=1)
    options["plugins"].append("safety")
    assert "another plugin, listed before" in axolotl("train", options, code=1)
    axolotl("train", {**options, "plugins": options["plugins"][::-1]})
    verify(Path(config["output_dir"]))
