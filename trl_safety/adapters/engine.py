"""Which engine distributes a run over processes, as a fact that requirements check."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from trl_safety.config.requirements import Declaring, Fact, Facts, Requirement, resolve


def is_fsdp() -> bool:
    """Whether FSDP shards the parameters of this run over its processes; known once there is a trainer."""
    return bool(AcceleratorState().distributed_type == DistributedType.FSDP)


def is_deepspeed() -> bool:
    """Whether DeepSpeed reduces the gradients of this run and takes its steps; known once there is a trainer."""
    return bool(AcceleratorState().distributed_type == DistributedType.DEEPSPEED)


def engine() -> Fact:
    """The engine of this run: "single", "ddp", "deepspeed", "zero3", "fsdp1", "fsdp2", or FSDP2 whose checkpoints lack the whole adapter."""
    state = AcceleratorState()
    if is_deepspeed():
        stage = state.deepspeed_plugin.zero_stage if not state.deepspeed_plugin.hf_ds_config.is_zero3() else 3
        return Fact("zero3" if stage == 3 else "deepspeed", f"deepspeed: ZeRO stage {stage}")
    if not is_fsdp():
        single = state.distributed_type == DistributedType.NO
        return Fact("single" if single else "ddp", f"distributed_type = {state.distributed_type}")
    plugin = state.fsdp_plugin
    if plugin.fsdp_version != 2:
        return Fact("fsdp1", f"fsdp_version = {plugin.fsdp_version}")
    if "FULL_STATE_DICT" not in str(plugin.state_dict_type):
        return Fact("fsdp_sharded_checkpoints", f"fsdp_state_dict_type = {plugin.state_dict_type}")
    return Fact("fsdp2", "fsdp_version = 2")


class _Any:
    """A method with no requirements of its own."""

    requirements: ClassVar[tuple[Requirement, ...]] = ()
    shown: ClassVar[Mapping[str, str]] = {}


def check_engine(name: str = "trl-safety", options: Declaring | None = None) -> None:
    """Refuse engines on which a method cannot act.

    Args:
        name: of the method, for the message.
        options: its options; by default only what every method needs is checked.

    Raises:
        AdapterError: DeepSpeed's third stage, FSDP's first version, or FSDP that does not save the whole adapter.
        ConfigurationError: an engine on which this method cannot act.
    """
    resolve({name: options or _Any()}, Facts("trl", {"engine": engine()}))
