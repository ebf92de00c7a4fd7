"""The signed vector in training: another part of V in the frozen weights, and V added to the adapter when training ends."""

from __future__ import annotations

from typing import cast

from torch import Tensor

from trl_safety.config.alignment_buffer import BufferOptions
from trl_safety.config.signed_vector import SignedVectorConfig
from trl_safety.corrections.callback import CorrectionCallback
from trl_safety.corrections.signed_vector import PENDING, SignedVectorCorrection
from trl_safety.methods.signed_vector import unprotected
from trl_safety.reports.report import LayerReport, MethodReport
from trl_safety.subspace.layer import LayerSubspace
from trl_safety.training.alignment_buffer import AlignmentBuffer
from trl_safety.training.method import Context


class SignedVector(AlignmentBuffer):
    """Both ends of one protected run: the buffer with γ = −a while it trains, and the alignment vector with γ = b at its end.

    Raises:
        ConfigurationError: the pair is not named, or another option keeps the method from acting.
        CheckpointError, AdapterError, SubspaceError: the pair or the subspace does not match the model.
    """

    name = "signed_vector"

    def __init__(self, config: BufferOptions, context: Context) -> None:
        self._options = cast(SignedVectorConfig, config)
        self._vector = SignedVectorCorrection(self._options.served())
        super().__init__(config, context)
        if self._options.serve:
            self.pending = PENDING
            self.last = CorrectionCallback(context.subspace, self._vector, context.block.skip_modules)
            self.last.prepare(context.trainer.model)

    def directions(self, layer: LayerSubspace) -> tuple[Tensor, Tensor, Tensor]:
        """U, σ and Z of the leading directions that `rank` keeps, as they are served.

        Raises:
            SubspaceError: V is kept whole, or has fewer directions.
        """
        self._vector.check({layer.name: layer})
        U, values, Z = super().directions(layer)
        kept = slice(self._options.rank)
        return U[:, kept], values[kept], Z[:, kept]

    @property
    def idle(self) -> str | None:
        """(0, 0) is plain fine-tuning."""
        return unprotected(0, 0) if self._options.train == self._options.serve == 0 else None

    def report(self, steps: int) -> MethodReport:
        """See `TrainingMethod.report`; a point of the family that is no protection is not reported as one."""
        found = super().report(steps)
        if self._options.train == 0:
            # Nothing has been done to any layer yet.
            reason = self.idle or "trained on W_aligned itself"
            left = {name: LayerReport(action="left_alone", reason=reason, measured=row.measured) for name, row in found.layers.items()}
            found = found.model_copy(update={"layers": left})
        why = unprotected(self._options.train, self._options.serve)
        if why is None or self.idle or self.pending:
            return found
        return found.model_copy(update={"acted": False, "summary": f"{found.summary}; NOT a protection: {why}"})
