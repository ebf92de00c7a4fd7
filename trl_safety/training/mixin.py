"""`SafetyMixin`: the safety block in any Transformers `Trainer` subclass. It relies on the surface that all of them share:
`compute_loss`, `training_step`, `log` and callbacks.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from trl_safety.adapters.lora import LoraModule, adapter_config, adapter_name, linear_layers, lora_modules, not_covered, unwrap
from trl_safety.adapters.marks import refuse_corrected
from trl_safety.config.block import SafetyConfig
from trl_safety.config.subspace import SubspaceConfig
from trl_safety.corrections.buffer_reinforce import PENDING
from trl_safety.corrections.prepared import Prepared, prepare
from trl_safety.corrections.registry import correction_for
from trl_safety.errors import AdapterError, ConfigurationError
from trl_safety.reports.report import REPORT, MethodReport, SafetyReport, add_to_card, describes, read_report
from trl_safety.reports.source import ReportSource, adapter_folder, forget_report, report_source
from trl_safety.subspace.artifact import AlignmentSubspace
from trl_safety.subspace.build import build_subspace
from trl_safety.training.alignment_buffer import AlignmentBuffer
from trl_safety.training.asft import AsftTerm
from trl_safety.training.buffer_reinforce import BufferReinforce, ReinforceCallback
from trl_safety.training.callbacks import CorrectionCallback
from trl_safety.training.compat import trainer_divides_loss
from trl_safety.training.dual_select.method import DualSelect
from trl_safety.training.dual_select.pool import ROW, RowCollator, with_rows
from trl_safety.training.engines import LoadedShards, check_engine, is_fsdp, refuse_on_fsdp, refuse_per_sample_gradients, refuse_unjoined
from trl_safety.training.factor_groups import FactorGroups, summarise, update_norm
from trl_safety.training.safety_eval import SafetyEvalCallback

logger = logging.getLogger(__name__)

BUILT_SUBSPACE = Path("safety") / "built_subspace.safetensors"


@dataclass(frozen=True)
class References:
    """DualSelect's pool, tokenised as the training data is; `kl` where it is prompts without an answer."""

    rows: Dataset
    kl: bool


