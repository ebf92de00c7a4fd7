"""The gradient of every document of a batch with respect to the LoRA factors, from a single backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from trl_safety.adapters.documents import Documents
from trl_safety.adapters.lora import LoraModule
from trl_safety.errors import AdapterError


class FlatFactors:
    """All LoRA factors laid out as one vector of P entries.

    The vector is float32 (float64 for float64 factors) and lives on the first factor's device.

    Attributes:
        factors: the name of each factor, its module, and its place in the vector.
        size: P.
    """

    def __init__(self, modules: Sequence[LoraModule]) -> None:
        self.factors: list[tuple[str, nn.Linear, slice]] = []
        start = 0
        for module in modules:
            for side in ("lora_A", "lora_B"):
                linear = getattr(module.layer, side)[module.adapter]
                place = slice(start, start + linear.weight.numel())
                self.factors.append((f"{module.name}.{side}", linear, place))
                start = place.stop
        self.size = start

    @property
    def like(self) -> Tensor:
        """An empty tensor with the vector's dtype and device."""
        weight = self.factors[0][1].weight
        return weight.new_empty(0, dtype=torch.promote_types(weight.dtype, torch.float32))

    def zeros(self, *shape: int) -> Tensor:
        """Zeros of (*shape, P)."""
        return self.like.new_zeros(*shape, self.size)

    def add_to_gradients(self, flat: Tensor) -> None:
        """Add a vector (P,) to the factors' `.grad`."""
        for _, linear, place in self.factors:
            weight = linear.weight
            part = flat[place].view(weight.shape).to(weight.device, weight.dtype)
            weight.grad = part.clone() if weight.grad is None else weight.grad.add_(part)

    def with_gradient(self, value: Tensor, flat: Tensor) -> Tensor:
        """A loss of this value whose backward pass gives the factors a vector (P,) as their gradient."""
        weights = [linear.weight for _, linear, _ in self.factors]
        gradients = [flat[place].view(weight.shape).to(weight) for weight, (_, _, place) in zip(weights, self.factors, strict=True)]
        loss: Tensor = _Given.apply(value, gradients, *weights)  # type: ignore[no-untyped-call]
        return loss


class _Given(torch.autograd.Function):
    """A value that does not depend on its parameters, and gradients that were computed elsewhere."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *weights: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = outer
        return None, None, *(gradient * scale for gradient in ctx.gradients)


class Consumer(Protocol):
    """Takes the documents' gradients of one factor at a time."""

    def take(self, place: slice, gradients: Tensor) -> None:
        """`gradients` is (documents, entries of the factor). It is not used again afterwards."""


class Collect:
    """Keeps every gradient: (documents, P). Meant for one batch, never for a pool."""

    def __init__(self, flat: FlatFactors, count: int) -> None:
        self.matrix = flat.zeros(count)

    def take(self, place: slice, gradients: Tensor) -> None:
        """See `Consumer`."""
        self.matrix[:, place] += gradients.to(self.matrix.device)


class Dots:
    """Keeps each gradient's inner product with a direction (P,) and its squared norm, but no gradient."""

    def __init__(self, direction: Tensor, count: int) -> None:
        self._direction = direction
        self._seen: set[int] = set()
        self.dots = direction.new_zeros(count)
        self.squares = direction.new_zeros(count)

    def take(self, place: slice, gradients: Tensor) -> None:
        """See `Consumer`."""
        if place.start in self._seen:
            raise AdapterError("an adapted layer is used twice in one forward pass, so the references cannot be scored as a stream")
        self._seen.add(place.start)
        gradients = gradients.to(self._direction.device, self._direction.dtype)
        self.dots += gradients @ self._direction[place]
        self.squares += gradients.square().sum(1)


