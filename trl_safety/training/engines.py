"""Which engine spreads a run over processes, and what each method can do there."""

from __future__ import annotations

import os
from typing import Any

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from trl_safety.errors import AdapterError, ConfigurationError


def is_fsdp() -> bool:
    """Whether FSDP spreads the parameters of this run over its processes; known once there is a trainer."""
    return bool(AcceleratorState().distributed_type == DistributedType.FSDP)


def check_engine() -> None:
    """Refuse engines on which nothing here has been shown to act.

    Raises:
        AdapterError: DeepSpeed's third stage, FSDP's first version, or FSDP that saves no whole adapter.
    """
    state = AcceleratorState()
    if state.distributed_type == DistributedType.DEEPSPEED and state.deepspeed_plugin.hf_ds_config.is_zero3():
        raise AdapterError(
            "deepspeed: ZeRO stage 3 keeps every LoRA factor in pieces that only its own hooks put together, where no method can read them; use stage 2, or "
            "FSDP with fsdp_version: 2"
        )
    if not is_fsdp():
        return
    plugin = state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise AdapterError(
            f"fsdp_version = {plugin.fsdp_version}: flattens the LoRA factors with other parameters, where no method can read them; use fsdp_version: 2"
        )
    if "FULL_STATE_DICT" not in str(plugin.state_dict_type):
        raise AdapterError(
            f"fsdp_state_dict_type = {plugin.state_dict_type}: checkpoints would hold no adapter and no safety report; use FULL_STATE_DICT"
        )


def refuse_per_sample_gradients() -> None:
    """Refuse engines that take the gradients away before DualSelect could read and add to them.

    Raises:
        ConfigurationError: FSDP or DeepSpeed is on.
    """
    for kind in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        if AcceleratorState().distributed_type == kind:
            raise ConfigurationError(
                f"dual_select: reads and adds gradients of whole LoRA factors, which {kind.value} spreads over the processes; use DDP"
            )


def refuse_on_fsdp(setting: str, reason: str, remedy: str) -> None:
    """Refuse what cannot act on sharded parameters.

    Raises:
        ConfigurationError: FSDP is on.
    """
    if is_fsdp():
        raise ConfigurationError(f"{setting}: {reason}, which FSDP's shards do not allow; {remedy}")


def refuse_unjoined(trainer: Any) -> None:
    """Refuse processes that a launcher started and nothing joined: each would train on its own and overwrite the others' files.

    Raises:
        ConfigurationError: there are such processes.
    """
    launched = int(os.environ.get("WORLD_SIZE") or 1)
    if launched > 1 and trainer.accelerator.num_processes == 1:
        raise ConfigurationError(
            f"WORLD_SIZE = {launched}: the launcher started {launched} processes, but each trains on its own, and all write into one output folder; on a "
            "CPU set ACCELERATE_USE_CPU=true in the environment, on GPUs check the launcher"
        )
