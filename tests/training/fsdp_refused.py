"""Run under `accelerate launch` with FSDP2: OUTPUT and the folder with the pair. Everything that does not work with shards is an error."""

import sys
from pathlib import Path
from typing import Any

import pytest

import tests.training.engine_device  # noqa: F401
from tests import tiny
from trl_safety import AlignmentSubspace
from trl_safety.errors import SafetyError

output, world = Path(sys.argv[1]), Path(sys.argv[2])
subspace = AlignmentSubspace.load(world / "S.safetensors")


def made(**kwargs: Any) -> Any:
    return tiny.trainer(output, base=tiny.model(str(world / "aligned")), use_cpu=False, **kwargs)


pool = tiny.rows(16, seed=5)
with pytest.raises(
    SafetyError,
    match="fsdp_version = 2: dual_select cannot act: it reads and adds gradients of whole LoRA factors, which FSDP shards",
):
    made(safety={"dual_select": {"references": 4}}, reference_dataset=pool)
with pytest.raises(SafetyError, match=r"reinforce: the merge|the merge changes the adapter's rank.*merge-reinforce"):
    made(safety={"buffer_reinforce": {"buffer": str(world / "buffer"), "reinforce": str(world / "reinforce")}})
for safety in ({"csulora": {}}, {"alignment_vector": {}}, {"alignment_vector": {"cut_to": 3}}):
    trainer = made(safety=safety, subspace=subspace)
    with pytest.raises(SafetyError, match="changes the adapter's rank, which FSDP's shards do not allow"):
        trainer.train()
plugin = made().accelerator.state.fsdp_plugin
for name, value, message in (
    ("fsdp_version", 1, "fsdp_version = 1: .* cannot act: FSDP1 flattens the LoRA factors"),
    ("state_dict_type", "SHARDED_STATE_DICT", "checkpoints would contain no adapter"),
):
    before = getattr(plugin, name)
    trainer = made()
    plugin = trainer.accelerator.state.fsdp_plugin
    setattr(plugin, name, value)
    from trl_safety.adapters.engine import check_engine

    with pytest.raises(SafetyError, match=message):
        check_engine()
    setattr(plugin, name, before)