class SafetyState:
    """What one protected run holds: the adapter as it was checked, the loss term and the correction."""

    def __init__(self, trainer: Any, config: SafetyConfig, subspace: AlignmentSubspace | None, references: References | None) -> None:
        self.config = config
        self.subspace = subspace
        self._model = trainer.model
        self.prepared: Prepared = prepare(trainer.model, subspace, config.skip_modules)
        self._identities = [_identity(m) for m in self.prepared.modules]
        self._refuse_frozen()
        self.groups: FactorGroups | None = None
        # Metrics alone are not worth a V kept whole in the accelerator's memory.
        if config.asft or (subspace and all(layer.whole is None for layer in self.prepared.subspaces.values())):
            operator = config.asft.operator if config.asft else config.safe_lora.operator if config.safe_lora else "scaled"
            self.groups = FactorGroups(self.prepared.covered, self.prepared.subspaces, operator)
        self.asft = AsftTerm(config.asft, self.groups) if config.asft and self.groups else None
        self.dual_select: DualSelect | None = None
        if config.dual_select and references:
            self.dual_select = DualSelect(config.dual_select, trainer, self.prepared.modules, references.rows, kl=references.kl)
        self.alignment_buffer: AlignmentBuffer | None = None
        if config.alignment_buffer:
            self.alignment_buffer = AlignmentBuffer(config, trainer, self.prepared, subspace)
            if subspace is None:
                self.prepared.base_check = self.alignment_buffer.base_check
        self.buffer: BufferReinforce | None = None
        self.merge: ReinforceCallback | None = None
        if config.buffer_reinforce:
            self.buffer = BufferReinforce(config.buffer_reinforce, trainer, self.prepared)
            if subspace is None:
                self.prepared.base_check = self.buffer.base_check
            if self.buffer.reinforce:
                self.merge = ReinforceCallback(self.buffer, lambda: self._before_merge(trainer), self.prepared, subspace)
        self.first_step = 0
        self.start_norm = 0.0
        self.acted: set[str] = set()
        """What has acted since the last optimizer step."""
        self.kept_step: int | None = None
        """The step of the best checkpoint, where that was loaded in the end."""
        self._went_by = ""
        self.correction = _correction_callback(config, subspace)
        if self.correction:
            self.correction.prepare(trainer.model)
        self.adopt(trainer)

    def check(self, model: Any) -> None:
        """At the start of training, raise where the adapter to be trained is no longer the one that was checked."""
        active = adapter_name(model)
        refuse_corrected(adapter_config(model, active), f"adapter {active!r}")
        if active != self.prepared.adapter or [_identity(m) for m in lora_modules(model, active)] != self._identities:
            raise AdapterError(
                "the model's active adapter was changed or replaced after the trainer was made, so that the safety methods would act on the old one: "
                "make the trainer after the last change to the model"
            )
        self._refuse_frozen()
        self.prepared.outside = not_covered(model, self.prepared.covered)

    def begin(self, trainer: Any, checkpoint: Path | None) -> None:
        """Note where AsFT and the buffer start to act: at the first step, also of a run whose checkpoint they protected from there."""
        step = trainer.state.global_step
        self.acted, self.kept_step, self._went_by = set(), None, ""
        asft = self.config.asft.model_dump() if self.config.asft else {}
        self.first_step = 0 if step == 0 or self._protected_until(checkpoint, "asft", asft) == step else step
        buffer = self.buffer or self.alignment_buffer
        if buffer:
            own = buffer.report(0)
            buffer.first_step = 0 if step == 0 or self._protected_until(checkpoint, own.name, own.settings) == step else step
        self.start_norm = update_norm(self.prepared.covered) if step == 0 else 0.0
        # A fresh adapter has none, unless it was to start at random.
        at_random = adapter_config(trainer.model, self.prepared.adapter).init_lora_weights not in (True, "gaussian", "eva")
        for method in (self.dual_select, self.buffer, self.alignment_buffer):
            if method:
                method.start_norm = 0.0 if at_random else self.start_norm
        if self.dual_select:
            self.dual_select.begin(checkpoint)

    def check_step(self, trainer: Any) -> None:
        """After an optimizer step, raise where a method did not act in it; the adapter is not reported as protected then."""
        expected: dict[str, Any] = {"asft": self.asft and self.asft.config.weight > 0, "dual_select": self.dual_select}
        expected |= {"dual_select's gradient": self.dual_select, "buffer_reinforce": self.buffer}
        expected |= {"alignment_buffer": self.alignment_buffer and self.alignment_buffer.config.gamma > 0}
        if self.alignment_buffer and self.alignment_buffer.taken:
            self.acted.add("alignment_buffer")
        idle = next((name for name, method in expected.items() if method and name not in self.acted), None)
        self.acted = set()
        if idle is not None:
            self._went_by = f"{idle} did not act in optimizer step {trainer.state.global_step}"
            raise ConfigurationError(
                f"{self._went_by}: training goes by SafetyMixin: {type(trainer).__name__} has a compute_loss or training_step of its own that does not call "
                "super()'s, one was assigned to it, SafetyMixin stands behind the Trainer among its bases, or the model is not in training mode; mend that"
            )

    def _protected_until(self, checkpoint: Path | None, method: str, settings: Mapping[str, Any]) -> int | None:
        folder = adapter_folder(unwrap(self._model), checkpoint, self.prepared.adapter) if checkpoint else None
        if folder is None or not (folder / REPORT).is_file():
            return None
        report = read_report(folder)
        acted = (found for found in report.methods if found.name == method and (found.acted or found.summary.endswith(PENDING)))
        # Settings are compared after a round through JSON, as the report's were.
        same = (found for found in acted if found.settings == json.loads(json.dumps(settings)))
        steps = next((found.steps for found in same), None)
        identity = self.subspace.identity if self.subspace else None
        if report.skipped != self.prepared.skipped or (report.subspace or {}).get("identity") != identity:
            return None
        return steps[1] if steps and steps[0] == 1 and describes(report, folder) else None

    def _refuse_frozen(self) -> None:
        frozen = [m.name for m in self.prepared.covered if not (m.A.requires_grad and m.B.requires_grad)]
        if frozen:
            raise AdapterError(
                f"layer {frozen[0]!r} of adapter {self.prepared.adapter!r} is frozen, so that nothing would be trained there: load the adapter with "
                "is_trainable=True"
            )

    def metrics(self, trainer: Any) -> dict[str, float]:
        """The `safety/…` entries of a log."""
        metrics = summarise(self.groups.measure()) if self.groups else {"update_norm": update_norm(self.prepared.covered)}
        if self.asft:
            metrics["asft_penalty"] = self.asft.penalty()
            counted = trainer.current_gradient_accumulation_steps if self.asft.config.paper_lambda else 1
            metrics["asft_loss"] = metrics["asft_penalty"] * self.asft.config.weight * counted
        if self.dual_select:
            metrics |= self.dual_select.metrics()
        return {f"safety/{key}": value for key, value in metrics.items()}

    @property
    def acts_in_training(self) -> bool:
        """Whether a method acts before training ends."""
        return any(method is not None for method in (self.asft, self.dual_select, self.buffer, self.alignment_buffer))

    def report(self, trainer: Any, *, final: bool) -> SafetyReport:
        """The report of the adapter as it is now, for a run without a correction."""
        report = self.prepared.report(self.subspace, self._reports(trainer), final=final)
        return report.model_copy(update={"protected": False}) if self.merge else report

    def _reports(self, trainer: Any) -> list[MethodReport]:
        """Of the methods that act while training."""
        steps = trainer.state.global_step if self.kept_step is None else self.kept_step
        reports = [self.alignment_buffer.report(steps)] if self.alignment_buffer else []
        reports += [self.dual_select.report(steps)] if self.dual_select else []
        reports += [self.asft.report(self.first_step, steps, self.start_norm)] if self.asft else []
        reports += [self.buffer.report(steps)] if self.buffer else []
        if self._went_by:
            reports = [r.model_copy(update={"acted": False, "summary": f"{r.summary}; BUT {self._went_by}"}) for r in reports]
        return reports

    def _before_merge(self, trainer: Any) -> list[MethodReport]:
        """Of the methods that acted until the training's end, the correction with them."""
        corrected = self.correction.result if self.correction else None
        return corrected.methods if corrected else self._reports(trainer)

    def adopt(self, trainer: Any) -> None:
        """Work with a correction callback that the user gave to the trainer."""
        given = [c for c in trainer.callback_handler.callbacks if isinstance(c, CorrectionCallback) and c is not self.correction]
        if given and (self.correction or len(given) > 1):
            raise ConfigurationError(
                "callbacks and the safety block name two corrections, which would both rewrite the trained adapter: keep one of them"
            )
        if given and self.merge and given[0].correction.name == "alignment_vector":
            raise ConfigurationError(
                "callbacks: the alignment vector would be weighted down by buffer_reinforce's merge: keep one of them, or remove buffer_reinforce.reinforce"
            )
        if given:
            self.correction = given[0]
        if self.correction and self.acts_in_training:
            self.correction.join(trainer.state, lambda: self._reports(trainer))

    def check_evaluations(self, trainer: Any) -> None:
        """Have the user's own evaluation callbacks see the model as it will be used; refuse one that would stop for what is corrected."""
        for callback in trainer.callback_handler.callbacks:
            if not isinstance(callback, SafetyEvalCallback):
                continue
            if callback.stop_above is not None and (self.correction or self.merge):
                raise ConfigurationError(
                    f"stop_above = {callback.stop_above:g} of a SafetyEvalCallback: measures the adapter as it trains, which the methods after training have not "
                    "corrected yet; remove it, or the correction"
                )
            if self.alignment_buffer:
                callback.around = trainer._aligned


