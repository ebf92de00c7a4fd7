"""`SafetyMixin`: the safety block in any Transformers `Trainer` subclass. It relies on the surface that all of them share:
`compute_loss`, `training_step`, `log` and callbacks.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from trl_safety.adapters.lora import LoraModule, Snapshot, lora_modules, unwrap
from trl_safety.adapters.subspace import AlignmentSubspace
from trl_safety.config import CorrectionConfig, CsuloraConfig, SafeLoraConfig, SafetyConfig, SubspaceConfig
from trl_safety.errors import AdapterError, ConfigurationError
from trl_safety.training.asft import AsftTerm
from trl_safety.training.compat import trainer_divides_loss
from trl_safety.training.correction import Correction, CorrectionCallback, Prepared, changed_since, prepare, refuse_sharded
from trl_safety.training.csulora import CsuloraCorrection
from trl_safety.training.factor_groups import FactorGroups, summarise
from trl_safety.training.report import MethodReport, SafetyReport, add_to_card, attach_report
from trl_safety.training.safe_lora import SafeLoraCorrection

BUILT_SUBSPACE = "alignment_subspace.safetensors"


class SafetyState:
    """What one protected run holds: the adapter as it was checked, the loss term and the correction."""

    def __init__(self, trainer: Any, config: SafetyConfig, subspace: AlignmentSubspace) -> None:
        self.config = config
        self.subspace = subspace
        self.prepared: Prepared = prepare(trainer.model, subspace, config.skip_modules)
        self._identities = [_identity(m) for m in self.prepared.modules]
        frozen = [m.name for m in self.prepared.covered if not (m.A.requires_grad and m.B.requires_grad)]
        if frozen:
            raise AdapterError(
                f"layer {frozen[0]!r} of adapter {self.prepared.adapter!r} is frozen, so that nothing would be trained there: load the adapter with "
                "is_trainable=True"
            )
        operator = (config.asft or config.safe_lora or SafeLoraConfig()).operator
        self.groups = FactorGroups(self.prepared.covered, self.prepared.subspaces, operator)
        self.asft = AsftTerm(config.asft, self.groups) if config.asft else None
        self.first_step = 0
        self.finished: Snapshot | None = None
        self.correction = _correction_callback(config, subspace)
        if self.correction:
            self.correction.prepare(trainer.model)
        self.adopt(trainer)

    def check_unchanged(self, model: Any) -> None:
        """Raise where the model's adapter is no longer the one that was checked."""
        if [_identity(m) for m in lora_modules(model, self.prepared.adapter)] != self._identities:
            raise AdapterError(
                "the model's adapter was replaced after the trainer was made, so that the safety methods would act on the old one: make the trainer "
                "after the last change to the model"
            )

    def metrics(self) -> dict[str, float]:
        """The `safety/…` entries of a log."""
        measured = self.groups.measure()
        metrics = summarise(measured)
        if self.asft:
            metrics["asft_penalty"] = self.groups.penalty(self.asft.config.scaled).item()
            metrics["asft_loss"] = metrics["asft_penalty"] * self.asft.config.weight
        return {f"safety/{key}": value for key, value in metrics.items()}

    def live_report(self, trainer: Any) -> SafetyReport:
        """The report of the adapter as it is now, for a run without a correction."""
        report = self.prepared.report(self.subspace, [self._asft_report(trainer)], final=self.finished is not None)
        return report if self.finished is None or self.finished.unchanged() else changed_since(report)

    def _asft_report(self, trainer: Any) -> MethodReport:
        assert self.asft is not None  # noqa: S101  # called where asft is on
        return self.asft.report(self.groups.measure(), self.first_step, trainer.state.global_step)

    def adopt(self, trainer: Any) -> None:
        """Work with a correction callback that the user gave to the trainer."""
        given = [c for c in trainer.callback_handler.callbacks if isinstance(c, CorrectionCallback) and c is not self.correction]
        if given and (self.correction or len(given) > 1):
            raise ConfigurationError(
                "callbacks and the safety block name two corrections, which would both rewrite the trained adapter: keep one of them"
            )
        if given:
            self.correction = given[0]
        if self.correction and self.asft:
            self.correction.other_methods = [lambda: self._asft_report(trainer)]

    def modules(self) -> list[LoraModule]:
        """The layers that the methods act on."""
        return self.prepared.covered


def _identity(module: LoraModule) -> tuple[object, ...]:
    return module.name, id(module.layer), module.adapter, module.A.shape, module.scaling


