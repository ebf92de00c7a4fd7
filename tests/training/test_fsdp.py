"""FSDP2 on two gloo processes ends where one process with twice the batch does, and refuses what cannot act on shards."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests import tiny
from tests.training import providers
from trl_safety import AlignmentSubspace
from trl_safety.training.report import read_report, verify

ROOT = Path(__file__).parent.parent.parent


def launch(*arguments: object, script: str = "fsdp_run") -> None:
    config = str(Path(__file__).parent / "fsdp2.yaml")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, "--main_process_port", "0", "-m"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    line = [*command, f"tests.training.{script}", *map(str, arguments)]
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    own = [line for line in done.stderr.splitlines() if line.startswith("[rank0]")]
    assert done.returncode == 0, "\n".join(own[-15:]) or done.stderr[-3000:]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair on disk, a buffer for it, its subspace, and what plain training makes."""
    folder = tmp_path_factory.mktemp("fsdp")
    for name in ("base", "aligned"):
        tiny.model(f"gqa-{name}").save_pretrained(folder / name)
        tiny.tokenizer().save_pretrained(folder / name)
    providers.make(folder, base=str(folder / "aligned"))
    AlignmentSubspace.from_pair(folder / "base", folder / "aligned", target_modules="all-linear", rank=8, progress=False).save(
        folder / "S.safetensors"
    )
    alone(folder, folder / "plain", {})
    return folder


def alone(world: Path, output: Path, safety: dict[str, Any]) -> dict[str, Any]:
    """One process, with the batch of both. SGD has no state, which torch cannot load into shards."""
    subspace = AlignmentSubspace.load(world / "S.safetensors") if needs_subspace(safety) else None
    options = {"eval_dataset": tiny.rows(8), "eval_strategy": "steps", "eval_steps": 2, "adam_epsilon": 1e-3, "max_steps": 4}
    trainer = tiny.trainer(output, base=tiny.model(str(world / "aligned")), safety=safety or None, subspace=subspace, **options)
    trainer.train()
    trainer.save_model()
    return load_file(output / "adapter_model.safetensors")


def needs_subspace(safety: dict[str, Any]) -> bool:
    return bool(safety) and "buffer_reinforce" not in safety and safety.get("alignment_buffer", {}).get("how") != "weights"


BLOCKS: dict[str, dict[str, Any]] = {
    "asft and safe_lora": {"asft": {"weight": 0.01}, "safe_lora": {"threshold": 1.0}},
    "csulora, cut back": {"csulora": {"output_rank": "original"}},
    "alignment_vector, cut back": {"alignment_vector": {"cut_to": 4}},
    "alignment_buffer in the weights": {"alignment_buffer": {"base": "BASE", "how": "weights"}},
    "alignment_buffer of low rank": {"alignment_buffer": {"how": "low_rank"}},
    "buffer": {"buffer_reinforce": {"buffer": "BUFFER"}},
}


@pytest.mark.parametrize("name", BLOCKS)
def test_shards_equal_one_process(world: Path, tmp_path: Path, name: str) -> None:
    """With an evaluation in the middle, after which FSDP leaves the outermost parameters gathered."""
    text = json.dumps(BLOCKS[name]).replace("BASE", str(world / "base")).replace("BUFFER", str(world / "buffer"))
    block = json.loads(text)
    one = alone(world, tmp_path / "one", block)
    source = world / "S.safetensors" if needs_subspace(block) else "none"
    launch(tmp_path / "two", 4, text, source, world / "aligned")
    two = load_file(tmp_path / "two" / "adapter_model.safetensors")
    assert tiny.largest_difference(two, one) < 2e-5
    assert max((one[key] - value).norm() for key, value in load_file(world / "plain" / "adapter_model.safetensors").items()) > 1e-3
    report = verify(tmp_path / "two")
    assert all(method.acted for method in report.methods)
    assert [method.name for method in report.methods] == [method.name for method in read_report(tmp_path / "one").methods]
    middle = read_report(tmp_path / "two" / "checkpoint-2")
    assert middle.stage == "training"
    assert (middle.methods[0].steps or (0, 2))[1] == 2
    if name == "asft and safe_lora":
        launch(tmp_path / "resumed", 4, text, source, world / "aligned", tmp_path / "two" / "checkpoint-2")
        assert tiny.largest_difference(load_file(tmp_path / "resumed" / "adapter_model.safetensors"), two) < 1e-6
        assert verify(tmp_path / "resumed").methods[0].steps == (1, 4)


def test_refused(world: Path, tmp_path: Path) -> None:
    launch(tmp_path, world, script="fsdp_refused")
