"""The real Axolotl, run as a user runs it. Without it these tests are skipped; `make test` installs it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# Read when Axolotl is imported, here or in the server that its processes are forked from. Without it each of them would wait for a
# telemetry server that it cannot reach.
os.environ.setdefault("AXOLOTL_DO_NOT_TRACK", "1")

import pytest
import torch
import yaml
from peft import get_peft_model

from tests import processes, tiny
from tests.training import preference, providers
from trl_safety import AlignmentSubspace

collect_ignore_glob = [] if importlib.util.find_spec("axolotl") else ["test_*.py"]


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small pair with a tokenizer and a chat template, data in two formats, and its subspace."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("axolotl")
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] == 'user' and 'w1 ' or 'w2 ' }}{{ m['content'] }} </s> {% endfor %}"
    for name in ("base", "aligned"):
        LlamaForCausalLM(
            LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
        ).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    rows = list(tiny.rows(64))
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": row["prompt"] + row["completion"]}) for row in rows))
    # One row repeated: Axolotl gives rows to two processes in another order than to one.
    (folder / "same.jsonl").write_text("\n".join(json.dumps({"text": "w3 w4 w5 w6 w7"}) for _ in rows))
    chats = [
        {"messages": [{"role": "user", "content": row["prompt"].strip()}, {"role": "assistant", "content": row["completion"]}]}
        for row in rows
    ]
    (folder / "train.jsonl").write_text("\n".join(json.dumps(chat) for chat in chats))
    for kind in preference.KINDS:
        (folder / f"{kind}.jsonl").write_text("\n".join(json.dumps(row) for row in preference.rows(kind)))
    pairs = [
        {
            side: [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[side].strip()}]
            for side in ("chosen", "rejected")
        }
        for row in preference.rows("dpo")
    ]
    (folder / "orpo.jsonl").write_text("\n".join(json.dumps(pair) for pair in pairs))
    # Axolotl does not seed the initialisation of LoRA: runs that are to be compared start from one saved adapter.
    torch.manual_seed(0)
    config = tiny.lora(base_model_name_or_path=str(folder / "aligned"))
    get_peft_model(LlamaForCausalLM.from_pretrained(folder / "aligned"), config).save_pretrained(folder / "start")
    AlignmentSubspace.from_pair(folder / "base", folder / "aligned", target_modules="all-linear", rank=8, progress=False).save(
        folder / "S.safetensors"
    )
    return providers.make(folder, base=str(folder / "aligned"))


@pytest.fixture
def config(world: Path, tmp_path: Path) -> dict[str, Any]:
    """An ordinary Axolotl configuration for a CPU, with plain SGD so that updates can be compared in size."""
    return {
        "base_model": str(world / "aligned"),
        "datasets": [{"path": str(world / "text.jsonl"), "ds_type": "json", "type": "completion", "field": "text"}],
        "dataset_prepared_path": str(tmp_path / "prepared"),
        "output_dir": str(tmp_path / "out"),
        "adapter": "lora",
        "lora_model_dir": str(world / "start"),
        "lora_r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "lora_target_modules": tiny.TARGETS,
        "sequence_len": 32,
        "micro_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "max_steps": 3,
        "learning_rate": 0.5,
        "optimizer": "sgd",
        "lr_scheduler": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "logging_steps": 1,
        "val_set_size": 0,
        "save_strategy": "no",
        "special_tokens": {"pad_token": "<pad>"},
        **CPU,
    }


SITE = Path(__file__).parent / "site"
"""Has several processes, FSDP and DeepSpeed run on a CPU."""
DEEPSPEED = Path(sys.prefix) / "deepspeed"
"""Where `make` installs it; see tests/training/test_engines.py."""
CPU = {
    "use_cpu": True,
    # By default Axolotl starts processes that import everything again.
    "dataloader_num_workers": 0,
    "dataset_num_proc": 1,
    "bf16": False,
    "fp16": False,
    "tf32": False,
    "lora_qkv_kernel": False,
    "lora_o_kernel": False,
    "lora_mlp_kernel": False,
}


def protect(config: dict[str, Any], world: Path, **methods: Any) -> dict[str, Any]:
    """The configuration with the plugin line and a safety block."""
    return {**config, "plugins": ["axolotl_plugin.SafetyPlugin"], "safety": {"subspace": str(world / "S.safetensors"), **methods}}


Axolotl = Callable[..., str]


@pytest.fixture
def axolotl(tmp_path: Path) -> Axolotl:
    """Write a configuration, run `axolotl COMMAND… FILE ARGUMENTS…` on it, and return its output.

    `train` and `evaluate` run in one process unless told otherwise: Axolotl's default launcher, accelerate, starts a second one. Folders
    that come `first` on the path, or input to `say` to it, need a new interpreter.
    """

    def run(
        command: str,
        configuration: dict[str, Any],
        *arguments: str,
        code: int = 0,
        launcher: str | None = "python",
        first: Sequence[Path] = (),
        say: str | None = None,
    ) -> str:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(configuration, sort_keys=False))
        environment = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        if launcher and "--launcher" not in arguments and command != "safety train" and not first and say is None:
            launched = ["--launcher", launcher] if command in ("train", "evaluate") else []
            (done,) = processes.run(
                "axolotl.cli.main", *command.split(), path, *launched, *arguments, environment=environment, folder=tmp_path
            )
            status, said = done.returncode, done.output
        else:
            binaries = Path(sys.executable).parent
            environment |= {
                "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
                "PYTHONPATH": os.pathsep.join([*map(str, first), str(Path(__file__).parent.parent.parent), str(SITE)]),
            }
            if "fsdp_config" in configuration or "deepspeed" in configuration:
                environment["ENGINE_ON_CPU"] = "1"
            if "deepspeed" in configuration:
                environment["PYTHONPATH"] += f"{os.pathsep}{DEEPSPEED}"
                environment["PATH"] = f"{DEEPSPEED / 'bin'}{os.pathsep}{environment['PATH']}"
                environment["DS_ACCELERATOR"] = "cpu"
            line = [str(binaries / "axolotl"), *command.split(), str(path), *arguments]
            ended = subprocess.run(
                line, input=say, capture_output=True, text=True, env={**os.environ, **environment}, cwd=tmp_path, check=False
            )
            status, said = ended.returncode, ended.stdout + ended.stderr
        assert (status == 0) == (code == 0), said[-6000:]
        return said

    return run
