"""All adapted layers of a model with their alignment operators; layers of one shape are evaluated together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from trl_safety.adapters.lora import LoraModule
from trl_safety.adapters.shards import whole
from trl_safety.linalg.alignment import residual_norm_squared
from trl_safety.linalg.low_rank import product_inner, product_norm_squared, trace_product
from trl_safety.linalg.operators import LowRankOperator, Operator
from trl_safety.subspace.layer import LayerSubspace


class FactorGroups:
    """LoRA factors and operators, stacked by shape and device, so that the number of kernels does not grow with depth.

    The factors are read anew at every call; the operators are moved to the layers' devices once. All arithmetic is in
    float32, or in float64 for float64 factors, regardless of autocast.
    """

    def __init__(
        self, modules: Sequence[LoraModule], subspaces: Mapping[str, LayerSubspace], operator: Literal["scaled", "orthogonal"]
    ) -> None:
        grouped: dict[object, list[tuple[LoraModule, Operator]]] = {}
        for module in modules:
            subspace = subspaces[module.name]
            single = subspace.operator(operator)
            # V kept whole is too large to be copied into a stack.
            key: object = (
                (module.B.shape, module.A.shape, single.basis.shape[-1], module.B.device, module.B.dtype)
                if isinstance(single, LowRankOperator)
                else module.name
            )
            grouped.setdefault(key, []).append((module, single))
        self._placed: set[int] = set()
        self._whole = {name for name, layer in subspaces.items() if layer.whole is not None}
        self._groups: list[tuple[list[LoraModule], Operator, Tensor]] = []
        for members in grouped.values():
            modules_of_group = [module for module, _ in members]
            scalings = torch.tensor([module.scaling for module in modules_of_group], dtype=torch.float64)
            self._groups.append((modules_of_group, _stack([op for _, op in members]), scalings))

    def _on_device(self) -> list[tuple[list[LoraModule], Operator, Tensor]]:
        """The groups, with operators on the factors' current device: a model may be moved after the trainer was created."""
        for index, (modules, operator, scalings) in enumerate(self._groups):
            device, dtype = modules[0].B.device, torch.promote_types(modules[0].B.dtype, torch.float32)
            if (scalings.device, scalings.dtype) != (device, dtype) or index not in self._placed:
                self._groups[index] = modules, operator.to(device, dtype), scalings.to(device, dtype)
                self._placed.add(index)
        return self._groups

    def penalty(self, scaled: bool) -> Tensor:
        """Σ ‖(I − M)ΔW‖²_F over all layers, differentiable in the factors; ΔW = B·A, or s·B·A where `scaled`."""
        total = None
        for modules, operator, scalings in self._on_device():
            with torch.autocast(scalings.device.type, enabled=False):
                B, A = _factors(modules, scalings.dtype)
                values = residual_norm_squared(B, A, operator).reshape(-1)
                part = (values * scalings.square()).sum() if scaled else values.sum()
            total = part if total is None else total + part.to(total.device)
        assert total is not None  # noqa: S101  # there is at least one adapted layer
        return total

    @torch.no_grad()
    def measure(self) -> dict[str, dict[str, float]]:
        """Module name → update_norm (‖ΔW‖_F with scaling), cosine (of M·ΔW and ΔW), penalty (unscaled), inside (energy share).

        `inside` is missing where V is kept whole. One transfer to the host for all layers together.
        """
        rows, names = [], []
        for modules, operator, scalings in self._on_device():
            with torch.autocast(scalings.device.type, enabled=False):
                B, A = _factors(modules, scalings.dtype)
                image = operator.apply(B)
                norm, image_norm = product_norm_squared(B, A), product_norm_squared(image, A)
                inside = (
                    trace_product((inner := operator.basis.mT @ B).mT @ inner, A @ A.mT)
                    if isinstance(operator, LowRankOperator)
                    else torch.full_like(norm, torch.nan)
                )
                values = torch.stack([norm, image_norm, product_inner(image, B, A), residual_norm_squared(B, A, operator), inside])
            rows.append(torch.cat([values.reshape(5, -1), scalings.unsqueeze(0)]).double().cpu())
            names += [module.name for module in modules]
        table = torch.cat(rows, dim=1)
        norm, image_norm, inner_product, penalty, inside, scaling = table
        product = (norm * image_norm).clamp(min=0).sqrt()
        columns = {
            "update_norm": norm.clamp(min=0).sqrt() * scaling,
            "cosine": torch.where(product > 0, inner_product / product.clamp(min=1e-300), 0),
            "penalty": penalty,
            "inside": torch.where(norm > 0, inside / norm.clamp(min=1e-300), 0),
        }
        lists = {key: column.tolist() for key, column in columns.items()}
        return {
            name: {key: column[i] for key, column in lists.items() if key != "inside" or name not in self._whole}
            for i, name in enumerate(names)
        }


@torch.no_grad()
def update_norm(modules: Sequence[LoraModule]) -> float:
    """‖ΔW‖_F over all layers, with PEFT's scaling."""
    device = modules[0].B.device
    squares = [product_norm_squared(whole(m.B).double(), whole(m.A).double()).to(device) * m.scaling**2 for m in modules]
    return float(torch.stack(squares).sum().clamp(min=0).sqrt())


def summarise(measured: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The whole adapter's update norm, mean cosine, and share of the update's energy inside the subspace."""
    squares = {name: row["update_norm"] ** 2 for name, row in measured.items()}
    total = sum(squares.values())
    summary = {
        "update_norm": total**0.5,
        "subspace_cosine": sum(row["cosine"] for row in measured.values()) / len(measured),
    }
    if all("inside" in row for row in measured.values()):
        summary["inside_share"] = sum(squares[name] * row["inside"] for name, row in measured.items()) / total if total else 0.0
    return summary


def _factors(modules: Sequence[LoraModule], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if len(modules) == 1:
        return whole(modules[0].B).to(dtype), whole(modules[0].A).to(dtype)
    return torch.stack([whole(module.B) for module in modules]).to(dtype), torch.stack([whole(module.A) for module in modules]).to(dtype)


def _stack(operators: Sequence[Operator]) -> Operator:
    low_rank = [operator for operator in operators if isinstance(operator, LowRankOperator)]
    if len(operators) == 1 or len(low_rank) != len(operators):
        return operators[0]
    return LowRankOperator(torch.stack([op.basis for op in low_rank]), torch.stack([op.weights for op in low_rank]))
