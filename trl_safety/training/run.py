"""One protected run: the checked adapter, its methods, its corrections, and the report on all of them. It knows no method by name."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from trl_safety.adapters.engine import is_fsdp
from trl_safety.adapters.lora import LoraModule, adapter_config, adapter_name, lora_modules, not_covered, unwrap
from trl_safety.adapters.marks import refuse_corrected
from trl_safety.config.block import SafetyConfig
from trl_safety.corrections.callback import CorrectionCallback
from trl_safety.corrections.prepared import Prepared, prepare
from trl_safety.errors import AdapterError, ConfigurationError
from trl_safety.reports.report import REPORT, MethodReport, SafetyReport, describes, read_report
from trl_safety.reports.source import adapter_folder, forget_report, report_source
from trl_safety.subspace.artifact import AlignmentSubspace
from trl_safety.training.factor_groups import FactorGroups, summarise, update_norm
from trl_safety.training.method import Context, Inner, TrainingMethod, as_json
from trl_safety.training.safety_eval import SafetyEvalCallback, refuse_stopping

logger = logging.getLogger(__name__)


class Run:
    """The state of one protected run.

    Args:
        trainer: the trainer, with its model.
        config: the safety block.
        subspace: the block's alignment subspace, if it uses one.
        references: method → its pool, prepared by the host.
        switched_off: what was switched off in the trainer's options, for the report.
    """

    def __init__(
        self,
        trainer: Any,
        config: SafetyConfig,
        subspace: AlignmentSubspace | None,
        references: Mapping[str, Any],
        switched_off: Iterable[str] = (),
    ) -> None:
        self.config = config
        self.subspace = subspace
        self._trainer = trainer
        self._model = trainer.model
        self.prepared: Prepared = prepare(trainer.model, subspace, config.skip_modules)
        self.prepared.switched_off = list(switched_off)
        self._identities = [_identity(m) for m in self.prepared.modules]
        self._refuse_frozen()
        hooks = {name: options.load_hook() for name, options in config.methods().items()}
        training = {name: hook for name, hook in hooks.items() if issubclass(hook, TrainingMethod)}
        self.groups = self._groups(any(hook.measures for hook in training.values()))
        self.methods: list[TrainingMethod] = []
        for name, hook in training.items():
            context = Context(trainer, config, self.prepared, subspace, self.groups, references.get(name), partial(self._protected_until))
            method = hook(config.methods()[name], context)
            self.methods.append(method)
            if subspace is None and method.base_check is not None:
                self.prepared.base_check = method.base_check
        self.start_norm = 0.0
        self.kept_step: int | None = None
        """The step of the best checkpoint, if it was loaded at the end."""
        self._bypassed = ""
        self.correction = correction_callback(config, subspace)
        if self.correction:
            self.correction.prepare(trainer.model)
        self.adopt()

    def _groups(self, needed: bool) -> FactorGroups | None:
        # A V kept whole is too large to hold in the accelerator's memory for metrics alone.
        cut = self.subspace is not None and all(layer.whole is None for layer in self.prepared.subspaces.values())
        if not needed and not cut:
            return None
        operators = [options.operator for options in self.config.methods().values() if hasattr(options, "operator")]
        return FactorGroups(self.prepared.covered, self.prepared.subspaces, operators[0] if operators else "scaled")

    @property
    def last(self) -> list[CorrectionCallback]:
        """The corrections that run after every other callback when training ends."""
        return [method.last for method in self.methods if method.last is not None]

    @property
    def corrections(self) -> list[CorrectionCallback]:
        """All corrections of the run, in the order in which they act."""
        return [*([self.correction] if self.correction else []), *self.last]

    # Checks.

    def check(self) -> None:
        """At the start of training, raise if the adapter to be trained is no longer the one that was checked."""
        model = self._trainer.model
        active = adapter_name(model)
        refuse_corrected(adapter_config(model, active), f"adapter {active!r}")
        if active != self.prepared.adapter or [_identity(m) for m in lora_modules(model, active)] != self._identities:
            raise AdapterError(
                "the model's active adapter was changed or replaced after the trainer was created, so the safety methods would act on the old one: "
                "create the trainer after the last change to the model"
            )
        self._refuse_frozen()
        self.prepared.outside = not_covered(model, self.prepared.covered)

    def _refuse_frozen(self) -> None:
        frozen = [m.name for m in self.prepared.covered if not (m.A.requires_grad and m.B.requires_grad)]
        if frozen:
            raise AdapterError(
                f"layer {frozen[0]!r} of adapter {self.prepared.adapter!r} is frozen and would not be trained: load the adapter with "
                "is_trainable=True"
            )

    def check_step(self) -> None:
        """After an optimizer step, raise if a method did not act in it; the adapter is then not reported as protected."""
        undone = [duty for method in self.methods for duty in method.undone()]
        if undone:
            trainer = self._trainer
            self._bypassed = f"{undone[0]} did not act in optimizer step {trainer.state.global_step}"
            raise ConfigurationError(
                f"{self._bypassed}: training bypasses SafetyMixin: {type(trainer).__name__} overrides compute_loss or training_step without calling super(), "
                "one of them was assigned to it, SafetyMixin comes after the Trainer among its bases, or the model is not in training mode; fix that"
            )

    def adopt(self) -> None:
        """Take over the correction callbacks that the user passed to the trainer."""
        trainer = self._trainer
        own = self.corrections
        callbacks = [c for c in trainer.callback_handler.callbacks if isinstance(c, CorrectionCallback) and all(c is not o for o in own)]
        given = [c for c in callbacks if c.correction.config.excludes]
        merges = [c for c in callbacks if not c.correction.config.excludes]
        if (given and (self.correction or len(given) > 1)) or (merges and (given or own or len(merges) > 1)):
            raise ConfigurationError(
                "callbacks and the safety block name two corrections, which would both rewrite the trained adapter: keep one of them"
            )
        scaling = next(((name, options) for name, options in self.config.methods().items() if options.scales_adapter), None)
        if given and scaling and given[0].correction.config.loses_by_scaling:
            name, options = scaling
            raise ConfigurationError(
                f"callbacks: {given[0].correction.name} would be weighted down by {name}'s merge: keep one of them, or remove {name}.{options.scales_adapter}"
            )
        if given or merges:
            self.correction = [*given, *merges][0]
        before = self._reports
        for callback in self.corrections:
            if self.methods or callback is not self.correction:
                callback.join(trainer.state, before)
            callback.switched_off = self.prepared.switched_off
            before = callback.reports

    def check_evaluations(self) -> None:
        """Run the user's own evaluation callbacks on the aligned weights; refuse one that would stop training before a correction acts."""
        for callback in self._trainer.callback_handler.callbacks:
            if isinstance(callback, SafetyEvalCallback):
                if self.corrections:
                    refuse_stopping(callback.stop_above, "stop_above of a SafetyEvalCallback", self.corrections[0].correction.name)
                if any(method.live_weights for method in self.methods):
                    callback.around = self.aligned

    # One run.

    def begin(self, checkpoint: Path | None) -> None:
        """Record where the methods start to act: at step 1, also in a resumed run if they protected its checkpoint from step 1 on."""
        trainer = self._trainer
        step = trainer.state.global_step
        self.kept_step, self._bypassed = None, ""
        self.start_norm = update_norm(self.prepared.covered) if step == 0 else 0.0
        # A fresh adapter has no update, unless it was initialised at random.
        at_random = adapter_config(trainer.model, self.prepared.adapter).init_lora_weights not in (True, "gaussian", "eva")
        for method in self.methods:
            method.undone()
            method.start_norm = 0.0 if at_random and not method.covers_past else self.start_norm
            method.begin(checkpoint)

    def warn(self) -> None:
        """At the start, warn of what the report will say about the adapter's past."""
        if not self._trainer.state.is_world_process_zero:
            return
        for method in self.methods:
            if method.first_step > 0 and method.covers_past:
                logger.warning(
                    "%s: the checkpoint was trained without it up to step %s, and the report will say so", method.name, method.first_step
                )
        if any(method.start_norm and not method.covers_past for method in self.methods):
            logger.warning(
                "the adapter already has an update of norm %.3g from earlier training: the report will say that it is not protected",
                self.start_norm,
            )

    def _protected_until(self, checkpoint: Path | None, name: str, settings: Mapping[str, Any]) -> int | None:
        folder = adapter_folder(unwrap(self._model), checkpoint, self.prepared.adapter) if checkpoint else None
        if folder is None or not (folder / REPORT).is_file():
            return None
        report = read_report(folder)
        pending = next((method.pending for method in self.methods if method.name == name), "")
        acted = (m for m in report.methods if m.name == name and (m.acted or (pending and m.summary.endswith(pending))))
        steps = next((found.steps for found in acted if found.settings == as_json(settings)), None)
        identity = self.subspace.identity if self.subspace else None
        if report.skipped != self.prepared.skipped or (report.subspace or {}).get("identity") != identity:
            return None
        return steps[1] if steps and steps[0] == 1 and describes(report, folder) else None

    def loss(self, inner: Inner, model: Any, inputs: Any, return_outputs: bool, items: Any) -> Any:
        """The trainer's loss, wrapped in every method's `loss` in the block's order."""
        for method in self.methods:
            inner = partial(method.loss, inner)
        return inner(model, inputs, return_outputs, items)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Wraps one training step in every method's `step`."""
        with ExitStack() as stack:
            for method in self.methods:
                stack.enter_context(method.step())
            yield

    @contextmanager
    def aligned(self) -> Iterator[None]:
        """Within this context the frozen weights are the aligned model's, with which the adapter will be used."""
        entered = [method for method in self.methods if method.entered]
        for method in entered:
            method.leave()
        try:
            yield
        finally:
            for method in entered:
                method.enter()

    def frame(self, callbacks: list[Any]) -> None:
        """Place the callbacks that exchange the frozen weights around all others, whenever those were added."""
        live = [method for method in self.methods if method.live_weights]
        if live:
            callbacks[:] = [_Leave(live), *(c for c in callbacks if not isinstance(c, _Leave | _Enter)), _Enter(live)]

    def finish(self, *, ended: bool, began: bool) -> None:
        """When training is over, even after an error: restore the aligned weights, and keep a report of the methods that acted."""
        for method in self.methods:
            method.leave(gather=ended)
        if not began:
            return
        for method in self.methods:
            method.end(ended=ended)
        if not self.methods or self.correction is not None or (ended and self.last):
            return
        model = self._trainer.model
        if ended or not is_fsdp():
            report_source(model, self.prepared.adapter).freeze(model, self.report(final=ended))
        else:
            # Another process may be gone, and gathering would wait for it.
            forget_report(model, self.prepared.adapter)

    def metrics(self) -> dict[str, float]:
        """The `safety/…` entries of a log."""
        metrics = summarise(self.groups.measure()) if self.groups else {"update_norm": update_norm(self.prepared.covered)}
        for method in self.methods:
            metrics |= method.metrics()
        return {f"safety/{key}": value for key, value in metrics.items()}

    def report(self, *, final: bool) -> SafetyReport:
        """The current report of the adapter, for a run without a correction."""
        report = self.prepared.report(self.subspace, self._reports(), final=final)
        return report.model_copy(update={"protected": False}) if self.last else report

    def _reports(self) -> list[MethodReport]:
        """Reports of the methods that act during training."""
        steps = self._trainer.state.global_step if self.kept_step is None else self.kept_step
        reports = [method.report(steps) for method in self.methods]
        if self._bypassed:
            reports = [r.model_copy(update={"acted": False, "summary": f"{r.summary}; BUT {self._bypassed}"}) for r in reports]
        return reports


