"""Run under `accelerate launch` with FSDP or DeepSpeed: a JSON file with a list of runs, one after the other.

A run is {output, batch (of each process), block, subspace (or null), model, further (a checkpoint, "best", or null), kind (of trainer)}.
"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import tests.training.engine_device  # noqa: F401
from tests import tiny
from tests.training import preference
from trl_safety import AlignmentSubspace


def run(output: str, batch: int, block: dict[str, Any], subspace: str | None, model: str, further: str | None, kind: str) -> None:
    """Train and save."""
    data = tiny.rows(8) if kind == "sft" else preference.rows(kind, 8)
    made = tiny.trainer if kind == "sft" else partial(preference.trainer, kind)
    trainer = made(
        Path(output),
        base=model,
        safety=block,
        subspace=AlignmentSubspace.load(subspace) if subspace else None,
        eval_dataset=data,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=8 // (2 * batch),
        **tiny.WELL_CONDITIONED,
        **preference.SPREADS.get(kind, {}),
        max_steps=4,
        eval_strategy="steps",
        eval_steps=2,
        use_cpu=False,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=further == "best",
        metric_for_best_model="eval_loss",
        # The best of these is the worst, which is not the last.
        greater_is_better=True,
    )
    trainer.train(resume_from_checkpoint=further if further != "best" else None)
    if trainer.is_fsdp_enabled:
        assert type(next(iter(trainer.model.parameters()))).__name__ == "DTensor"
    else:
        assert type(trainer.model_wrapped).__name__ == "DeepSpeedEngine"
    trainer.save_model()


for options in json.loads(Path(sys.argv[1]).read_text()):
    run(**options)
