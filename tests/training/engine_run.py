"""Run under `accelerate launch` with FSDP or DeepSpeed: OUTPUT, batch per process, safety block, subspace or none, model, and a checkpoint or `best`."""

import json
import sys
from pathlib import Path

import tests.training.engine_device  # noqa: F401
from tests import tiny
from trl_safety import AlignmentSubspace

further = sys.argv[6] if len(sys.argv) > 6 else None
output, batch, block, source, model = Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3]), sys.argv[4], sys.argv[5]
trainer = tiny.trainer(
    output,
    base=model,
    safety=block,
    subspace=None if source == "none" else AlignmentSubspace.load(source),
    eval_dataset=tiny.rows(8),
    per_device_train_batch_size=batch,
    gradient_accumulation_steps=8 // (2 * batch),
    adam_epsilon=1e-3,
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