def correction_callback(config: SafetyConfig, subspace: AlignmentSubspace | None) -> CorrectionCallback | None:
    """The callback for a block's correction; None without one."""
    chosen = config.correction
    return CorrectionCallback(subspace, chosen, config.skip_modules) if chosen else None


def _identity(module: LoraModule) -> tuple[object, ...]:
    return module.name, id(module.layer), module.adapter, module.A.shape, module.scaling


class Start(TrainerCallback):
    """Checks at the start of training, after a checkpoint has been loaded."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check the run, record where the methods begin, and report with every save."""
        trainer = self._trainer
        run: Run = trainer._safety
        run.check()
        run.adopt()
        run.check_evaluations()
        run.begin(trainer._resumed)
        trainer._began = True
        run.warn()
        if not run.corrections:
            report_source(trainer.model, run.prepared.adapter).live(lambda: run.report(final=False))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check that every method acted."""
        run: Run = self._trainer._safety
        run.check_step()
        if control.should_save or control.should_training_stop:
            for method in run.methods:
                method.before_save()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save with a checkpoint what the methods need to resume from it."""
        for method in self._trainer._safety.methods:
            method.save(Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")


class _Leave(TrainerCallback):
    """Runs first when training ends, so that other callbacks check, correct and save the aligned model."""

    def __init__(self, methods: list[TrainingMethod]) -> None:
        self._methods = methods

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """`auto_find_batch_size` starts again after running out of memory."""
        self.on_train_end(args, state, control, **kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restore the aligned model's weights."""
        for method in self._methods:
            method.leave()


class _Enter(TrainerCallback):
    """Runs last when training begins, after corrections have checked that the model is the aligned one."""

    def __init__(self, methods: list[TrainingMethod]) -> None:
        self._methods = methods

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Install the weights for training."""
        for method in self._methods:
            method.enter()
