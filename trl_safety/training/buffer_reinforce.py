"""Buffer-and-Reinforce in training: the frozen buffer, and the merge with the ReinforceLoRA when training ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from trl_safety.adapters.files import sha256
from trl_safety.adapters.folder import WEIGHTS
from trl_safety.adapters.frozen import FrozenAdapter
from trl_safety.adapters.record import open_kind
from trl_safety.config.buffer_reinforce import BufferReinforceConfig
from trl_safety.corrections.buffer_reinforce import NAME, PENDING, ReinforceMerge
from trl_safety.corrections.callback import CorrectionCallback
from trl_safety.training.method import Context, TrainingMethod


class BufferReinforce(TrainingMethod):
    """The buffer and the merge of one protected run.

    Raises:
        AdapterError: an adapter of the provider is missing, of another kind or for another base model, or the user's adapter cannot be
            merged.
        ConfigurationError: an option would have no effect.
    """

    name = NAME
    action = "buffered"
    config: BufferReinforceConfig

    def __init__(self, config: BufferReinforceConfig, context: Context) -> None:
        super().__init__(config, context)
        setting = f"{NAME}.buffer = {config.buffer!r}"
        folder, record = open_kind(config.buffer, "buffer", f"{NAME}.buffer")
        model = context.trainer.model
        self.frozen = FrozenAdapter(model, folder.factors, setting)
        self.base_check = record.check_layers(self.frozen.layers, setting)
        self._sources = {"buffer_sha256": sha256(folder.path / WEIGHTS)}
        if options := config.merge():
            merge = ReinforceMerge(options)
            self._sources["reinforce_sha256"] = sha256(merge.folder.path / WEIGHTS)
            self.pending = PENDING
            self.last = CorrectionCallback(context.subspace, merge)
            self.last.prepare(model)

    @contextmanager
    def step(self) -> Iterator[None]:
        """The buffer acts only within the training step: forward, backward, and recomputation by gradient checkpointing."""
        with self.frozen.in_step():
            yield
        self.mark()

    @property
    def settings(self) -> dict[str, Any]:
        """The options, with the fingerprints of the provider's adapters."""
        return {**super().settings, **self._sources}

    def describe(self, first: int, last: int) -> str:
        """See `TrainingMethod.describe`."""
        return f"trained beside the frozen buffer in optimizer steps {first} to {last}; the buffer was then detached"
