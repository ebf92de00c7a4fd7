"""Differences between the library versions that are supported, each with the condition for its removal."""

from __future__ import annotations

from typing import Any

from accelerate.utils import compare_versions


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


def loads_adapter_shards() -> bool:
    """Whether Accelerate gives every process its part of an adapter's FSDP2 checkpoint.

    Before 1.15 only the first process gets its part; the others silently keep theirs. A resumed run, or one that ends with
    `load_best_model_at_end`, would then mix two adapters. `engines.LoadedShards` goes once 1.15 is the oldest supported version.
    """
    return bool(compare_versions("accelerate", ">=", "1.15.0"))


def loads_default_adapter() -> bool:
    """Whether Transformers resumes PEFT's `default` adapter also where a checkpoint holds further ones in folders of their own.

    5.20 silently leaves it as the trainer was made with it, 5.23 loads it. `resume.LoadedAdapter` goes once 5.23 is the oldest supported
    version.
    """
    return bool(compare_versions("transformers", ">=", "5.23.0"))


def scaling_class(trainer: Any) -> type:
    """The class that decides how a trainer scales its loss: the first outside this package that defines a training step or a loss."""
    own = {"compute_loss", "training_step"}
    classes = [found for found in type(trainer).__mro__ if not found.__module__.startswith("trl_safety.") and own & vars(found).keys()]
    return classes[0] if classes else type(trainer)
