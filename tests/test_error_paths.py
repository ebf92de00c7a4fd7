"""Every command with a damaged version of each of its inputs: our own error, never a traceback."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from tests import tiny
from tests.training import providers
from trl_safety import AlignmentSubspace, apply_safe_lora
from trl_safety.cli.app import app


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file or folder of every kind that a command reads."""
    from peft import PeftModel

    folder = providers.make(tmp_path_factory.mktemp("world"))
    for name in ("base", "aligned"):
        shutil.copytree(tiny.DATA / f"gqa-{name}", folder / name)
        tiny.tokenizer().save_pretrained(folder / name)
    subspace = AlignmentSubspace.from_pair(folder / "base", folder / "aligned", target_modules="all-linear", rank=8, progress=False)
    subspace.save(folder / "S.safetensors")
    shutil.copytree(tiny.DATA / "gqa-adapter", folder / "adapter")
    tiny.rewrite_json(folder / "adapter" / "adapter_config.json", base_model_name_or_path=str(folder / "aligned"))
    model = PeftModel.from_pretrained(tiny.model(str(folder / "aligned")), str(folder / "adapter"), is_trainable=True)
    apply_safe_lora(model, subspace, threshold=1.0)
    model.save_pretrained(str(folder / "corrected"))
    (folder / "harmful.jsonl").write_text('{"prompt": "w3 w4"}\n')
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny.rows(4)))
    (folder / "pool.jsonl").write_text("".join(f'{{"prompt": "w{i} w4 ", "completion": "w50 w51"}}\n' for i in range(8)))
    (folder / "prompts.jsonl").write_text("".join(f'{{"prompt": "w{i} w4"}}\n' for i in range(8)))
    (folder / "gate.yaml").write_text(f"adapter: {folder / 'corrected'}\n")
    return folder


CONFIG = "the configuration"
"""A file that is written for the command, from the mapping in its line."""


