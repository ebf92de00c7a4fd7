"""FSDP2 and ZeRO-2 on two gloo processes end where one process with the whole batch does, and refuse what cannot act on shards.

`make` installs DeepSpeed into a separate folder, since Transformers and Accelerate would import it in every test if they found it.
"""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests import tiny
from tests.training import preference, providers
from trl_safety import AlignmentSubspace
from trl_safety.reports.report import read_report, verify

ROOT = Path(__file__).parent.parent.parent


DEEPSPEED = Path(sys.prefix) / "deepspeed"
needs_deepspeed = pytest.mark.skipif(not DEEPSPEED.is_dir(), reason=f"no {DEEPSPEED}, which make installs where there is a C++ compiler")


def launch(engine: str, *arguments: object, script: str = "engine_run") -> str:
    """Two processes; returns what the first said if it failed."""
    config = str(Path(__file__).parent / f"{engine}.yaml")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, "--main_process_port", "0", "-m"]
    path = f"{DEEPSPEED / 'bin'}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": path}
    if engine.startswith("zero"):
        environment |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{DEEPSPEED}", "DS_ACCELERATOR": "cpu"}
    line = [*command, f"tests.training.{script}", *map(str, arguments)]
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    own = [line for line in done.stderr.splitlines() if line.startswith("[rank0]")]
    return "" if done.returncode == 0 else "\n".join(own[-15:]) or done.stderr[-3000:]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair on disk, a buffer for it, its subspace, and a plainly trained adapter."""
    folder = tmp_path_factory.mktemp("fsdp")
    for name in ("base", "aligned"):
        tiny.model(f"gqa-{name}").save_pretrained(folder / name)
        tiny.tokenizer().save_pretrained(folder / name)
    providers.make(folder, base=str(folder / "aligned"))
    tiny.rows(16, seed=5).save_to_disk(str(folder / "pool"))
    AlignmentSubspace.from_pair(folder / "base", folder / "aligned", target_modules="all-linear", rank=8, progress=False).save(
        folder / "S.safetensors"
    )
    alone(folder, folder / "plain", {})
    return folder


def alone(world: Path, output: Path, safety: dict[str, Any], kind: str = "sft") -> dict[str, Any]:
    """One process, with the batch of both."""
    subspace = AlignmentSubspace.load(world / "S.safetensors") if needs_subspace(safety) else None
    options = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 4, **tiny.WELL_CONDITIONED, "per_device_train_batch_size": 8}
    options |= {"eval_dataset": tiny.rows(8) if kind == "sft" else preference.rows(kind, 8), **preference.SPREADS.get(kind, {})}
    if "dual_select" in safety:
        # It chooses within the batch of a process.
        options |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    made = tiny.trainer if kind == "sft" else partial(preference.trainer, kind)
    trainer = made(output, base=tiny.model(str(world / "aligned")), safety=safety or None, subspace=subspace, **options)
    trainer.train()
    trainer.save_model()
    return load_file(output / "adapter_model.safetensors")


def needs_subspace(safety: dict[str, Any]) -> bool:
    if "asft" in safety:
        return True
    return (
        bool(safety)
        and not {"buffer_reinforce", "dual_select"} & set(safety)
        and safety.get("alignment_buffer", {}).get("how") != "weights"
    )


BLOCKS: dict[str, dict[str, Any]] = {
    "asft": {"asft": {"weight": 0.01}},
    "asft and safe_lora": {"asft": {"weight": 0.01}, "safe_lora": {"threshold": 1.0}},
    "csulora, cut back": {"csulora": {"output_rank": "original"}},
    "alignment_vector, cut back": {"alignment_vector": {"cut_to": 4}},
    "alignment_buffer in the weights": {"alignment_buffer": {"base": "BASE", "how": "weights"}},
    "alignment_buffer of low rank": {"alignment_buffer": {"how": "low_rank"}},
    "dpo with two methods": {"asft": {"weight": 0.01}, "alignment_buffer": {"base": "BASE", "how": "weights"}},
    "grpo with a correction": {"asft": {"weight": 0.01}, "safe_lora": {"threshold": 1.0}},
    "buffer": {"buffer_reinforce": {"buffer": "BUFFER"}},
    "buffer and merge": {"buffer_reinforce": {"buffer": "BUFFER", "reinforce": "REINFORCE"}},
    "dual_select": {
        "dual_select": {
            "reference_dataset": "POOL",
            "warmup_steps": 1,
            "refresh_steps": 2,
            "keep": 1,
            "references": 4,
            "rho": 0.5,
            "reference_gradient": "fresh",
        }
    },
}
OTHERS = ["dpo with two methods", "grpo with a correction"]
FSDP2 = ["asft and safe_lora", "csulora, cut back", "alignment_vector, cut back", *OTHERS, *(name for name in BLOCKS if "buffer" in name)][
    :-1
]
RESUMED = "asft and safe_lora"
ACCUMULATE = (RESUMED, "dual_select")
ZERO2 = ["asft and safe_lora", "alignment_buffer in the weights", *OTHERS, "buffer and merge", "dual_select"]


def kind_of(name: str) -> str:
    return next((kind for kind in preference.KINDS if name.startswith(kind)), "sft")


def job(world: Path, output: Path, name: str, further: str | None = None) -> dict[str, Any]:
    """One of `engine_run`'s runs."""
    text = json.dumps(BLOCKS[name])
    for word in ("BASE", "BUFFER", "REINFORCE", "POOL"):
        text = text.replace(word, str(world / word.lower()))
    block = json.loads(text)
    source = str(world / "S.safetensors") if needs_subspace(block) else None
    batch = 2 if name in ACCUMULATE else 4
    made = {"output": str(output), "batch": batch, "block": block, "subspace": source, "model": str(world / "aligned"), "further": further}
    return {**made, "kind": kind_of(name)}


