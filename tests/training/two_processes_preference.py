"""Run in one process or several: trains by DPO, KTO and GRPO and saves; OUTPUT, the batch per process and the subspace are arguments."""

import sys
from pathlib import Path
from typing import Any

import torch

from tests import tiny
from tests.training import preference

torch.set_num_threads(1)
output, batch, subspace = sys.argv[1:]
for kind in preference.KINDS:
    block: dict[str, Any] = {
        "subspace": subspace,
        "asft": {"weight": 2.0},
        "sbr": {"prompts": ["w41", "w42 w43 w44", "w46 w47"], "number": 3, "ask_first": False},
    }
    if kind != "grpo":
        block["alignment_buffer"] = {"base": str(tiny.DATA / "gqa-base"), "aligned": str(tiny.DATA / "gqa-aligned")}
    options: dict[str, Any] = {**preference.SGD, "learning_rate": 0.05, **preference.SPREADS.get(kind, {})}
    trainer = preference.trainer(
        kind, Path(output) / kind, safety=block, per_device_train_batch_size=int(batch), ddp_backend="gloo", **options
    )
    trainer.train()
    trainer.save_model()
