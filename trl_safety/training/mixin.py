"""`SafetyMixin`: the safety block in any Transformers `Trainer` subclass. It knows no method: it uses only what all trainers share
(`compute_loss`, `training_step`, `log` and callbacks) and delegates to the `Run`.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from trl_safety.adapters.engine import is_fsdp
from trl_safety.adapters.lora import unwrap
from trl_safety.config.block import SafetyConfig
from trl_safety.config.requirements import resolve
from trl_safety.errors import ConfigurationError
from trl_safety.reports.report import SafetyReport
from trl_safety.reports.source import ReportSource
from trl_safety.subspace.artifact import AlignmentSubspace
from trl_safety.training.engines import LoadedShards, refuse_unjoined
from trl_safety.training.facts import trainer_facts
from trl_safety.training.resume import LoadedAdapter
from trl_safety.training.run import Run, Start
from trl_safety.training.safety_eval import SafetyEvalCallback, refuse_stopping
from trl_safety.training.start import block_subspace, checkpoint_of, refuse_empty, tell


class SafetyMixin:
    """Adds a `safety` block to a `Trainer` class: `class SafeXTrainer(SafetyMixin, XTrainer)`.

    Without a block every call goes straight to the parent.
    """

    _safety: Run | None = None
    _resumed: Path | None = None
    _began = False

    def start_safety(
        self,
        safety: SafetyConfig | Mapping[str, Any] | str | Path | None,
        subspace: AlignmentSubspace | str | Path | None = None,
        references: Mapping[str, Any] | None = None,
        switched_off: list[str] | None = None,
    ) -> None:
        """Check and set up everything; called once the model has its adapter.

        Args:
            safety: the block; None leaves everything to the parent.
            subspace: used instead of the block's `subspace`.
            references: method → its pool of reference rows, prepared like the training data.
            switched_off: what the host switched off for the methods, for the report.

        Raises:
            ConfigurationError: an option is wrong, or keeps a method from acting.
            AdapterError: the model's adapter cannot be protected.
            SubspaceError: an adapted layer is not in the subspace.
        """
        trainer: Any = self
        if safety is None:
            if subspace is not None:
                raise ConfigurationError("subspace is given but no safety block: name the method that should use it")
            return
        config = SafetyConfig.parse(safety)
        refuse_empty(trainer)
        methods = config.methods()
        switched = [*(switched_off or []), *resolve(methods, trainer_facts(trainer))]
        tell(switched)
        refuse_unjoined(trainer)
        pools = references or {}
        for name, options in methods.items():
            hook = options.load_hook()
            if hasattr(hook, "ready"):
                hook.ready(options, config, trainer, pools.get(name))
        run = self._safety = Run(trainer, config, block_subspace(trainer, config, subspace), pools, switched)
        # A correction that the user passed as a callback is checked when training begins.
        if config.eval and (config.correction or run.last):
            refuse_stopping(config.eval.stop_above, "eval.stop_above", run.corrections[0].correction.name)
        LoadedShards.add_to(trainer, lambda: self._resumed)
        LoadedAdapter.add_to(trainer, lambda: self._resumed)
        trainer.add_callback(Start(self))
        if config.correction:
            trainer.add_callback(run.correction)
        for callback in run.last:
            trainer.add_callback(callback)
        if config.eval:
            # First, so that every other callback sees the rates in the log.
            trainer.callback_handler.callbacks.insert(0, SafetyEvalCallback.of(config.eval, trainer.processing_class, run.aligned))

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """The parent's loss, changed by the methods in training mode."""
        parent: Any = super()
        trainer: Any = self
        if self._safety is None or not trainer.model.training:
            return parent.compute_loss(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)

        def inner(model: Any, inputs: Any, return_outputs: bool, items: Any) -> Any:
            return parent.compute_loss(model, inputs, return_outputs=return_outputs, num_items_in_batch=items)

        return self._safety.loss(inner, model, inputs, return_outputs, num_items_in_batch)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """The parent's step, wrapped in the methods' steps."""
        parent: Any = super()
        if self._safety is None:
            return parent.training_step(model, inputs, num_items_in_batch)
        with self._safety.step():
            result = parent.training_step(model, inputs, num_items_in_batch)
        for method in self._safety.methods:
            method.after_backward(result, num_items_in_batch)
        return result

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """The parent's training. Even after an error, the adapter keeps a report of the methods that acted on it."""
        parent: Any = super()
        trainer: Any = self
        run = self._safety
        if run is None:
            return parent.train(resume_from_checkpoint, *args, **kwargs)
        self._resumed = checkpoint_of(trainer, resume_from_checkpoint)
        for callback in run.last:
            # After every correction, including one added since the trainer was created.
            trainer.remove_callback(callback)
            trainer.add_callback(callback)
        run.frame(trainer.callback_handler.callbacks)
        ended = False
        try:
            result = parent.train(resume_from_checkpoint, *args, **kwargs)
            ended = True
        finally:
            run.finish(ended=ended, began=self._began)
            self._began = False
        return result

    def _load_best_model(self) -> None:
        """The parent's; from then on the report covers only the steps up to that checkpoint."""
        parent: Any = super()
        parent._load_best_model()
        trainer: Any = self
        if self._safety is not None:
            self._safety.kept_step = int(Path(trainer.state.best_model_checkpoint).name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-"))

    def save_model(self, *args: Any, **kwargs: Any) -> Any:
        """The parent's; with sharded factors the report's measurements are gathered first, since only one process saves."""
        parent: Any = super()
        run = self._safety
        source = report_source_of(self) if is_fsdp() else None
        away = run is not None and any(method.leaves_to_save for method in run.methods)
        with source.held() if source else nullcontext(), run.aligned() if run and away else nullcontext():
            return parent.save_model(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """The parent's evaluation, on the aligned weights even where a method changes them for training."""
        parent: Any = super()
        with self._safety.aligned() if self._safety else nullcontext():
            return parent.evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """The parent's; see `evaluate`."""
        parent: Any = super()
        with self._safety.aligned() if self._safety else nullcontext():
            return parent.predict(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The parent's log with the `safety/…` metrics added."""
        if self._safety is not None:
            logs.update(self._safety.metrics())
        parent: Any = super()
        parent.log(logs, start_time)

    @property
    def safety_report(self) -> SafetyReport | None:
        """The adapter's current safety report; None without a safety block or before training. With FSDP, read it on every process."""
        if self._safety is None:
            return None
        trainer: Any = self
        source = report_source_of(self)
        return source.current(unwrap(trainer.model)) if source else None


def report_source_of(trainer: Any) -> ReportSource | None:
    """The source of the protected adapter's report; None before there is one."""
    if trainer._safety is None:
        return None
    found: ReportSource | None = getattr(unwrap(trainer.model), "_trl_safety_reports", {}).get(trainer._safety.prepared.adapter)
    return found
