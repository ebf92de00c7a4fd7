"""Trains with AsFT and Safe LoRA and saves; MODE says where it is killed. Arguments: output, subspace, mode, and whether to resume from a checkpoint."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from tests import tiny
from trl_safety import AlignmentSubspace
from trl_safety.reports import source as report_source

output, source, mode, resume = Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4] == "resume"
torch.set_num_threads(1)


def die(*args: Any, **kwargs: Any) -> None:
    """As the kernel kills: no more code of the process runs."""
    os.kill(os.getpid(), signal.SIGKILL)


class Killer(TrainerCallback):
    """At the end of the third step; if there are several processes, in only one of them."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if mode == "step" and state.global_step == 3 and int(os.environ.get("RANK") or 0) == int(os.environ.get("WORLD_SIZE") or 1) - 1:
            die()
        if mode == "checkpoint" and state.global_step == 4:
            report_source.write_report = die


trainer = tiny.trainer(
    output,
    safety={"asft": {"weight": 2.0}, "safe_lora": {"threshold": 1.0}},
    subspace=AlignmentSubspace.load(source),
    callbacks=[Killer()],
    per_device_train_batch_size=4,
    max_steps=6,
    ddp_backend="gloo" if "WORLD_SIZE" in os.environ else None,
    save_strategy="steps",
    save_steps=2,
)
trainer.train(resume_from_checkpoint=resume)
if mode == "save":
    report_source.write_report = die
trainer.save_model()
