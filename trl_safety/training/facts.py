"""The facts about a Transformers trainer that the methods' requirements check."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from datasets import Dataset
from transformers import DataCollatorWithFlattening

from trl_safety.adapters.engine import engine
from trl_safety.adapters.lora import lora_modules, not_covered, unwrap
from trl_safety.config.requirements import Fact, Facts
from trl_safety.training.documents import LENGTHS


def trainer_facts(trainer: Any) -> Facts:
    """The facts about a trainer, its model and its data.

    Raises:
        AdapterError: the model has no adapter that the methods can work with.
    """
    args, model = trainer.args, trainer.model
    outside = not_covered(model, lora_modules(model))
    rows = rows_of(trainer)
    batch = args.per_device_train_batch_size
    known = {
        "engine": engine(),
        "objective": objective(type(trainer)),
        "reference": reference(args, getattr(trainer, "ref_model", None)),
        "unsloth": _unsloth(trainer),
        "compiled": _option(args, "torch_compile"),
        "precision": _precision(trainer),
        "rows": rows,
        "streamed": Fact(
            trainer.train_dataset is not None and not isinstance(trainer.train_dataset, Dataset),
            f"train_dataset is a {type(trainer.train_dataset).__name__}",
        ),
        "batch_varies": _option(args, "auto_find_batch_size"),
        "label_smoothing": _option(args, "label_smoothing_factor"),
        "images": Fact(bool(getattr(trainer, "_is_vision_dataset", False)), "the training data holds images"),
        "replicated": Fact(args.n_gpu > 1, f"n_gpu = {args.n_gpu}"),
        "batch": Fact(
            None if rows.value == "packed" else batch if batch > 1 else args.gradient_accumulation_steps,
            f"per_device_train_batch_size (micro_batch_size) = {batch}, gradient_accumulation_steps = {args.gradient_accumulation_steps}",
        ),
        "trained_besides": Fact(
            bool(outside), f"{len(outside)} trainable parameters are not LoRA factors ({next(iter(outside), '')!r} first)"
        ),
        "base_weights": Fact("8bit" if getattr(unwrap(model), "is_loaded_in_8bit", False) else None, "load_in_8bit = True"),
    }
    return Facts("trl", known)


def trl_trainer(trainer_class: type) -> type | None:
    """The TRL trainer among a class's bases; None for a trainer outside TRL."""
    return next((base for base in trainer_class.__mro__ if base.__module__.startswith("trl.") and base.__name__.endswith("Trainer")), None)


def objective(trainer_class: type) -> Fact:
    """What a trainer trains for, by the name of the TRL trainer among its bases: "sft", "dpo", …; None for one outside TRL."""
    found = trl_trainer(trainer_class)
    name = found.__name__ if found else trainer_class.__name__
    return Fact(name.removesuffix("Trainer").lower() if found else None, f"the trainer is a {name}")


def reference(args: Any, ref_model: Any) -> Fact:
    """Where TRL gets the log-probabilities of the reference: "precomputed", a "second_model", or None for the model without its adapter."""
    if getattr(args, "precompute_ref_log_probs", False):
        return Fact("precomputed", "precompute_ref_log_probs = True")
    return Fact("second_model" if ref_model is not None else None, f"ref_model is a {type(ref_model).__name__}")


UNSLOTH = "unsloth"
"""Prefix of the modules of Unsloth, of its `unsloth_zoo`, and of the code that it generates at run time."""


def _unsloth(trainer: Any) -> Fact:
    """Whether Unsloth has rewritten the trainer or a layer of the model: it replaces classes, or functions of classes and of single layers."""
    first = next((name for name in _origins(trainer) if name.lower().lstrip("_").startswith(UNSLOTH)), None)
    return Fact(first is not None, f"the model or the trainer is Unsloth's ({first})")


def _origins(trainer: Any) -> Iterator[str]:
    """Names and modules of a trainer's classes, and the modules of the classes and functions of its model's layers."""
    for base in type(trainer).__mro__:
        yield base.__module__
        yield base.__name__
    seen: set[type] = set()
    for module in unwrap(trainer.model).modules():
        own = [value for value in vars(module).values() if callable(value)]
        classes = [] if type(module) in seen else [type(module), type(module).forward]
        seen.add(type(module))
        for found in (*classes, *own):
            yield str(getattr(found, "__module__", ""))


def _option(args: Any, name: str) -> Fact:
    value = getattr(args, name, None)
    return Fact(value, f"{name} = {value}")


def _precision(trainer: Any) -> Fact:
    fp16 = bool(getattr(trainer.args, "fp16", False)) or trainer.accelerator.scaler is not None
    return Fact("fp16" if fp16 else "other", "fp16 = True")


def rows_of(trainer: Any) -> Fact:
    """How the samples are laid out in the rows of a trainer's batches; see `FACTS`."""
    args, data = trainer.args, trainer.train_dataset
    if getattr(args, "packing", None) is True:
        strategy = args.packing_strategy
        return Fact("cut" if strategy == "wrapped" else "packed", f"packing = True with packing_strategy = {strategy!r}")
    if getattr(args, "sample_packing", None) is True:
        return Fact("packed", "sample_packing = True")
    if LENGTHS in (getattr(data, "column_names", None) or ()):
        return Fact("packed", f"the training data has a column {LENGTHS}")
    for name in ("padding_free", "batch_flattening"):
        if getattr(args, name, None) is True:
            return Fact("padding_free", f"{name} = True")
    collator = getattr(trainer.data_collator, "collator", trainer.data_collator)
    if isinstance(collator, DataCollatorWithFlattening):
        return Fact("padding_free", f"data_collator is a {type(collator).__name__}")
    return Fact("plain", "one sample a row")
