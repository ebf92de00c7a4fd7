"""AsFT in training: the penalty of a model's active adapter, and its weight in the loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trl_safety.adapters.lora import lora_modules
from trl_safety.config.asft import AsftConfig
from trl_safety.config.options import Operator as OperatorName
from trl_safety.errors import ConfigurationError
from trl_safety.subspace.artifact import AlignmentSubspace
from trl_safety.training.compat import scaling_class, trainer_divides_loss
from trl_safety.training.factor_groups import FactorGroups
from trl_safety.training.method import Context, Inner, TrainingMethod


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


class Asft(TrainingMethod):
    """The loss term λ·penalty, counted once per optimizer step whatever the accumulation and the loss normalisation."""

    name = "asft"
    action = "penalised"
    covers_past = True
    measures = True
    config: AsftConfig

    def __init__(self, config: AsftConfig, context: Context) -> None:
        super().__init__(config, context)
        assert context.groups is not None  # noqa: S101  # `measures`
        self._groups = context.groups
        self._scaling_checked = False
        self._combined: Tensor | None = None

    @property
    def duties(self) -> tuple[str, ...]:
        """The term in every loss, where it has a weight."""
        return (self.name,) if self.config.weight > 0 else ()

    @property
    def idle(self) -> str | None:
        """A weight of 0 measures alone."""
        return "weight 0: the penalty was measured, nothing was protected" if self.config.weight == 0 else None

    def loss(self, inner: Inner, model: Any, inputs: Any, return_outputs: bool, items: Any) -> Any:
        """The loss of one micro-batch plus its share of the penalty.

        An optimizer step sums the gradients of n micro-batches. Each gets λ·penalty/n after whatever the Trainer still
        divides by; with `paper_lambda` each gets λ·penalty, as in the authors' code, so that λ grows with accumulation.
        """
        result = inner(model, inputs, return_outputs, items)
        if self.config.weight == 0:
            return result
        trainer = self.context.trainer
        steps = trainer.current_gradient_accumulation_steps
        factor = steps if trainer_divides_loss(trainer, items) else 1
        if not self.config.paper_lambda:
            factor /= steps
        term = self.config.weight * factor * self._groups.penalty(self.config.scaled)
        loss = (result[0] if return_outputs else result) + term
        self.mark()
        if not self._scaling_checked:
            self._combined = loss.detach()
        return (loss, result[1]) if return_outputs else loss

    def after_backward(self, returned: Any, items: Any) -> None:
        """In the first accumulated micro-batch, a check that the trainer scaled the loss as the penalty's weight assumes."""
        trainer = self.context.trainer
        steps = trainer.current_gradient_accumulation_steps
        if self._combined is None or steps == 1:
            return
        divisor = steps if trainer_divides_loss(trainer, items) else 1
        if not torch.allclose(self._combined.mean() / divisor, returned, rtol=1e-3, atol=1e-8, equal_nan=True):
            raise ConfigurationError(
                f"gradient_accumulation_steps = {steps}: {scaling_class(trainer).__name__} scales the loss in a way "
                "that trl-safety does not know, so that asft.weight would not be what it says; use gradient_accumulation_steps=1"
            )
        self._combined, self._scaling_checked = None, True

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
