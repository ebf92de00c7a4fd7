"""Differences between the library versions that are supported, each with the condition for its removal."""

from __future__ import annotations

from typing import Any


def trainer_divides_loss(trainer: Any, num_items_in_batch: Any) -> bool:
    """Whether `Trainer.training_step` will divide the loss by the number of accumulation steps.

    Transformers ≥ 5.18 lets a subclass say so in `loss_is_scaled_for_ga`; the attribute test goes once that is the oldest
    supported version.
    """
    said = getattr(trainer, "loss_is_scaled_for_ga", None)
    if said is not None:
        return not said
    by_items = bool(trainer.model_accepts_loss_kwargs) and num_items_in_batch is not None
    return not by_items and trainer.compute_loss_func is None
