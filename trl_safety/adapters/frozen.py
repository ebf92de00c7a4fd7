"""A saved LoRA adapter that acts on a live model for a while: attached by hooks, and neither trained nor saved with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional

from trl_safety.adapters.folder import Factors
from trl_safety.adapters.lora import linear_layers, linear_shape
from trl_safety.adapters.names import match
from trl_safety.errors import AdapterError


class FrozenAdapter:
    """y ← y + s·B·(A·x) in every layer of a saved adapter, while it is attached.

    The factors are not parameters or buffers of the model: no optimizer, `state_dict`, `save_pretrained` or list of active
    adapters knows of them, so PEFT never treats them as a second adapter (making it trainable, saving it).
    No dropout acts on them. A 4-bit base stays as it is.

    Args:
        model: with or without an adapter of its own.
        saved: module name → the adapter's factors. They are kept in float32, or in float64 if they are stored in it.
        setting: how the user named it, for messages.

    Attributes:
        layers: module name in `saved` → the model's linear layer, without PEFT's wrapper.

    Raises:
        AdapterError: a layer of the adapter is not in the model, or has another shape.
    """

    def __init__(self, model: nn.Module, saved: Mapping[str, Factors], setting: str) -> None:
        self.setting = setting
        self._scalings = {name: factors.scaling for name, factors in saved.items()}
        self._factors: dict[str, tuple[Tensor, Tensor]] = {}
        self._modules: dict[str, nn.Module] = {}
        self.layers: dict[str, Any] = {}
        self._fired: set[str] = set()
        self._checked = False
        available = linear_layers(model)
        for name, found in match(saved, available).items():
            if found is None:
                raise AdapterError(f"{setting}: its layer {name!r} is not in the model: it was made for another one")
            module = available[found]
            layer = module.get_base_layer() if isinstance(module, LoraLayer) else module
            factors = saved[name]
            if factors.shape != linear_shape(layer):
                raise AdapterError(
                    f"{setting}: its layer {name!r} is {factors.shape[0]} × {factors.shape[1]}, but {' × '.join(map(str, linear_shape(layer)))} in the model: it "
                    "was made for another one"
                )
            self._modules[name], self.layers[name] = module, layer
            self._factors[name] = tuple(t.detach().to(torch.promote_types(t.dtype, torch.float32)) for t in (factors.B, factors.A))  # type: ignore[assignment]

    @contextmanager
    def attached(self, gates: Mapping[str, Tensor] | None = None) -> Iterator[None]:
        """Attached within the block, and detached when it ends, however it ends.

        Args:
            gates: module → a factor of its update, 0-dimensional, differentiable: at 0 nothing changes, and its gradient is the
                loss's slope along the update.
        """
        handles = [module.register_forward_hook(self._hook(name, (gates or {}).get(name))) for name, module in self._modules.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def in_step(self) -> Iterator[None]:
        """Attached for one training step; after the first, checks that the adapter acted in every layer.

        Raises:
            AdapterError: see `check_fired`.
        """
        with self.attached():
            yield
        if not self._checked:
            self.check_fired()
            self._checked = True

    def check_fired(self) -> None:
        """Check that the forward passes bypassed the adapter in no layer.

        Raises:
            AdapterError: naming the first such layer.
        """
        silent = [name for name in self._modules if name not in self._fired]
        if silent:
            raise AdapterError(
                f"{self.setting}: did not act in {len(silent)} of {len(self._modules)} layers, {silent[0]!r} first: a fused kernel (lora_qkv_kernel, "
                "lora_o_kernel, lora_mlp_kernel) or a compiled model bypasses them; turn it off"
            )

    def _hook(self, name: str, gate: Tensor | None) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
        scaling = self._scalings[name]

        def add(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            x = args[0]
            B, A = self._factors[name]
            if A.device != x.device:
                # Layers of one model may be on several devices; each pair of factors moves to its layer once.
                B, A = self._factors[name] = B.to(x.device), A.to(x.device)
            self._fired.add(name)
            update = functional.linear(functional.linear(x.to(A.dtype), A) * scaling, B)
            return output + (update if gate is None else gate.to(update) * update).to(output.dtype)

        return add