def training(safety: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    """A training's configuration."""
    return {
        "model_name_or_path": "{aligned}",
        "dataset_name": "{train.jsonl}",
        "output_dir": "OUT",
        "use_peft": True,
        "lora_target_modules": ["q_proj"],
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "dataloader_pin_memory": False,
        **({"safety": safety} if safety else {}),
        **options,
    }


CHOICE = {"reference_dataset": "{pool.jsonl}", "warmup_steps": 1, "refresh_steps": 2, "keep": 1, "references": 4}

COMMANDS: dict[str, tuple[list[Any], list[str]]] = {
    "sft": (
        [
            "sft",
            "--config",
            training({"asft": {"weight": 0.1}, "subspace": "{S.safetensors}", "eval": {"harmful": "{harmful.jsonl}", "steps": 1}}),
        ],
        [CONFIG, "aligned", "train.jsonl", "S.safetensors", "harmful.jsonl"],
    ),
    "sft with references": (["sft", "--config", training({"dual_select": CHOICE})], ["pool.jsonl"]),
    "sft with prompts": (["sft", "--config", training({"sbr": {"prompts": "{prompts.jsonl}"}})], ["prompts.jsonl"]),
    "sft with a base": (["sft", "--config", training({"alignment_buffer": {"base": "{base}"}})], ["base"]),
    "sft with a buffer": (
        ["sft", "--config", training({"buffer_reinforce": {"buffer": "{buffer}", "reinforce": "{reinforce}"}})],
        ["buffer", "reinforce"],
    ),
    "buffer": (["buffer", "--config", training()], [CONFIG, "aligned", "train.jsonl"]),
    "reinforce": (["reinforce", "--config", training(buffer="{buffer}")], [CONFIG, "train.jsonl", "buffer"]),
    "subspace": (
        ["subspace", "{base}", "{aligned}", "-o", "OUT.safetensors", "--target-modules", "q_proj", "--rank", "4"],
        ["base", "aligned"],
    ),
    "correct": (["correct", "{adapter}", "-s", "{S.safetensors}", "--method", "safe_lora", "-o", "OUT"], ["adapter", "S.safetensors"]),
    "merge": (
        ["correct", "{adapter}", "--method", "buffer_reinforce", "--reinforce", "{reinforce}", "-o", "OUT"],
        ["adapter", "reinforce"],
    ),
    "merge-reinforce": (["merge-reinforce", "{adapter}", "{reinforce}", "-o", "OUT"], ["adapter", "reinforce"]),
    "verify": (["verify", "{corrected}"], ["corrected"]),
    "report": (["report", "{corrected}", "-o", "OUT.html"], ["corrected"]),
    "gate": (["gate", "--config", "{gate.yaml}"], ["gate.yaml"]),
    "inspect": (["inspect", "{adapter}", "-s", "{S.safetensors}"], ["adapter", "S.safetensors"]),
    "alignment-adapter": (["alignment-adapter", "{S.safetensors}", "-o", "OUT"], ["S.safetensors"]),
    "add-vector": (["add-vector", "{aligned}", "--base", "{base}", "--aligned", "{aligned}", "-o", "OUT"], ["base", "aligned"]),
    "adopt": (["adopt", "{adapter}", "--as", "buffer", "-o", "OUT"], ["adapter"]),
    "eval": (
        ["eval", "{aligned}", "--adapter", "{adapter}", "--harmful", "{harmful.jsonl}", "-o", "OUT", "--new-tokens", "2"],
        ["aligned", "adapter", "harmful.jsonl"],
    ),
    "sweep": (
        [
            *("sweep", "{adapter}", "--method", "safe_lora", "--grid", "layers=1", "-s", "{S.safetensors}", "--harmful", "{harmful.jsonl}"),
            *("-o", "OUT", "--new-tokens", "2"),
        ],
        ["adapter", "S.safetensors", "harmful.jsonl"],
    ),
    "safety-gradient": (
        ["safety-gradient", "{aligned}", "{train.jsonl}", "-d", "{S.safetensors}", "--samples", "2"],
        ["aligned", "train.jsonl", "S.safetensors"],
    ),
}


def missing(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def empty(path: Path) -> None:
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    for file in files:
        file.write_bytes(b"")


def truncated(path: Path) -> None:
    files = [file for file in path.rglob("*") if file.is_file() and file.suffix in (".json", ".safetensors")] if path.is_dir() else [path]
    for file in files:
        file.write_bytes(file.read_bytes()[: max(1, file.stat().st_size // 3)])


def lists(path: Path) -> None:
    """Valid JSON of another kind."""
    files = list(path.rglob("*.json")) if path.is_dir() else [path]
    for file in files:
        file.write_text("[1, 2]\n")


def another_kind(path: Path) -> None:
    """A folder in place of a file, and a file in place of a folder."""
    was_folder = path.is_dir()
    missing(path)
    path.write_text("w3") if was_folder else path.mkdir()


DAMAGES: list[Callable[[Path], None]] = [missing, empty, truncated, lists, another_kind]


def run(
    arguments: list[Any], world: Path, replaced: dict[str, Path], output: Path, damage: Callable[[Path], None] | None = None
) -> tuple[int, str, BaseException | None]:
    def filled(argument: Any) -> Any:
        if isinstance(argument, dict):
            return {key: filled(value) for key, value in argument.items()}
        if not isinstance(argument, str):
            return argument
        if argument.startswith("{"):
            name = argument[1:-1]
            return str(replaced.get(name, world / name))
        return argument.replace("OUT", str(output / "out"))

    line = []
    for argument in arguments:
        found = filled(argument)
        if isinstance(found, dict):
            # TRL's parser takes a block by the name of its file.
            (output / "block.yaml").write_text(yaml.safe_dump(found.pop("safety", None)))
            path = output / "run.yaml"
            safety = {"safety": str(output / "block.yaml")} if "safety" in argument else {}
            path.write_text(yaml.safe_dump({**found, **safety}))
            if damage is not None:
                damage(path)
            found = str(path)
        line.append(found)
    done = CliRunner().invoke(app, line)
    return done.exit_code, done.output, done.exception


@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_works_as_it_is_written_here(command: str, world: Path, tmp_path: Path) -> None:
    code, said, _ = run(COMMANDS[command][0], world, {}, tmp_path)
    assert code == 0, said


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize(("command", "place"), [(name, place) for name, (_, places) in COMMANDS.items() for place in places])
def test_damaged_inputs_are_our_own_errors(command: str, place: str, damage: Callable[[Path], None], world: Path, tmp_path: Path) -> None:
    if place == CONFIG:
        code, said, error = run(COMMANDS[command][0], world, {}, tmp_path, damage)
    else:
        copy = tmp_path / place
        shutil.copytree(world / place, copy) if (world / place).is_dir() else shutil.copyfile(world / place, copy)
        damage(copy)
        code, said, error = run(COMMANDS[command][0], world, {place: copy}, tmp_path)
    assert error is None or isinstance(error, SystemExit), f"{said}\n{error!r}"
    assert code != 0, said
    assert "Traceback" not in said
