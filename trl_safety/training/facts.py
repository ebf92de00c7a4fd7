"""The facts about a Transformers trainer that the methods' requirements check."""

from __future__ import annotations

from typing import Any

from datasets import Dataset

from trl_safety.adapters.engine import engine
from trl_safety.adapters.lora import lora_modules, not_covered, unwrap
from trl_safety.config.requirements import Fact, Facts


def trainer_facts(trainer: Any) -> Facts:
    """The facts about a trainer, its model and its data.

    Raises:
        AdapterError: the model has no adapter that the methods can work with.
    """
    args, model = trainer.args, trainer.model
    outside = not_covered(model, lora_modules(model))
    known = {
        "engine": engine(),
        "compiled": _option(args, "torch_compile"),
        "precision": _precision(trainer),
        "rows": _rows(args),
        "streamed": Fact(
            trainer.train_dataset is not None and not isinstance(trainer.train_dataset, Dataset),
            f"train_dataset is a {type(trainer.train_dataset).__name__}",
        ),
        "batch_varies": _option(args, "auto_find_batch_size"),
        "label_smoothing": _option(args, "label_smoothing_factor"),
        "images": Fact(bool(getattr(trainer, "_is_vision_dataset", False)), "the training data holds images"),
        "replicated": Fact(args.n_gpu > 1, f"n_gpu = {args.n_gpu}"),
        "batch": Fact(
            args.per_device_train_batch_size, f"per_device_train_batch_size (micro_batch_size) = {args.per_device_train_batch_size}"
        ),
        "trained_besides": Fact(
            bool(outside), f"{len(outside)} trainable parameters are not LoRA factors ({next(iter(outside), '')!r} first)"
        ),
        "base_weights": Fact("8bit" if getattr(unwrap(model), "is_loaded_in_8bit", False) else None, "load_in_8bit = True"),
    }
    return Facts("trl", known)


def _option(args: Any, name: str) -> Fact:
    value = getattr(args, name, None)
    return Fact(value, f"{name} = {value}")


def _precision(trainer: Any) -> Fact:
    fp16 = bool(getattr(trainer.args, "fp16", False)) or trainer.accelerator.scaler is not None
    return Fact("fp16" if fp16 else "other", "fp16 = True")


def _rows(args: Any) -> Fact:
    for name, rows in (("packing", "packed"), ("sample_packing", "packed"), ("padding_free", "padding_free")):
        if getattr(args, name, None) is True:
            return Fact(rows, f"{name} = True")
    return Fact("plain", "one sample a row")
