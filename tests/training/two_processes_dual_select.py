"""Run in one process or several: trains with DualSelect and saves; OUTPUT, the accumulation and the kind of reference gradient are arguments."""

import sys
from pathlib import Path

import torch

from tests import tiny

torch.set_num_threads(1)
trainer = tiny.trainer(
    Path(sys.argv[1]),
    safety={
        "dual_select": {
            "warmup_steps": 1,
            "refresh_steps": 1,
            "keep": 2,
            "references": 5,
            "selection": "soft",
            "reference_gradient": sys.argv[3],
            "rho": 0.5,
        }
    },
    reference_dataset=tiny.rows(13, seed=9),
    per_device_train_batch_size=4,
    gradient_accumulation_steps=int(sys.argv[2]),
    optim="sgd",
    max_steps=3,
    ddp_backend="gloo",
    train_sampling_strategy="sequential",
)
trainer.train()
trainer.save_model()