class SafetyMixin:
    """Adds a `safety` block to a `Trainer` class: `class SafeXTrainer(SafetyMixin, XTrainer)`.

    Without a block every method passes straight to the parent.
    """

    _safety: SafetyState | None = None
    _combined_loss: Tensor | None = None
    _scaling_checked = False

    def _start_safety(
        self, safety: SafetyConfig | Mapping[str, Any] | str | Path | None, subspace: AlignmentSubspace | str | Path | None
    ) -> None:
        """Check and set up everything; called once the model has its adapter."""
        trainer: Any = self
        if safety is None:
            if subspace is not None:
                raise ConfigurationError("subspace is given but no safety block: name the method that should use it")
            return
        config = SafetyConfig.parse(safety)
        refuse_sharded(trainer.args)
        self._safety = SafetyState(trainer, config, _subspace(trainer, config, subspace))
        trainer.add_callback(_StartAndEnd(self))
        if config.safe_lora or config.csulora:
            trainer.add_callback(self._safety.correction)

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """The parent's loss, plus the loss terms of the methods while training."""
        parent: Any = super()
        result = parent.compute_loss(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)
        trainer: Any = self
        if self._safety is None or self._safety.asft is None or not trainer.model.training or self._safety.asft.config.weight == 0:
            return result
        term = self._safety.asft.loss(trainer, num_items_in_batch)
        loss = (result[0] if return_outputs else result) + term
        if not self._scaling_checked:
            self._combined_loss = loss.detach()
        return (loss, result[1]) if return_outputs else loss

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """The parent's step; in the first accumulated one, a check that it scaled the loss as the penalty's weight assumes."""
        parent: Any = super()
        result = parent.training_step(model, inputs, num_items_in_batch)
        trainer: Any = self
        if self._combined_loss is not None and trainer.current_gradient_accumulation_steps > 1:
            divisor = trainer.current_gradient_accumulation_steps if trainer_divides_loss(trainer, num_items_in_batch) else 1
            if not torch.allclose(self._combined_loss.mean() / divisor, result, rtol=1e-3, atol=1e-8, equal_nan=True):
                raise ConfigurationError(
                    f"gradient_accumulation_steps = {trainer.current_gradient_accumulation_steps}: {type(self).__mro__[1].__name__} scales the loss in a way "
                    "that trl-safety does not know, so that asft.weight would not be what it says; use gradient_accumulation_steps=1"
                )
            self._combined_loss, self._scaling_checked = None, True
        return result

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The parent's log with the `safety/…` metrics added."""
        if self._safety is not None:
            logs.update(self._safety.metrics())
        parent: Any = super()
        parent.log(logs, start_time)

    @property
    def safety_report(self) -> SafetyReport | None:
        """What protects the adapter, as of now; None without a safety block."""
        if self._safety is None:
            return None
        correction = self._safety.correction
        if correction is not None:
            return correction.result
        return self._safety.live_report(self)


class _StartAndEnd(TrainerCallback):
    """Checks at the start of training, and the report of runs that end without a correction."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        safety = self._trainer._safety
        safety.check_unchanged(self._trainer.model)
        safety.adopt(self._trainer)
        safety.first_step, safety.finished = state.global_step, None
        if safety.correction is None:
            attach_report(unwrap(self._trainer.model), safety.prepared.adapter, lambda: safety.live_report(self._trainer))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer._safety.finished = Snapshot(self._trainer._safety.prepared.modules)


def safety_section(trainer: Any, card: Path) -> None:
    """Put the safety section into a model card that the trainer wrote itself."""
    report = trainer.safety_report
    if report is not None and card.is_file():
        add_to_card(card, report)


def correction_for(config: CorrectionConfig) -> Correction:
    """The correction that a config block asks for."""
    if isinstance(config, SafeLoraConfig):
        return SafeLoraCorrection(config)
    if isinstance(config, CsuloraConfig):
        return CsuloraCorrection(config)
    raise ConfigurationError(f"{type(config).__name__} is no correction of a trained adapter")


def _correction_callback(config: SafetyConfig, subspace: AlignmentSubspace) -> CorrectionCallback | None:
    chosen = config.safe_lora or config.csulora
    return CorrectionCallback(subspace, correction_for(chosen), config.skip_modules) if chosen else None


def _subspace(trainer: Any, config: SafetyConfig, given: AlignmentSubspace | str | Path | None) -> AlignmentSubspace:
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
    """Build the subspace for the adapted layers into the output folder, once on every node."""
    from trl_safety.adapters.names import is_named

    names = [m.name for m in lora_modules(trainer.model) if not is_named(m.name, config.skip_modules)]
    path = Path(trainer.args.output_dir) / BUILT_SUBSPACE
    with trainer.accelerator.local_main_process_first():
        if trainer.accelerator.is_local_main_process:
            AlignmentSubspace.from_pair(
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
            ).save(path)
        return AlignmentSubspace.load(path)
