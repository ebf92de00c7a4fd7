"""AsFT in training: the penalty of a model's active adapter, and its weight in the loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trl_safety.adapters.lora import lora_modules
from trl_safety.config.asft import AsftConfig
from trl_safety.config.options import Operator as OperatorName
from trl_safety.reports.report import SOURCES, LayerReport, MethodReport
from trl_safety.subspace.artifact import AlignmentSubspace
from trl_safety.training.compat import trainer_divides_loss
from trl_safety.training.factor_groups import FactorGroups


def asft_penalty(peft_model: nn.Module, subspace: AlignmentSubspace, scaled: bool = False, *, operator: OperatorName = "scaled") -> Tensor:
    """Σ over adapted layers of ‖(I − C)ΔW‖²_F (AsFT, arXiv 2506.08473), with gradients to the LoRA factors.

    Args:
        peft_model: a model with one active LoRA adapter.
        subspace: must hold every adapted layer.
        scaled: ΔW = s·B·A with PEFT's scaling s; by default ΔW = B·A as in the authors' code.
        operator: "scaled" is the authors' C = VVᵀ/‖V‖_F, "orthogonal" the projector onto the subspace.

    Returns:
        A 0-dimensional float32 tensor (float64 for float64 factors). Differs from the authors' code in that nothing of size
        out × out is formed.

    Raises:
        AdapterError: no LoRA adapter, or one of another kind.
        SubspaceError: an adapted layer is not in the subspace.
    """
    modules = lora_modules(peft_model)
    return FactorGroups(modules, subspace.for_modules([module.name for module in modules]), operator).penalty(scaled)


class AsftTerm:
    """The loss term λ·penalty, counted once per optimizer step whatever the accumulation and the loss normalisation."""

    def __init__(self, config: AsftConfig, groups: FactorGroups) -> None:
        self.config = config
        self._groups = groups

    def loss(self, trainer: Any, num_items_in_batch: Any) -> Tensor:
        """What to add to the loss of one micro-batch.

        An optimizer step sums the gradients of n micro-batches. Each gets λ·penalty/n after whatever the Trainer still
        divides by; with `paper_lambda` each gets λ·penalty, as in the authors' code, so that λ grows with accumulation.
        """
        steps = trainer.current_gradient_accumulation_steps
        factor = steps if trainer_divides_loss(trainer, num_items_in_batch) else 1
        if not self.config.paper_lambda:
            factor /= steps
        return self.config.weight * factor * self._groups.penalty(self.config.scaled)

    def penalty(self) -> float:
        """The penalty now, without its weight."""
        with torch.no_grad():
            return self._groups.penalty(self.config.scaled).item()

    def report(self, first_step: int, steps: int, start_norm: float) -> MethodReport:
        """What the penalty did until now.

        Args:
            first_step: the steps before it, in a resumed run, were trained without the penalty.
            steps: optimizer steps so far.
            start_norm: ‖ΔW‖ of an adapter that was trained before.
        """
        measured = self._groups.measure()
        acted = self.config.weight > 0 and first_step == 0 and steps > 0
        if self.config.weight == 0:
            summary = "weight 0: the penalty was measured, nothing was protected"
        else:
            summary = f"penalty of weight {self.config.weight:g} on {len(measured)} layers in optimizer steps {first_step + 1} to {steps}"
            if first_step:
                summary += f"; steps 1 to {first_step} were trained without it"
            if start_norm:
                summary += f"; the adapter came with an update of norm {start_norm:.3g}"
        action = "penalised" if acted else "left_alone"
        return MethodReport(
            name="asft",
            source=SOURCES["asft"],
            reconstruction=False,
            settings=self.config.model_dump(),
            acted=acted,
            summary=summary,
            steps=(first_step + 1, steps) if steps > first_step else None,
            layers={
                name: LayerReport.model_validate({"action": action, "reason": None if acted else summary, "measured": row})
                for name, row in measured.items()
            },
        )
