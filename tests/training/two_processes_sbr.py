"""Run in one process or several: trains with SBR and saves; OUTPUT and the batch per process are arguments."""

import sys
from pathlib import Path

import torch

from tests import tiny

torch.set_num_threads(1)
trainer = tiny.trainer(
    Path(sys.argv[1]),
    safety={"sbr": {"prompts": ["w41", "w42 w43 w44", "w46 w47"], "number": 3, "ask_first": False}},
    per_device_train_batch_size=int(sys.argv[2]),
    optim="sgd",
    max_steps=3,
    ddp_backend="gloo",
)
trainer.train()
trainer.save_model()
