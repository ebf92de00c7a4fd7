"""Run in one process or several: trains with AsFT and Safe LoRA and saves; OUTPUT and the batch per process are arguments."""

import sys
from pathlib import Path

import torch

from tests import tiny
from trl_safety import AlignmentSubspace

output, batch = Path(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(1)
subspace = AlignmentSubspace.from_pretrained(sys.argv[3])
trainer = tiny.trainer(
    output,
    safety={"asft": {"weight": 2.0}, "safe_lora": {"threshold": 1.0}},
    subspace=subspace,
    per_device_train_batch_size=batch,
    optim="sgd",
    max_steps=3,
    ddp_backend="gloo",
    save_strategy="steps",
    save_steps=3,
)
trainer.train()
trainer.save_model()
