"""Launched processes that do not form one group, FSDP shards that Accelerate does not load, and losses that DeepSpeed must know of."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from trl_safety.adapters.engine import is_fsdp
from trl_safety.adapters.folder import WEIGHTS
from trl_safety.adapters.lora import adapter_name, unwrap
from trl_safety.adapters.shards import put, settle
from trl_safety.errors import AdapterError, ConfigurationError
from trl_safety.reports.source import adapter_folder
from trl_safety.training.compat import loads_adapter_shards


def refuse_unjoined(trainer: Any) -> None:
    """Refuse launched processes that do not form one group: each would train on its own and overwrite the others' files.

    Raises:
        ConfigurationError: there are such processes.
    """
    launched = int(os.environ.get("WORLD_SIZE") or 1)
    if launched > 1 and trainer.accelerator.num_processes == 1:
        raise ConfigurationError(
            f"WORLD_SIZE = {launched}: the launcher started {launched} processes, but each trains on its own, and all write into one output folder; on a "
            "CPU set ACCELERATE_USE_CPU=true in the environment, on GPUs check the launcher"
        )


def through_deepspeed(engine: Any, loss: Callable[[], Tensor]) -> Tensor:
    """A loss as DeepSpeed's engine computes it: the engine prepares for a backward pass alone from what its own forward returned.

    Args:
        engine: what the trainer calls the model by.
        loss: takes the place of the model's forward, for this call.
    """
    inner = vars(engine.module)
    before = inner.get("forward")
    inner["forward"] = loss
    try:
        prepared: Tensor = engine()
    finally:
        if before is None:
            del inner["forward"]
        else:
            inner["forward"] = before
    return prepared


class LoadedShards(TrainerCallback):
    """With FSDP, gives every process its part of the adapter that the Trainer loads: the checkpoint to resume from, or the best one at the end.

    Used only where Accelerate does not do so; see `compat.loads_adapter_shards`. It runs before every callback that reads the adapter.

    Args:
        resumed: returns the checkpoint that training resumes from, or None for the one of that step in the output folder.
    """

    def __init__(self, resumed: Callable[[], Path | None] = lambda: None) -> None:
        self._resumed = resumed

    @classmethod
    def add_to(cls, trainer: Any, resumed: Callable[[], Path | None] = lambda: None) -> None:
        """Add it to a trainer that needs it."""
        if is_fsdp() and not loads_adapter_shards():
            trainer.add_callback(cls(resumed))

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        """Load the checkpoint of a resumed run."""
        if state.global_step:
            _load_shards(model, self._resumed() or Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")

    def on_train_end(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        """Load the best checkpoint, if requested."""
        if args.load_best_model_at_end and state.best_model_checkpoint:
            _load_shards(model, Path(state.best_model_checkpoint))


def _load_shards(model: nn.Module, checkpoint: Path) -> None:
    """The first process, which saved the file, reads it and sends it to all."""
    model = unwrap(model)
    settle(model)
    adapter = adapter_name(model)
    places = get_peft_model_state_dict(model, state_dict=dict(model.named_parameters()), adapter_name=adapter, save_embedding_layers=False)
    first = AcceleratorState().process_index == 0
    file = adapter_folder(model, checkpoint, adapter) / WEIGHTS
    saved: dict[str, Tensor] = {}
    if first:
        saved = load_file(file) if file.is_file() else {}
        missing = places.keys() - saved.keys()
        if missing:
            raise AdapterError(
                f"{str(file)!r}: lacks {min(missing)!r}, which this run trains: Accelerate would load it in one process only; resume from a "
                "complete checkpoint of this run, in its output_dir"
            )
    for name, place in places.items():
        put(place, saved[name] if first else torch.empty(place.shape), source=0)
