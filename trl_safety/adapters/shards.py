"""Parameters that an engine shards over processes (FSDP2's `DTensor`), read and written whole, one at a time."""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn


def is_sharded(tensor: Tensor) -> bool:
    """Whether a process holds only a part of the tensor."""
    if not torch.distributed.is_available() or type(tensor) in (Tensor, nn.Parameter):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def sharded(model: nn.Module) -> bool:
    """Whether any of a model's parameters is sharded."""
    return any(is_sharded(parameter) for parameter in model.parameters())


CHECKED_ELSEWHERE = "checked by the process that loaded the weights"


def placeholders() -> bool:
    """Whether this process's base weights are not loaded yet: with FSDP's `cpu_ram_efficient_loading` one process loads them, and the
    others get theirs when the model is sharded. The one that loads them checks them for all.
    """
    switches = ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING")
    return all(os.environ.get(switch, "").lower() == "true" for switch in switches) and int(os.environ.get("LOCAL_RANK") or 0) != 0


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, gathered where it is sharded; every process must call this, in the same order.

    Differentiable: each process is assumed to use the same function of the whole tensor, and its part of the gradient is the part
    of that function's gradient. It is not summed over processes.
    """
    if not is_sharded(tensor):
        return tensor
    gathered: Tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    return gathered


def settle(model: nn.Module) -> None:
    """Make every module hold its own part again: FSDP leaves the outermost one's parameters gathered after an evaluation, and what
    is written into a gathered copy is lost.
    """
    if not sharded(model):
        return
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@torch.no_grad()
def put(parameter: Tensor, value: Tensor, *, source: int | None = None) -> None:
    """Write a whole value into a parameter in place.

    Args:
        parameter: sharded or not.
        value: the same on every process; or, with a source, of the same shape.
        source: the rank whose value is sent to all if the parameter is sharded; by default each process takes its part from its own.
    """
    if not is_sharded(parameter):
        parameter.copy_(value)
        return
    from torch.distributed.tensor import distribute_tensor

    value = value.detach().to(parameter.device, parameter.dtype)
    parts = distribute_tensor(value.contiguous(), parameter.device_mesh, parameter.placements, src_data_rank=source)  # type: ignore[attr-defined]
    parameter.to_local().copy_(parts.to_local())  # type: ignore[attr-defined]