def _identity(module: LoraModule) -> tuple[object, ...]:
    return module.name, id(module.layer), module.adapter, module.A.shape, module.scaling


class SafetyMixin:
    """Adds a `safety` block to a `Trainer` class: `class SafeXTrainer(SafetyMixin, XTrainer)`.

    Without a block every method passes straight to the parent.
    """

    _safety: SafetyState | None = None
    _combined_loss: Tensor | None = None
    _scaling_checked = False
    _resumed: Path | None = None
    _began = False

    def start_safety(
        self,
        safety: SafetyConfig | Mapping[str, Any] | str | Path | None,
        subspace: AlignmentSubspace | str | Path | None,
        references: References | None = None,
    ) -> None:
        """Check and set up everything; called once the model has its adapter."""
        trainer: Any = self
        if safety is None:
            if subspace is not None:
                raise ConfigurationError("subspace is given but no safety block: name the method that should use it")
            return
        config = SafetyConfig.parse(safety)
        check_engine()
        refuse_unjoined(trainer)
        if config.dual_select:
            if references is None:
                raise ConfigurationError(
                    "dual_select.reference_dataset is missing: name the pool of safety references there, or give reference_dataset to SafeSFTTrainer"
                )
            buffer = "buffer_reinforce" if config.buffer_reinforce else "alignment_buffer" if config.alignment_buffer else None
            if buffer and references.kl:
                raise ConfigurationError(
                    "dual_select.reference_dataset holds prompts without an answer: what the model says to them beside a buffer is not what it should say; give "
                    f"references with answers, or remove {buffer}"
                )
            _number_rows(trainer)
        if config.dual_select:
            refuse_per_sample_gradients()
        if config.buffer_reinforce and config.buffer_reinforce.reinforce is not None:
            refuse_on_fsdp(
                f"buffer_reinforce.reinforce = {config.buffer_reinforce.reinforce!r}",
                "the merge changes the adapter's rank",
                "leave reinforce out, and merge the saved adapter with `trl-safety merge-reinforce`",
            )
        self._safety = SafetyState(trainer, config, _subspace(trainer, config, subspace), references)
        LoadedShards.add_to(trainer, lambda: self._resumed)
        trainer.add_callback(_Start(self))
        if config.correction:
            trainer.add_callback(self._safety.correction)
        if self._safety.merge:
            trainer.add_callback(self._safety.merge)
        if config.eval:
            if config.eval.stop_above is not None and (config.correction or self._safety.merge):
                raise ConfigurationError(
                    f"eval.stop_above = {config.eval.stop_above:g}: measures the adapter as it trains, which the methods after training have not corrected yet; "
                    "remove it, or the correction"
                )
            # First, so that every other callback's log has the rates.
            trainer.callback_handler.callbacks.insert(0, SafetyEvalCallback.of(config.eval, trainer.processing_class, self._aligned))

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """The parent's loss, plus the loss terms of the methods while training."""
        parent: Any = super()
        trainer: Any = self
        if self._safety is not None and self._safety.dual_select is not None and trainer.model.training:
            result = self._selected_loss(parent.compute_loss, model, inputs, return_outputs, num_items_in_batch)
        else:
            result = parent.compute_loss(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)
        if self._safety is None or self._safety.asft is None or not trainer.model.training or self._safety.asft.config.weight == 0:
            return result
        term = self._safety.asft.loss(trainer, num_items_in_batch)
        loss = (result[0] if return_outputs else result) + term
        self._safety.acted.add("asft")
        if not self._scaling_checked:
            self._combined_loss = loss.detach()
        return (loss, result[1]) if return_outputs else loss

    def _selected_loss(self, compute_loss: Any, model: Any, inputs: Any, return_outputs: bool, num_items_in_batch: Any) -> Tensor:
        """DualSelect's loss of one batch, scaled as `training_step` and the log expect it."""
        trainer: Any = self
        if return_outputs:
            raise ConfigurationError(
                "return_outputs = True while training: dual_select needs the loss alone; the trainer is one that it does not know"
            )
        assert self._safety is not None  # noqa: S101  # called where it is
        assert self._safety.dual_select is not None  # noqa: S101

        def own(model: Any, inputs: Any) -> Any:
            return compute_loss(model, inputs, return_outputs=False, num_items_in_batch=None)

        loss = self._safety.dual_select.loss(model, inputs, own)
        self._safety.acted.add("dual_select")
        return loss if trainer_divides_loss(trainer, num_items_in_batch) else loss / trainer.current_gradient_accumulation_steps

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """The parent's step, beside the buffer, with DualSelect's gradient after the last accumulated one.

        In the first accumulated one, a check that the parent scaled the loss as the penalty's weight assumes.
        """
        parent: Any = super()
        safety = self._safety
        buffer = (safety.buffer or safety.alignment_buffer) if safety is not None else None
        with buffer.attached() if buffer else nullcontext():
            result = parent.training_step(model, inputs, num_items_in_batch)
        trainer: Any = self
        if safety is not None and safety.buffer:
            safety.acted.add("buffer_reinforce")
        elif safety is not None and safety.alignment_buffer and safety.alignment_buffer.frozen:
            safety.acted.add("alignment_buffer")
        if self._combined_loss is not None and trainer.current_gradient_accumulation_steps > 1:
            divisor = trainer.current_gradient_accumulation_steps if trainer_divides_loss(trainer, num_items_in_batch) else 1
            if not torch.allclose(self._combined_loss.mean() / divisor, result, rtol=1e-3, atol=1e-8, equal_nan=True):
                raise ConfigurationError(
                    f"gradient_accumulation_steps = {trainer.current_gradient_accumulation_steps}: {type(self).__mro__[1].__name__} scales the loss in a way "
                    "that trl-safety does not know, so that asft.weight would not be what it says; use gradient_accumulation_steps=1"
                )
            self._combined_loss, self._scaling_checked = None, True
        if self._safety is not None and self._safety.dual_select is not None and trainer.accelerator.sync_gradients:
            self._safety.dual_select.finish_step()
            self._safety.acted.add("dual_select's gradient")
        return result

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """The parent's training. However it ends, a report of the methods that acted stays with the adapter as it was then."""
        parent: Any = super()
        trainer: Any = self
        if self._safety is None:
            return parent.train(resume_from_checkpoint, *args, **kwargs)
        self._resumed = _checkpoint(trainer, resume_from_checkpoint)
        if self._safety.merge:
            # After any correction, also one that was added since the trainer was made.
            trainer.remove_callback(self._safety.merge)
            trainer.add_callback(self._safety.merge)
        if self._safety.alignment_buffer:
            self._safety.alignment_buffer.frame(trainer.callback_handler.callbacks)
        ended = False
        try:
            result = parent.train(resume_from_checkpoint, *args, **kwargs)
            ended = True
        finally:
            safety = self._safety
            if safety.alignment_buffer:
                safety.alignment_buffer.put_back(gather=ended)
            if safety.dual_select and self._began:
                safety.dual_select.finish(ended=ended)
            merged = ended and safety.merge is not None
            if safety.acts_in_training and safety.correction is None and self._began and not merged:
                if ended or not is_fsdp():
                    report_source(trainer.model, safety.prepared.adapter).freeze(trainer.model, safety.report(trainer, final=ended))
                else:
                    # Another process may be gone, and gathering would wait for it.
                    forget_report(trainer.model, safety.prepared.adapter)
            self._began = False
        return result

    def _load_best_model(self) -> None:
        """The parent's; what acted after that checkpoint did nothing to the adapter that is kept."""
        parent: Any = super()
        parent._load_best_model()
        trainer: Any = self
        if self._safety is not None:
            self._safety.kept_step = int(Path(trainer.state.best_model_checkpoint).name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-"))

    def save_model(self, *args: Any, **kwargs: Any) -> Any:
        """The parent's; what the report measures is gathered first where the factors are sharded, since one process saves."""
        parent: Any = super()
        trainer: Any = self
        source = _source(trainer) if is_fsdp() else None
        buffer = self._safety.alignment_buffer if self._safety is not None else None
        # Where the vocabulary was resized, PEFT saves the embeddings with the adapter: the aligned model's, not those trained on.
        with source.held() if source else nullcontext(), self._aligned() if buffer and buffer.resized else nullcontext():
            return parent.save_model(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """The parent's evaluation, on the aligned model also while an alignment buffer is in its weights."""
        parent: Any = super()
        with self._aligned():
            return parent.evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """As the parent's; see `evaluate`."""
        parent: Any = super()
        with self._aligned():
            return parent.predict(*args, **kwargs)

    def _aligned(self) -> AbstractContextManager[None]:
        """The model as it will be used, without an alignment buffer in its weights."""
        buffer = self._safety.alignment_buffer if self._safety is not None else None
        return buffer.aligned() if buffer else nullcontext()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The parent's log with the `safety/…` metrics added."""
        if self._safety is not None:
            logs.update(self._safety.metrics(self))
        parent: Any = super()
        parent.log(logs, start_time)

    @property
    def safety_report(self) -> SafetyReport | None:
        """What protects the adapter, as it is now; None without a safety block or before training. With FSDP ask on every process."""
        if self._safety is None:
            return None
        trainer: Any = self
        source = _source(trainer)
        return source.current(unwrap(trainer.model)) if source else None


def _source(trainer: Any) -> ReportSource | None:
    """The report of the protected adapter, where there is one yet."""
    if trainer._safety is None:
        return None
    found: ReportSource | None = getattr(unwrap(trainer.model), "_trl_safety_reports", {}).get(trainer._safety.prepared.adapter)
    return found


class _Start(TrainerCallback):
    """Checks at the start of training, when a checkpoint has been loaded."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self._trainer
        safety = trainer._safety
        safety.check(trainer.model)
        safety.adopt(trainer)
        safety.check_evaluations(trainer)
        safety.begin(trainer, trainer._resumed)
        trainer._began = True
        if safety.asft and safety.first_step > 0 and state.is_world_process_zero:
            logger.warning("asft: the checkpoint was trained without it up to step %s, and the report will say so", safety.first_step)
        steering = safety.dual_select or safety.buffer or safety.alignment_buffer
        if steering and steering.start_norm and state.is_world_process_zero:
            logger.warning(
                "the adapter comes with an update of norm %.3g that was trained before: the report will say that it is not protected",
                steering.start_norm,
            )
        if safety.correction is None:
            report_source(trainer.model, safety.prepared.adapter).live(lambda: safety.report(trainer, final=False))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        safety = self._trainer._safety
        safety.check_step(self._trainer)
        if safety.dual_select and (control.should_save or control.should_training_stop):
            # What is saved next carries a report, which counts the samples of all processes.
            safety.dual_select.drain()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        safety = self._trainer._safety
        if safety.dual_select:
            safety.dual_select.save(Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")


def add_correction(trainer: Any, safety: SafetyConfig) -> CorrectionCallback:
    """Give any Transformers `Trainer` the correction of a safety block that needs nothing while training.

    Raises:
        ConfigurationError: the block names a method that acts while training.
        AdapterError: the model's adapter cannot be corrected.
        SubspaceError: an adapted layer is not in the subspace.
    """
    check_engine()
    refuse_unjoined(trainer)
    subspace = _subspace(trainer, safety, None)
    callback = _correction_callback(safety, subspace)
    if callback is None or needs_trainer_class(safety):
        raise ConfigurationError(f"safety.{next(iter(safety.methods()))}: acts while training and needs a trainer class of its own")
    callback.prepare(trainer.model)
    LoadedShards.add_to(trainer)
    trainer.add_callback(callback)
    if safety.eval:
        if safety.eval.stop_above is not None:
            raise ConfigurationError(
                f"eval.stop_above = {safety.eval.stop_above:g}: measures the adapter as it trains, before {callback.correction.name} acts; remove one of them"
            )
        trainer.callback_handler.callbacks.insert(0, SafetyEvalCallback.of(safety.eval, trainer.processing_class))
    return callback


def needs_trainer_class(safety: SafetyConfig) -> bool:
    """Whether a method of the block acts in the loss, the gradient or the training step, which no callback can change."""
    return bool(safety.asft or safety.dual_select or safety.buffer_reinforce or safety.alignment_buffer)


def safety_section(trainer: Any, card: Path) -> None:
    """Put the safety section into a model card that the trainer wrote itself."""
    if is_fsdp():
        # One process writes the card, and could not gather the others' shards; what was saved beside it says it all.
        saved = card.parent / REPORT
        report = read_report(card.parent) if saved.is_file() else None
    else:
        report = trainer.safety_report
    if report is not None and card.is_file():
        add_to_card(card, report)


def _number_rows(trainer: Any) -> None:
    """Have the batches say which rows of the training data they hold."""
    trainer.train_dataset = with_rows(trainer.train_dataset, "train_dataset")
    trainer._set_signature_columns_if_needed()
    trainer._signature_columns.append(ROW)
    trainer.data_collator = RowCollator(trainer.data_collator)


def _checkpoint(trainer: Any, resume_from_checkpoint: Any) -> Path | None:
    """The checkpoint that `train` will resume from, which Transformers also does from half of one, in silence.

    Raises:
        ConfigurationError: it was not saved to its end.
    """
    if not resume_from_checkpoint:
        return None
    given = get_last_checkpoint(trainer.args.output_dir) if isinstance(resume_from_checkpoint, bool) else resume_from_checkpoint
    if given is None:
        return None
    found = Path(given)
    if found.is_dir() and not (found / TRAINER_STATE_NAME).is_file():
        raise ConfigurationError(
            f"resume_from_checkpoint = {str(found)!r}: has no {TRAINER_STATE_NAME}, which is written last: its saving was interrupted; remove it, and go on from "
            "an earlier checkpoint"
        )
    return found


def _correction_callback(config: SafetyConfig, subspace: AlignmentSubspace | None) -> CorrectionCallback | None:
    chosen = config.correction
    if subspace is None:
        return None
    return CorrectionCallback(subspace, correction_for(chosen), config.skip_modules) if chosen else None


def _subspace(trainer: Any, config: SafetyConfig, given: AlignmentSubspace | str | Path | None) -> AlignmentSubspace | None:
    if not config.needs_subspace() and (config.alignment_buffer is None or isinstance(config.subspace, SubspaceConfig | None)):
        # The buffer reads the names of a pair from the block itself, and nothing else needs V.
        if given is not None and config.alignment_buffer is None:
            raise ConfigurationError(f"subspace is given but {', '.join(config.methods())} uses none: remove it")
        if given is None:
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
    """Build the subspace for the adapted layers into the output folder, once on every node."""
    from trl_safety.adapters.names import is_named

    names = [m.name for m in lora_modules(trainer.model)]
    low_rank = config.alignment_buffer is not None and config.alignment_buffer.how == "low_rank"
    if low_rank or (config.alignment_vector is not None and config.alignment_vector.all_layers):
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
