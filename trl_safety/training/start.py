"""What a run starts from: its checkpoint, its alignment subspace, and corrections for trainers without a class of our own."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from trl_safety.adapters.engine import is_fsdp
from trl_safety.adapters.folder import WEIGHTS, AdapterFolder
from trl_safety.adapters.lora import adapter_name, linear_layers, lora_modules, unwrap
from trl_safety.adapters.names import is_named
from trl_safety.config.block import SafetyConfig
from trl_safety.config.correction import CorrectionConfig
from trl_safety.config.requirements import resolve
from trl_safety.config.subspace import SubspaceConfig
from trl_safety.corrections.callback import CorrectionCallback
from trl_safety.errors import AdapterError, ConfigurationError, reason
from trl_safety.reports.report import REPORT, add_to_card, read_report
from trl_safety.reports.source import adapter_folder
from trl_safety.subspace.artifact import AlignmentSubspace
from trl_safety.subspace.build import build_subspace
from trl_safety.training.engines import LoadedShards, refuse_unjoined
from trl_safety.training.facts import trainer_facts
from trl_safety.training.resume import LoadedAdapter
from trl_safety.training.run import correction_callback
from trl_safety.training.safety_eval import SafetyEvalCallback, refuse_stopping

logger = logging.getLogger(__name__)

BUILT_SUBSPACE = Path("safety") / "built_subspace.safetensors"


def tell(switched: Iterable[str]) -> None:
    """Log what was switched off in a trainer's options."""
    for text in switched:
        logger.warning("%s", text)


def refuse_empty(trainer: Any) -> None:
    """Refuse a run that has no row to train on, as where all were dropped when they were made into tokens.

    Raises:
        ConfigurationError: naming what may have dropped them.
    """
    data = trainer.train_dataset
    if data is not None and hasattr(data, "__len__") and not len(data):
        length = getattr(trainer.args, "max_length", None)
        raise ConfigurationError(
            "train_dataset: no row is left to train on: either there was none, or none has a token of its answer"
            + (f" within max_length = {length}: raise it, or give other rows" if length else "; give other rows")
        )


def needs_trainer_class(safety: SafetyConfig) -> bool:
    """Whether a method of the block acts in the loss, the gradient or the training step, which no callback can change."""
    return any(not isinstance(options, CorrectionConfig) for options in safety.methods().values())


def add_correction(trainer: Any, safety: SafetyConfig, switched_off: Iterable[str] = ()) -> CorrectionCallback:
    """Add a safety block's correction to any Transformers `Trainer`; the block may need nothing else during training.

    Raises:
        ConfigurationError: the block names a method that acts while training.
        AdapterError: the model's adapter cannot be corrected.
        SubspaceError: an adapted layer is not in the subspace.
    """
    switched = [*switched_off, *resolve(safety.methods(), trainer_facts(trainer))]
    tell(switched)
    refuse_unjoined(trainer)
    callback = correction_callback(safety, block_subspace(trainer, safety, None))
    if callback is None or needs_trainer_class(safety):
        raise ConfigurationError(f"safety.{next(iter(safety.methods()))}: acts while training and needs a trainer class of its own")
    callback.switched_off = switched
    callback.prepare(trainer.model)
    LoadedShards.add_to(trainer)
    LoadedAdapter.add_to(trainer)
    trainer.add_callback(callback)
    if safety.eval:
        refuse_stopping(safety.eval.stop_above, "eval.stop_above", callback.correction.name)
        trainer.callback_handler.callbacks.insert(0, SafetyEvalCallback.of(safety.eval, trainer.processing_class))
    return callback


def safety_section(trainer: Any, card: Path) -> None:
    """Add the safety section to a model card that the trainer wrote."""
    if is_fsdp():
        # One process writes the card and cannot gather the others' shards; the report saved beside it has everything.
        saved = card.parent / REPORT
        report = read_report(card.parent) if saved.is_file() else None
    else:
        report = trainer.safety_report
    if report is not None and card.is_file():
        add_to_card(card, report)


