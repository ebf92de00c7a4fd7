"""Run in one process or several: trains beside a buffer, merges and saves; OUTPUT, the batch size and the provider's folder are arguments."""

import sys
from pathlib import Path

import torch

from tests import tiny

torch.set_num_threads(1)
provider = Path(sys.argv[3])
trainer = tiny.trainer(
    Path(sys.argv[1]),
    safety={"buffer_reinforce": {"buffer": str(provider / "buffer"), "reinforce": str(provider / "reinforce")}},
    per_device_train_batch_size=int(sys.argv[2]),
    optim="sgd",
    max_steps=3,
    ddp_backend="gloo",
)
trainer.train()
trainer.save_model()
