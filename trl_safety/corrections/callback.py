"""A correction as a Trainer callback."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar, cast

from torch import nn
from transformers import TrainerCallback

from trl_safety.adapters.engine import check_engine
from trl_safety.adapters.files import new_folder
from trl_safety.adapters.lora import lora_modules, unwrap
from trl_safety.adapters.record import AdapterRecord
from trl_safety.config.correction import CorrectionConfig
from trl_safety.config.options import validate
from trl_safety.corrections.base import Correction
from trl_safety.corrections.folder import correct_folder
from trl_safety.corrections.live import correct_model, prepare_for
from trl_safety.corrections.prepared import Prepared
from trl_safety.corrections.registry import correction_for
from trl_safety.errors import AdapterError, ConfigurationError
from trl_safety.reports.report import MethodReport, SafetyReport
from trl_safety.reports.source import adapter_folder, report_source
from trl_safety.subspace.artifact import AlignmentSubspace

logger = logging.getLogger(__name__)

CORRECTED_COPY = Path("safety") / "corrected"
"""Two levels down, because Transformers treats an adapter folder directly inside a checkpoint as a second adapter of the model."""

RUN_CORRECTION = "trl_safety_correction"
"""Attribute of a run's `TrainerState` that holds its correction callback."""


class CorrectionCallback(TrainerCallback):
    """Correct the adapter when training ends, so that the next `save_model()` writes the corrected one.

    Works with any Transformers `Trainer` on a PEFT model. It acts after `load_best_model_at_end`. Intermediate checkpoints stay
    uncorrected, so that they can be resumed; their `safety_report.json` says so.

    Args:
        subspace: an `AlignmentSubspace`, its file or a Hub id; None for a correction that does not read one.
        correction: the options of a correction (an instance of a `CorrectionConfig` subclass), or the correction itself.
        skip_modules: modules to leave alone.

    Raises:
        SubspaceError: the subspace cannot be read.
        ConfigurationError: the options do not belong to a correction.
    """

    def __init__(
        self,
        subspace: AlignmentSubspace | str | Path | None,
        correction: Correction | CorrectionConfig,
        skip_modules: Iterable[str] = (),
    ) -> None:
        self.subspace = subspace if isinstance(subspace, AlignmentSubspace | None) else AlignmentSubspace.from_pretrained(subspace)
        self.correction = correction if isinstance(correction, Correction) else correction_for(correction)
        self.skip_modules = tuple(skip_modules)
        self._others: Callable[[], list[MethodReport]] = list
        self._run: object = None
        self._adapter: str | None = None
        self.switched_off: list[str] = []
        """What was switched off in the trainer's options, for the report."""
        self.result: SafetyReport | None = None

    def prepare(self, model: nn.Module, *, trained: bool = False) -> Prepared:
        """Check that the correction will be able to act. Raises `AdapterError` or `SubspaceError` if it will not. For `trained` see `prepare`."""
        prepared = prepare_for(model, self.subspace, self.correction, self.skip_modules, self._adapter, trained=trained)
        prepared.switched_off = self.switched_off
        return prepared

    def join(self, run: object, others: Callable[[], list[MethodReport]]) -> None:
        """Include the reports of other methods, which act before this one, in the run of this `TrainerState`."""
        self._run, self._others = run, others

    def reports(self) -> list[MethodReport]:
        """The methods' reports so far, this correction's last: what it did, or that it has yet to act."""
        return list(self.result.methods) if self.result else self.correction.reports(self._others(), None)

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        """Check the adapter, and make the checkpoints' reports say that they are uncorrected."""
        check_engine(self.correction.name, self.correction.config)
        if self._run is not state:
            # They belong to a run that was interrupted.
            self._others = list
        if self.correction.config.excludes:
            # The state lives as long as the run, and all of the run's callbacks see it.
            other = vars(state).setdefault(RUN_CORRECTION, self)
            if other is not self:
                raise ConfigurationError(
                    f"callbacks: {other.correction.name} and {self.correction.name} would both rewrite the trained adapter: keep one of them"
                )
        if self.correction.config.corrected_checkpoints and args.save_strategy == "no":
            raise ConfigurationError(
                f"{self.correction.name}.corrected_checkpoints = True: save_strategy = 'no' writes no checkpoint to put a corrected copy into; set "
                "save_strategy, or remove corrected_checkpoints"
            )
        if self.correction.keeps_uncorrected and state.is_world_process_zero:
            folder = (Path(args.output_dir) / self.correction.keeps_uncorrected).parent
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise AdapterError(
                    f"output_dir = {args.output_dir!r}: {str(folder)!r} cannot be created ({error.strerror}); the user's adapter is kept there"
                ) from error
        self._adapter, self.result = None, None
        prepared = self.prepare(model)
        self._adapter = prepared.adapter
        report_source(model, prepared.adapter).live(
            lambda: prepared.report(self.subspace, self.reports(), final=False).model_copy(update={"protected": False})
        )

    def on_save(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        """Write the corrected copy of a checkpoint if that is asked for."""
        if not self.correction.config.corrected_checkpoints or not state.is_world_process_zero:
            return
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        assert self._adapter is not None  # noqa: S101  # set when training began
        saved = adapter_folder(unwrap(model), checkpoint, self._adapter)
        # A resumed run may save the same checkpoint again.
        correct_folder(saved, checkpoint / CORRECTED_COPY, self.subspace, self.correction, skip_modules=self.skip_modules, replace=True)

    def on_train_end(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        """Correct, in memory, the adapter that was checked at the start."""
        others = self._others()
        prepared = self.prepare(model, trained=True)
        if self.correction.keeps_uncorrected and state.is_world_process_zero:
            self._keep(unwrap(model), Path(args.output_dir) / self.correction.keeps_uncorrected, prepared)
        self.result = correct_model(model, self.subspace, self.correction, prepared, others, self.skip_modules)
        self._others = list
        if state.is_world_process_zero:
            own = self.result.methods[-1]
            # As a warning, so that it is shown: users should know if a correction erased most of an update, or did nothing.
            logger.warning("%s: %s", own.source, own.summary)

    def _keep(self, model: nn.Module, place: Path, prepared: Prepared) -> None:
        """Save the adapter as it was trained, with a record of the model that it belongs to."""
        with new_folder(place, error=AdapterError, setting="output_dir", replace=True) as folder:
            cast(Any, model).save_pretrained(str(folder), selected_adapters=[prepared.adapter])
            layers = {module.name: module.layer.get_base_layer() for module in lora_modules(model, prepared.adapter)}
            record = AdapterRecord.of_layers("user", prepared.base_model, layers)
            record.write(adapter_folder(model, folder, prepared.adapter))


class NamedCallback(CorrectionCallback):
    """Base of the callbacks that are named after one correction and take its options as keywords.

    Args:
        subspace: an `AlignmentSubspace`, its file or a Hub id.
        skip_modules: modules to leave alone.
        **options: the correction's options; see `options`.

    Raises:
        ConfigurationError: an option is unknown or out of range.
        SubspaceError: the subspace cannot be read.
    """

    options: ClassVar[type[CorrectionConfig]]
    name: ClassVar[str]

    def __init__(self, subspace: AlignmentSubspace | str | Path, *, skip_modules: Iterable[str] = (), **options: Any) -> None:
        given = {key: value for key, value in options.items() if value is not None}
        super().__init__(subspace, validate(self.options, given, self.name), skip_modules)
