"""The method in training, and its mathematics."""

from trl_safety import TrainingMethod


def squared_norm(B, A, scaling):
    """‖s·B·A‖²_F through two r × r Grams."""
    return scaling**2 * ((B.mT @ B) * (A @ A.mT)).sum()


class ToyDecay(TrainingMethod):
    """Adds λ Σ ‖ΔW‖²_F to the loss of every micro-batch."""

    name = "toy_decay"
    action = "held"
    covers_past = True

    def _penalty(self):
        return sum(squared_norm(module.B, module.A, module.scaling) for module in self.context.prepared.covered)

    def loss(self, inner, model, inputs, return_outputs, items):
        result = inner(model, inputs, return_outputs, items)
        loss = (result[0] if return_outputs else result) + self.config.weight * self._penalty()
        self.mark()
        return (loss, result[1]) if return_outputs else loss

    def metrics(self):
        return {"toy_decay": float(self._penalty())}

    def describe(self, first, last):
        return f"decay of weight {self.config.weight:g} in optimizer steps {first} to {last}"
