"""Resuming a run whose checkpoint holds more adapters than one, as TRL's copy of an adapter that was trained before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft import set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from trl_safety.adapters.engine import is_fsdp
from trl_safety.adapters.folder import WEIGHTS
from trl_safety.adapters.lora import adapter_name, unwrap
from trl_safety.errors import AdapterError
from trl_safety.reports.source import adapter_folder
from trl_safety.training.compat import loads_default_adapter


class LoadedAdapter(TrainerCallback):
    """Has a resumed run begin from its checkpoint's adapter where further adapters lie beside that.

    Used only where Transformers does not do so; see `compat.loads_default_adapter`. It runs before every callback that reads the adapter.

    Args:
        resumed: returns the checkpoint that training resumes from, or None for the one of that step in the output folder.
    """

    def __init__(self, resumed: Callable[[], Path | None] = lambda: None) -> None:
        self._resumed = resumed

    @classmethod
    def add_to(cls, trainer: Any, resumed: Callable[[], Path | None] = lambda: None) -> None:
        """Add it to a trainer that needs it."""
        if not loads_default_adapter():
            trainer.add_callback(cls(resumed))

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        """Load the active adapter.

        Raises:
            AdapterError: the checkpoint has none.
        """
        inner: Any = unwrap(model)
        # Shards are put together by Accelerate, or by `engines.LoadedShards`.
        if not state.global_step or is_fsdp() or len(getattr(inner, "peft_config", ())) < 2:
            return
        adapter = adapter_name(inner)
        checkpoint = self._resumed() or Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        file = adapter_folder(inner, checkpoint, adapter) / WEIGHTS
        if not file.is_file():
            raise AdapterError(
                f"{str(file)!r}: is missing, so the run cannot go on with adapter {adapter!r}; resume from a whole checkpoint"
            )
        set_peft_model_state_dict(inner, load_file(file), adapter_name=adapter)
