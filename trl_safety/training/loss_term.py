"""A method that adds a term to the loss, counted once per optimizer step whatever the accumulation and the loss normalisation."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from trl_safety.config.method import MethodOptions
from trl_safety.errors import ConfigurationError
from trl_safety.training.compat import scaling_class, trainer_divides_loss
from trl_safety.training.method import Context, Inner, TrainingMethod


class LossTerm(TrainingMethod):
    """L + weight · term. With a weight of 0 nothing is computed, and the run equals the parent's bit for bit."""

    def __init__(self, config: MethodOptions, context: Context) -> None:
        super().__init__(config, context)
        self._scaling_checked = False
        self._combined: Tensor | None = None

    @abstractmethod
    def term(self) -> Tensor:
        """The term without its weight, 0-dimensional, float32 or better, differentiable in the adapter's factors."""

    def share(self, steps: int) -> float:
        """The share of an optimizer step's term that this micro-batch carries; by default equal for all `steps` accumulated ones."""
        return 1 / steps

    @property
    def duties(self) -> tuple[str, ...]:
        """The term, unless its weight is 0."""
        return (self.name,) if self.config.weight > 0 else ()

    def loss(self, inner: Inner, model: Any, inputs: Any, return_outputs: bool, items: Any) -> Any:
        """The loss of one micro-batch plus its share of the term, scaled for the division that the Trainer still makes."""
        result = inner(model, inputs, return_outputs, items)
        trainer = self.context.trainer
        steps = trainer.current_gradient_accumulation_steps
        share = self.share(steps) if self.config.weight > 0 else 0.0
        if share == 0:
            return result
        factor = share * (steps if trainer_divides_loss(trainer, items) else 1)
        loss = (result[0] if return_outputs else result) + self.config.weight * factor * self.term()
        self.mark()
        if not self._scaling_checked:
            self._combined = loss.detach()
        return (loss, result[1]) if return_outputs else loss

    def after_backward(self, returned: Any, items: Any) -> None:
        """With gradient accumulation, check once that the trainer scaled the loss as the term's weight assumes.

        Raises:
            ConfigurationError: it did not.
        """
        trainer = self.context.trainer
        steps = trainer.current_gradient_accumulation_steps
        if self._combined is None or steps == 1:
            return
        divisor = steps if trainer_divides_loss(trainer, items) else 1
        if not torch.allclose(self._combined.mean() / divisor, returned, rtol=1e-3, atol=1e-8, equal_nan=True):
            raise ConfigurationError(
                f"gradient_accumulation_steps = {steps}: {scaling_class(trainer).__name__} scales the loss in a way "
                f"that trl-safety does not know, so {self.name}.weight would not have its stated effect; use gradient_accumulation_steps=1"
            )
        self._combined, self._scaling_checked = None, True
