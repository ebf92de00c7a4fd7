"""Corrections as Trainer callbacks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

from torch import nn
from transformers import TrainerCallback

from trl_safety.adapters.lora import unwrap
from trl_safety.config.alignment_vector import AlignmentVectorConfig
from trl_safety.config.csulora import CsuloraConfig
from trl_safety.config.options import Operator, validate
from trl_safety.config.safe_lora import SafeLoraConfig
from trl_safety.corrections.alignment_vector import AlignmentVectorCorrection
from trl_safety.corrections.base import Correction, logger
from trl_safety.corrections.csulora import CsuloraCorrection
from trl_safety.corrections.folder import correct_folder
from trl_safety.corrections.live import check_correction, correct_model
from trl_safety.corrections.prepared import Prepared, prepare
from trl_safety.corrections.safe_lora import SafeLoraCorrection
from trl_safety.errors import ConfigurationError
from trl_safety.reports.report import MethodReport, SafetyReport
from trl_safety.reports.source import adapter_folder, report_source
from trl_safety.subspace.artifact import AlignmentSubspace
from trl_safety.training.engines import check_engine

CORRECTED_COPY = Path("safety") / "corrected"
"""Two levels down: Transformers takes a folder with an adapter directly inside a checkpoint for a second adapter of the model."""

RUN_CORRECTION = "trl_safety_correction"
"""Attribute of a run's `TrainerState`: its correction callback."""