def checkpoint_of(trainer: Any, resume_from_checkpoint: Any) -> Path | None:
    """The checkpoint that `train` will resume from. Transformers would silently resume from an incomplete one.

    Raises:
        ConfigurationError: there is none, it is incomplete, or its state cannot be read.
        AdapterError: its adapter cannot be read, or holds NaN or infinity.
    """
    if not resume_from_checkpoint:
        return None
    output = Path(trainer.args.output_dir)
    named = isinstance(resume_from_checkpoint, bool)
    given = (get_last_checkpoint(str(output)) if output.is_dir() else None) if named else resume_from_checkpoint
    if given is None:
        raise ConfigurationError(f"resume_from_checkpoint = True: output_dir = {str(output)!r} holds no checkpoint; leave it out")
    found = Path(given)
    setting = f"resume_from_checkpoint = {str(found)!r}"
    if not found.is_dir():
        raise ConfigurationError(f"{setting}: no such folder; name a checkpoint, or leave it out")
    if not (found / TRAINER_STATE_NAME).is_file():
        raise ConfigurationError(
            f"{setting}: has no {TRAINER_STATE_NAME}, which is written last: the save was interrupted; remove it, and resume from an earlier checkpoint"
        )
    try:
        TrainerState.load_from_json(str(found / TRAINER_STATE_NAME))
    except (OSError, TypeError, ValueError) as error:
        raise ConfigurationError(
            f"{setting}: its {TRAINER_STATE_NAME} cannot be read ({reason(error)}); resume from an earlier checkpoint"
        ) from error
    adapter = adapter_folder(unwrap(trainer.model), found, adapter_name(trainer.model))
    if (adapter / WEIGHTS).is_file():
        try:
            AdapterFolder.open(adapter)
        except AdapterError as error:
            raise AdapterError(f"{setting}: {error}") from error
    return found


def block_subspace(trainer: Any, config: SafetyConfig, given: AlignmentSubspace | str | Path | None) -> AlignmentSubspace | None:
    """The alignment subspace of a block: given, read, or built into the output folder; None if no method uses one.

    Raises:
        ConfigurationError: it is missing, given twice, or used by no method.
        SubspaceError: it cannot be read or built.
    """
    uses = {options.subspace_use for options in config.methods().values()}
    if "reads" not in uses:
        if given is not None and "names" not in uses:
            raise ConfigurationError(f"subspace is given but {', '.join(config.methods())} uses none: remove it")
        # The model names of a pair are read from the block itself.
        if given is None and isinstance(config.subspace, SubspaceConfig | None):
            return None
    if given is not None and config.subspace is not None:
        raise ConfigurationError(f"safety.subspace = {config.subspace!r}: a subspace is also given as an argument; keep one of them")
    source = given if given is not None else config.subspace
    if source is None:
        raise ConfigurationError(
            "safety.subspace is missing: give a file made by `trl-safety subspace`, a Hub id, or a {base, aligned, rank} pair"
        )
    if isinstance(source, AlignmentSubspace):
        return source
    if not isinstance(source, SubspaceConfig):
        return AlignmentSubspace.from_pretrained(source)
    return _built(trainer, config, source)


def _built(trainer: Any, config: SafetyConfig, pair: SubspaceConfig) -> AlignmentSubspace:
    """Build the subspace of the adapted layers into the output folder, once per node."""
    names = [m.name for m in lora_modules(trainer.model)]
    if any(options.every_linear_layer for options in config.methods().values()):
        inner: Any = unwrap(trainer.model)
        head = inner.get_output_embeddings()
        names = [
            name
            for name, layer in linear_layers(trainer.model).items()
            if getattr(layer, "base_layer", layer) is not head and layer is not head
        ]
    names = [name for name in names if not is_named(name, config.skip_modules)]
    path = Path(trainer.args.output_dir) / BUILT_SUBSPACE
    with trainer.accelerator.local_main_process_first():
        if trainer.accelerator.is_local_main_process:
            build_subspace(
                path,
                pair.base,
                pair.aligned,
                target_modules=names,
                rank=pair.rank,
                tolerance=pair.tolerance,
                whole=pair.whole,
                base_revision=pair.base_revision,
                aligned_revision=pair.aligned_revision,
                trust_remote_code=pair.trust_remote_code,
                device=trainer.args.device,
            )
        return AlignmentSubspace.load(path)
