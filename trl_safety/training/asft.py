"""AsFT in training: the penalty on a model's active adapter, and its term in the loss."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from trl_safety.adapters.lora import lora_modules
from trl_safety.config.asft import AsftConfig
from trl_safety.config.options import Operator as OperatorName
from trl_safety.subspace.artifact import AlignmentSubspace
from trl_safety.training.factor_groups import FactorGroups
from trl_safety.training.loss_term import LossTerm
from trl_safety.training.method import Context


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
        AdapterError: there is no LoRA adapter, or it is of an unsupported kind.
        SubspaceError: an adapted layer is not in the subspace.
    """
    modules = lora_modules(peft_model)
    return FactorGroups(modules, subspace.for_modules([module.name for module in modules]), operator).penalty(scaled)


class Asft(LossTerm):
    """The loss term λ·penalty."""

    name = "asft"
    action = "penalised"
    covers_past = True
    measures = True
    config: AsftConfig

    def __init__(self, config: AsftConfig, context: Context) -> None:
        super().__init__(config, context)
        assert context.groups is not None  # noqa: S101  # `measures`
        self._groups = context.groups

    @property
    def idle(self) -> str | None:
        """With a weight of 0 the penalty is only measured."""
        return "weight 0: the penalty was measured, nothing was protected" if self.config.weight == 0 else None

    def term(self) -> Tensor:
        """See `LossTerm.term`."""
        return self._groups.penalty(self.config.scaled)

    def share(self, steps: int) -> float:
        """With `paper_lambda` every micro-batch carries the whole term, as in the authors' code, so that λ grows with accumulation."""
        return 1.0 if self.config.paper_lambda else super().share(steps)

    def penalty(self) -> float:
        """The penalty now, without its weight."""
        with torch.no_grad():
            return self._groups.penalty(self.config.scaled).item()

    def metrics(self) -> dict[str, float]:
        """The penalty, and what it adds to the loss of an optimizer step."""
        penalty = self.penalty()
        counted = self.context.trainer.current_gradient_accumulation_steps if self.config.paper_lambda else 1
        return {"asft_penalty": penalty, "asft_loss": penalty * self.config.weight * counted}

    def describe(self, first: int, last: int) -> str:
        """See `TrainingMethod.describe`."""
        layers = len(self.context.prepared.covered)
        return f"penalty of weight {self.config.weight:g} on {layers} layers in optimizer steps {first} to {last}"

    def measured(self) -> Mapping[str, Mapping[str, float]]:
        """Norms, cosines and penalties of every layer."""
        return self._groups.measure()
