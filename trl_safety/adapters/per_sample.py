"""Gradients of single samples with respect to LoRA factors, from one batched backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from trl_safety.adapters.lora import LoraModule
from trl_safety.errors import AdapterError


class FlatFactors:
    """All LoRA factors as one vector of P entries: the place of each, and reading and writing gradients.

    The vector is float32 (float64 for float64 factors) on the first factor's device.
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
        """An empty tensor of the vector's dtype and device."""
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


class Consumer(Protocol):
    """Takes the per-sample gradients of one factor."""

    def take(self, place: slice, gradients: Tensor) -> None:
        """`gradients` is (samples, entries of the factor), and is not used again afterwards."""


class Collect:
    """Keeps the gradients of all samples: (samples, P). For one batch, never for a pool."""

    def __init__(self, flat: FlatFactors, samples: int) -> None:
        self.matrix = flat.zeros(samples)

    def take(self, place: slice, gradients: Tensor) -> None:
        """See `Consumer`."""
        self.matrix[:, place] += gradients.to(self.matrix.device)


class Dots:
    """Keeps inner products with a direction (P,) and squared norms, and no gradient."""

    def __init__(self, direction: Tensor, samples: int) -> None:
        self._direction = direction
        self._seen: set[int] = set()
        self.dots = direction.new_zeros(samples)
        self.squares = direction.new_zeros(samples)

    def take(self, place: slice, gradients: Tensor) -> None:
        """See `Consumer`."""
        if place.start in self._seen:
            raise AdapterError("an adapted layer is used twice in one forward pass, so that its references cannot be scored in a stream")
        self._seen.add(place.start)
        gradients = gradients.to(self._direction.device, self._direction.dtype)
        self.dots += gradients @ self._direction[place]
        self.squares += gradients.square().sum(1)


class Total:
    """Keeps the sum over samples: (P,)."""

    def __init__(self, flat: FlatFactors) -> None:
        self.vector = flat.zeros()

    def take(self, place: slice, gradients: Tensor) -> None:
        """See `Consumer`."""
        self.vector[place] += gradients.sum(0).to(self.vector.device)


@contextmanager
def per_sample_gradients(flat: FlatFactors, samples: int, consumer: Consumer) -> Iterator[None]:
    """Within the block, a forward and backward give each sample's gradient to `consumer` and leave the factors' `.grad` alone.

    For a linear y = x Wᵀ the gradient of sample i is Σₜ δᵢₜ xᵢₜᵀ: one batched product per factor, in place of the sum that the
    plain backward computes. Works with both kinds of gradient checkpointing, autocast, dropout (the gradient is that of the
    mask drawn) and quantised base layers.

    Args:
        flat: the factors.
        samples: rows of the batch.
        consumer: takes (samples, entries) per factor, in the dtype of the backward pass or float32.

    Raises:
        AdapterError: a layer's input has no sample dimension, or, on exit, a factor had no gradient: a fused kernel
            bypassed it, for example.
    """
    used: set[int] = set()

    def record(place: slice, name: str) -> Callable[[Tensor, Tensor], None]:
        def consume(x: Tensor, delta: Tensor) -> None:
            if x.ndim != 3 or x.shape[0] != samples:
                raise AdapterError(
                    f"layer {name!r} sees an input of shape {tuple(x.shape)}, in which the {samples} samples of the batch cannot be told apart "
                    "(mixture-of-experts and packed rows flatten them): leave it out of target_modules, and turn packing off"
                )
            used.add(place.start)
            consumer.take(place, torch.bmm(delta.mT, x.to(delta.dtype)).flatten(1).to(torch.promote_types(delta.dtype, torch.float32)))

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
            f"{len(unused)} of {len(flat.factors)} LoRA factors had no gradient in the backward pass, {unused[0]!r} first: a fused kernel "
            "(lora_qkv_kernel, lora_o_kernel, lora_mlp_kernel) bypasses them, or the layer is not used; turn the kernel off or leave the layer out of "
            "target_modules"
        )


def _recording(linear: nn.Linear, consume: Callable[[Tensor, Tensor], None]) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return functional.linear(x, linear.weight)
        result: Tensor = _Record.apply(x, linear.weight, consume)  # type: ignore[no-untyped-call]
        return result

    return forward


class _Record(torch.autograd.Function):
    """x Wᵀ whose backward hands (x, δ) over instead of computing the weight's gradient.

    What it saves goes through `save_for_backward`, so that checkpointing and offloading work as for any operation.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, consume: Callable[[Tensor, Tensor], None]) -> Tensor:
        device = x.device.type
        ctx.dtype = x.dtype
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        ctx.consume = consume
        ctx.save_for_backward(x, weight)
        with torch.autocast(device, enabled=False):
            return functional.linear(x, weight.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None]:
        (delta,) = gradients
        x, weight = ctx.saved_tensors
        with torch.no_grad(), torch.autocast(delta.device.type, enabled=False):
            ctx.consume(x, delta)
            return (delta @ weight.to(delta.dtype)).to(ctx.dtype) if ctx.needs_input_grad[0] else None, None, None