class CorrectionCallback(TrainerCallback):
    """Correct the adapter when training ends, so that the next `save_model()` writes the corrected one.

    Works with any Transformers `Trainer` on a PEFT model. It acts after `load_best_model_at_end`. Checkpoints on the way stay
    resumable and therefore uncorrected; their `safety_report.json` says so.
    """

    def __init__(self, subspace: AlignmentSubspace | str | Path, correction: Correction, skip_modules: Iterable[str] = ()) -> None:
        self.subspace = subspace if isinstance(subspace, AlignmentSubspace) else AlignmentSubspace.from_pretrained(subspace)
        self.correction = correction
        self.skip_modules = tuple(skip_modules)
        self._others: Callable[[], list[MethodReport]] = list
        self._run: object = None
        self._adapter = ""
        self.result: SafetyReport | None = None

    def prepare(self, model: nn.Module) -> Prepared:
        """Check that the correction will be able to act. Raises `AdapterError` or `SubspaceError` where it will not."""
        prepared = prepare(model, self.subspace, self.skip_modules)
        check_correction(model, self.subspace, self.correction, prepared, self.skip_modules)
        return prepared

    def join(self, run: object, others: Callable[[], list[MethodReport]]) -> None:
        """Report other methods, which act while training, in the run of this `TrainerState`."""
        self._run, self._others = run, others

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        """Check, and have checkpoints say that they are uncorrected."""
        check_engine()
        if self._run is not state:
            # Of a run that was interrupted.
            self._others = list
        # The state lives as long as one run, and all of the run's callbacks see it.
        other = vars(state).setdefault(RUN_CORRECTION, self)
        if other is not self:
            raise ConfigurationError(
                f"callbacks: {other.correction.name} and {self.correction.name} would both rewrite the trained adapter: keep one of them"
            )
        if self.correction.config.corrected_checkpoints and args.save_strategy == "no":
            raise ConfigurationError(
                f"{self.correction.name}.corrected_checkpoints = True: save_strategy = 'no' writes no checkpoint that a corrected copy could lie in; set "
                "save_strategy, or leave corrected_checkpoints out"
            )
        prepared = self.prepare(model)
        self._adapter, self.result = prepared.adapter, None
        pending = self.correction.report({}, "acts when training ends; this checkpoint is uncorrected and can be resumed")
        report_source(model, prepared.adapter).live(
            lambda: prepared.report(self.subspace, [*self._others(), pending], final=False).model_copy(update={"protected": False})
        )

    def on_save(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        """Write the corrected copy of a checkpoint where that is asked for."""
        if not self.correction.config.corrected_checkpoints or not state.is_world_process_zero:
            return
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        saved = adapter_folder(unwrap(model), checkpoint, self._adapter)
        # A resumed run comes by the same checkpoint again.
        correct_folder(saved, checkpoint / CORRECTED_COPY, self.subspace, self.correction, skip_modules=self.skip_modules, replace=True)

    def on_train_end(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        """Correct in memory the adapter that was checked at the start."""
        prepared = prepare(model, self.subspace, self.skip_modules, self._adapter)
        self.result = correct_model(model, self.subspace, self.correction, prepared, self._others(), self.skip_modules)
        self._others = list
        if state.is_world_process_zero:
            own = self.result.methods[-1]
            # At a level that is shown: a correction that erased most of an update is as worth knowing as one that did nothing.
            logger.warning("%s: %s", own.source, own.summary)


class AlignmentVectorCallback(CorrectionCallback):
    """Add the alignment vector at the end of training, for any Transformers `Trainer` on a PEFT model.

    Known as RESTA (arXiv 2402.11746). Differs from it in acting on the adapter, of rank r + k then, where that rewrites a merged
    model's weights.

    Args:
        subspace: an `AlignmentSubspace` with a rank, its file, or a Hub id.
        gamma: γ.
        kappa: κ.
        rank: k, of the subspace's directions; default all.
        cut_to: rank to cut the corrected adapter back to; default none.
        all_layers: also add V to layers of the subspace that the adapter does not have.
        dare: share of B's entries that DARE drops.
        seed: of DARE.
        skip_modules: modules to leave alone.
        corrected_checkpoints: write a corrected copy into each checkpoint.

    Raises:
        ConfigurationError: an option is out of bounds.
        SubspaceError: the subspace cannot be read.
    """

    def __init__(
        self,
        subspace: AlignmentSubspace | str | Path,
        *,
        gamma: float = 1.0,
        kappa: float = 1.0,
        rank: int | None = None,
        cut_to: int | None = None,
        all_layers: bool = False,
        dare: float = 0.0,
        seed: int = 0,
        skip_modules: Iterable[str] = (),
        corrected_checkpoints: bool = False,
    ) -> None:
        options = {"gamma": gamma, "kappa": kappa, "rank": rank, "cut_to": cut_to, "all_layers": all_layers, "dare": dare, "seed": seed}
        config = validate(AlignmentVectorConfig, {**options, "corrected_checkpoints": corrected_checkpoints}, "alignment_vector")
        super().__init__(subspace, AlignmentVectorCorrection(config), skip_modules)


class CSULoRACallback(CorrectionCallback):
    """CSULoRA (arXiv 2605.30640), a RECONSTRUCTION, at the end of training, for any Transformers `Trainer` on a PEFT model.

    Checks at the start of training that it will be able to act. Its formula is ours; the paper's is not public.

    Args:
        subspace: an `AlignmentSubspace` with a rank, its file, or a Hub id.
        lambda_partial: λ_M, attenuation of what is aligned on one side only.
        lambda_outside: λ_O, attenuation of what is outside the subspace.
        output_rank: "exact" doubles the adapter's rank, "original" cuts back and reports the energy lost.
        skip_modules: modules to leave alone.
        corrected_checkpoints: write a corrected copy into each checkpoint.

    Raises:
        ConfigurationError: an option is out of bounds.
        SubspaceError: the subspace cannot be read.
    """

    def __init__(
        self,
        subspace: AlignmentSubspace | str | Path,
        *,
        lambda_partial: float = 1.0,
        lambda_outside: float = 1.0,
        output_rank: Literal["exact", "original"] = "exact",
        skip_modules: Iterable[str] = (),
        corrected_checkpoints: bool = False,
    ) -> None:
        options = {
            "lambda_partial": lambda_partial,
            "lambda_outside": lambda_outside,
            "output_rank": output_rank,
            "corrected_checkpoints": corrected_checkpoints,
        }
        super().__init__(subspace, CsuloraCorrection(validate(CsuloraConfig, options, "csulora")), skip_modules)


class SafeLoRACallback(CorrectionCallback):
    """Safe LoRA (arXiv 2405.16833) at the end of training, for any Transformers `Trainer` on a PEFT model.

    Checks at the start of training that it will be able to act. The next `save_model()` writes the corrected adapter and its
    report. Differs from the authors' code, which runs on a finished PEFT model, in pairing layers by name and in forming
    nothing of size out × out.

    Args:
        subspace: an `AlignmentSubspace`, its file, or a Hub id.
        threshold: τ, correct layers with cos(C·ΔW, ΔW) ≤ τ. Default 0.5.
        layers: K, correct the K layers of smallest cosine instead.
        operator: "scaled" (authors) or "orthogonal".
        skip_modules: modules to leave alone.
        corrected_checkpoints: write a corrected copy into each checkpoint.

    Raises:
        ConfigurationError: an option is out of bounds, or both threshold and layers are given.
        SubspaceError: the subspace cannot be read.
    """

    def __init__(
        self,
        subspace: AlignmentSubspace | str | Path,
        *,
        threshold: float | None = None,
        layers: int | None = None,
        operator: Operator = "scaled",
        skip_modules: Iterable[str] = (),
        corrected_checkpoints: bool = False,
    ) -> None:
        options = {"threshold": threshold, "layers": layers, "operator": operator, "corrected_checkpoints": corrected_checkpoints}
        super().__init__(subspace, SafeLoraCorrection(validate(SafeLoraConfig, options, "safe_lora")), skip_modules)