class Total:
    """Keeps the sum over the documents: (P,)."""

    def __init__(self, flat: FlatFactors) -> None:
        self.vector = flat.zeros()

    def take(self, place: slice, gradients: Tensor) -> None:
        """See `Consumer`."""
        self.vector[place] += gradients.sum(0).to(self.vector.device)


@contextmanager
def per_sample_gradients(flat: FlatFactors, documents: Documents, consumer: Consumer) -> Iterator[None]:
    """Inside this context, a forward and backward pass hands each document's gradient to `consumer` and leaves the factors' `.grad` alone.

    For a linear y = x Wᵀ, document i contributes Σₜ δₜ xₜᵀ over its own tokens t: one product per document and factor replaces the sum over
    all tokens that the plain backward computes. This works with both kinds of gradient checkpointing, autocast, dropout (the gradient is
    that of the mask drawn) and quantised base layers.

    Where a row holds several documents, the result is each document's own gradient only if no document attends to another and no label is
    predicted from another document's token. The caller sees to both.

    Args:
        flat: the factors.
        documents: where the batch's documents lie.
        consumer: takes (documents, entries) per factor, in the dtype of the backward pass or float32.

    Raises:
        AdapterError: a layer's input no longer has the batch's rows and tokens, or, on leaving, a factor had no gradient, for example
            because a fused kernel bypassed it.
    """
    used: set[int] = set()

    def record(place: slice, name: str) -> Callable[[Tensor, Tensor], None]:
        def consume(x: Tensor, delta: Tensor) -> None:
            if not documents.fit(x):
                raise AdapterError(
                    f"layer {name!r} sees an input of shape {tuple(x.shape)}, in which the {documents.count} samples of the batch cannot be told apart "
                    "(mixture-of-experts layers reorder the tokens): leave the layer out of target_modules"
                )
            used.add(place.start)
            products = documents.products(delta, x.to(delta.dtype)).flatten(1)
            consumer.take(place, products.to(torch.promote_types(delta.dtype, torch.float32)))

        return consume

    patched = []
    try:
        for name, linear, place in flat.factors:
            vars(linear)["forward"] = _recording(linear, record(place, name))
            patched.append(linear)
        yield
    finally:
        for linear in patched:
            del vars(linear)["forward"]
    unused = [name for name, _, place in flat.factors if place.start not in used]
    if unused:
        raise AdapterError(
            f"{len(unused)} of {len(flat.factors)} LoRA factors got no gradient from the backward pass, {unused[0]!r} among them: a fused kernel "
            "(lora_qkv_kernel, lora_o_kernel, lora_mlp_kernel) bypasses the layer, or the model does not use it; turn the kernel off or leave the layer out of "
            "target_modules"
        )


def _recording(linear: nn.Linear, consume: Callable[[Tensor, Tensor], None]) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return functional.linear(x, linear.weight)
        # Engines watch for the weight's own gradient, which there is none of: an empty leaf stands in for it.
        leaf = linear.weight.new_empty(0, requires_grad=True)
        result: Tensor = _Record.apply(x, linear.weight.detach(), leaf, consume)  # type: ignore[no-untyped-call]
        return result

    return forward


class _Record(torch.autograd.Function):
    """x Wᵀ, whose backward hands over (x, δ) instead of computing the weight's gradient.

    It saves its tensors with `save_for_backward`, so checkpointing and offloading treat it like any other operation.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, leaf: Tensor, consume: Callable[[Tensor, Tensor], None]) -> Tensor:
        device = x.device.type
        ctx.dtype = x.dtype
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        ctx.consume = consume
        ctx.save_for_backward(x, weight)
        with torch.autocast(device, enabled=False):
            return functional.linear(x, weight.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, None]:
        (delta,) = gradients
        x, weight = ctx.saved_tensors
        with torch.no_grad(), torch.autocast(delta.device.type, enabled=False):
            ctx.consume(x, delta)
            return (delta @ weight.to(delta.dtype)).to(ctx.dtype) if ctx.needs_input_grad[0] else None, None, None, None