def run_jobs(engine: str, folder: Path, jobs: list[dict[str, Any]]) -> None:
    (folder / f"{engine}.json").write_text(json.dumps(jobs))
    assert not launch(engine, folder / f"{engine}.json")


@pytest.fixture(scope="module")
def runs(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Each engine's runs, all in one start of two processes, when the first of them is requested."""
    folders: dict[str, Path] = {}

    def of(engine: str) -> Path:
        if engine not in folders:
            folder = folders[engine] = tmp_path_factory.mktemp(engine)
            jobs = [job(world, folder / name, name) for name in (FSDP2 if engine == "fsdp2" else ZERO2)]
            if engine == "fsdp2":
                jobs.append(job(world, folder / "best", "asft", "best"))
            run_jobs(engine, folder, jobs)
        return folders[engine]

    return of


@pytest.mark.parametrize(
    ("engine", "name"),
    [*(("fsdp2", name) for name in FSDP2), *(pytest.param("zero2", name, marks=needs_deepspeed) for name in ZERO2)],
)
def test_two_processes_equal_one(runs: Any, world: Path, tmp_path: Path, engine: str, name: str) -> None:
    """With an evaluation during training, after which FSDP leaves the outermost parameters gathered."""
    output = runs(engine) / name
    one = alone(world, tmp_path / "one", job(world, output, name)["block"], kind_of(name))
    two = load_file(output / "adapter_model.safetensors")
    assert tiny.largest_difference(two, one) < 2e-5
    plain = load_file(world / "plain" / "adapter_model.safetensors")
    assert max((one[key] - value).norm() for key, value in plain.items() if key in one and one[key].shape == value.shape) > 1e-3
    report = verify(output)
    assert all(method.acted for method in report.methods)
    assert [method.name for method in report.methods] == [method.name for method in read_report(tmp_path / "one").methods]
    middle = read_report(output / "checkpoint-2")
    assert middle.stage == "training"
    assert (middle.methods[0].steps or (0, 2))[1] == 2


@pytest.mark.parametrize("engine", ["fsdp2", pytest.param("zero2", marks=needs_deepspeed)])
def test_resumed_equals_uninterrupted(runs: Any, world: Path, tmp_path: Path, engine: str) -> None:
    whole = runs(engine) / RESUMED
    run_jobs(engine, tmp_path, [job(world, tmp_path / "resumed", RESUMED, str(whole / "checkpoint-2"))])
    resumed, uninterrupted = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "resumed", whole))
    assert tiny.largest_difference(resumed, uninterrupted) < 1e-6
    assert verify(tmp_path / "resumed").methods[0].steps == (1, 4)


def test_the_best_checkpoint_reaches_every_process(runs: Any) -> None:
    folder = runs("fsdp2") / "best"
    saved, middle, last = (
        load_file(folder / "adapter_model.safetensors") for folder in (folder, *(folder / f"checkpoint-{step}" for step in (2, 4)))
    )
    assert tiny.largest_difference(saved, middle) == 0
    assert tiny.largest_difference(saved, last) > 1e-3


def test_refused_on_shards(world: Path, tmp_path: Path) -> None:
    assert not launch("fsdp2", tmp_path, world, script="fsdp_refused")


@needs_deepspeed
def test_refused_on_deepspeed(world: Path, tmp_path: Path) -> None:
    options = {"batch": 4, "subspace": str(world / "S.safetensors"), "model": str(world / "aligned"), "further": None, "kind": "sft"}
    (tmp_path / "jobs.json").write_text(json.dumps([{"output": str(tmp_path), "block": {"safe_lora": {"threshold": 1.0}}, **options}]))
    assert "ZeRO stage 3 keeps every LoRA factor in shards" in launch("zero3", tmp_path / "jobs.json")
