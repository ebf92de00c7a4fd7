"""The data-free buffer in training: W_aligned − γ·V in the frozen weights, or through a frozen low-rank adapter during training steps."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from trl_safety.adapters.checkpoint import Checkpoint
from trl_safety.adapters.engine import is_fsdp
from trl_safety.adapters.exchange import WeightExchange
from trl_safety.adapters.folder import Factors
from trl_safety.adapters.frozen import FrozenAdapter
from trl_safety.adapters.names import is_named
from trl_safety.config.alignment_buffer import BufferOptions
from trl_safety.config.subspace import SubspaceConfig
from trl_safety.errors import ConfigurationError, SubspaceError
from trl_safety.methods import alignment_buffer
from trl_safety.subspace.artifact import AlignmentSubspace
from trl_safety.subspace.layer import LayerSubspace
from trl_safety.training.method import Context, TrainingMethod

logger = logging.getLogger(__name__)


class AlignmentBuffer(TrainingMethod):
    """The data-free buffer of one protected run. With γ = 0 it does nothing, and reads no pair.

    Raises:
        ConfigurationError: the pair is not named, or another option keeps the buffer from acting.
        CheckpointError, AdapterError, SubspaceError: the pair does not match the model.
    """

    name = "alignment_buffer"
    action = "buffered"
    live_weights = True
    config: BufferOptions

    def __init__(self, config: BufferOptions, context: Context) -> None:
        super().__init__(config, context)
        self._taken = False
        self._layers = 0
        self.exchange: WeightExchange | None = None
        self.frozen: FrozenAdapter | None = None
        if config.removed == 0:
            return
        model = context.trainer.model
        if config.how == "low_rank":
            self.frozen = self._low_rank(model, context.subspace)
            self.base_check = context.prepared.base_check
            return
        base, aligned = self._pair()
        setting = f"{self.name}: {base.source!r} → {aligned.source!r}"
        self.exchange = WeightExchange(model, base, aligned, embeddings=config.embeddings, setting=setting)
        self.base_check = self.exchange.check
        if is_fsdp() and any(type(place.parameter).__name__ == "Params4bit" for place in self.exchange.places):
            raise ConfigurationError(
                f"{self.name}.how = 'weights': requantises 4-bit weights, which FSDP's shards do not allow; use how: low_rank, or load the model in 16 bits"
            )

    def _low_rank(self, model: Any, subspace: AlignmentSubspace | None) -> FrozenAdapter:
        assert subspace is not None  # noqa: S101  # required by the block
        removed, skipped = self.config.removed, self.context.block.skip_modules
        factors = {
            name: Factors(*alignment_buffer.low_rank(*self.directions(layer), removed), 1.0)
            for name, layer in subspace.layers.items()
            if not is_named(name, skipped)
        }
        self._layers = len(factors)
        return FrozenAdapter(model, factors, f"{self.name}.how = 'low_rank'")

    def directions(self, layer: LayerSubspace) -> tuple[Tensor, Tensor, Tensor]:
        """U, σ and Z of the part of V that a low-rank buffer removes.

        Raises:
            SubspaceError: V is kept whole.
        """
        if layer.left is None:
            raise SubspaceError(
                f"layer {layer.name!r}: the subspace keeps V whole, which a low-rank buffer cannot subtract; build it with a rank or a tolerance, or use how: "
                "weights"
            )
        return layer.factors()

    def _pair(self) -> tuple[Checkpoint, Checkpoint]:
        own, subspace, config, trainer = self.config, self.context.subspace, self.context.block, self.context.trainer
        pair = config.subspace if isinstance(config.subspace, SubspaceConfig) else subspace.provenance if subspace else None
        base = own.base or (pair.base if pair else None)
        if base is None and subspace is not None:
            raise ConfigurationError(
                f"{self.name}.how = 'weights': loads the unaligned model's checkpoint, and {subspace.provenance.origin} has none: set how: low_rank"
            )
        if base is None:
            raise ConfigurationError(f"{self.name}.base is missing: name the unaligned model there, or give safety.subspace")
        loaded = self.context.prepared.base_model or getattr(trainer.model.config, "name_or_path", None)
        aligned = own.aligned or (pair.aligned if pair else None) or loaded
        if not aligned:
            raise ConfigurationError(
                f"{self.name}.aligned is missing: the model does not say where it was loaded from; name its checkpoint"
            )
        revisions = [own.base_revision, own.aligned_revision]
        if pair:
            revisions = [
                own.base_revision or (None if own.base else pair.base_revision),
                own.aligned_revision or (None if own.aligned else pair.aligned_revision),
            ]
        return Checkpoint(base, revisions[0]), Checkpoint(aligned, revisions[1])

    @property
    def entered(self) -> bool:
        """Whether the frozen weights are currently W_aligned − γ·V."""
        return self._taken

    @property
    def leaves_to_save(self) -> bool:
        """After a resized vocabulary PEFT saves the embeddings with the adapter; they must be the aligned model's."""
        return self.exchange is not None and self.exchange.resized

    def enter(self) -> None:
        """Write W_aligned − γ·V into the frozen weights, at the start of training and after an evaluation."""
        if self.exchange is None:
            return
        self._taken = True
        self.exchange.put(lambda aligned, base: alignment_buffer.take_out(aligned, base, self.config.removed))

    def leave(self, *, gather: bool = True) -> None:
        """Write W_aligned back into the frozen weights, also when training fails. See `WeightExchange.put_back`."""
        if self.exchange is not None and self._taken:
            self.exchange.put_back(gather=gather)
            self._taken = False

    @contextmanager
    def step(self) -> Iterator[None]:
        """A low-rank buffer acts only within the training step."""
        if self.frozen is None:
            if self._taken:
                self.mark()
            yield
            return
        with self.frozen.in_step():
            yield
        self.mark()

    @property
    def duties(self) -> tuple[str, ...]:
        """None with γ = 0."""
        return (self.name,) if self.config.removed else ()

    def begin(self, checkpoint: Path | None) -> None:
        """See `TrainingMethod.begin`; warns if this is plain fine-tuning."""
        super().begin(checkpoint)
        if self.idle is not None:
            logger.warning("%s: %s; this is plain fine-tuning, and the report will say so", self.name, self.idle)

    @property
    def idle(self) -> str | None:
        """γ = 0 is plain fine-tuning."""
        return "gamma is 0: trained on the aligned model itself" if self.config.removed == 0 else None

    @property
    def settings(self) -> dict[str, Any]:
        """The options, with a fingerprint of the pair."""
        return {**super().settings, "pair": self.exchange.identity if self.exchange else None}

    def describe(self, first: int, last: int) -> str:
        """See `TrainingMethod.describe`."""
        how = (
            f"in {len(self.exchange.places)} frozen tensors" if self.exchange else f"by a frozen low-rank adapter in {self._layers} layers"
        )
        removed = self.config.removed
        weights = f"W_aligned {'−' if removed > 0 else '+'} {abs(removed):g}·V ({how})" if removed else "W_aligned itself"
        return f"trained on {weights} in optimizer steps {first} to {last}; the adapter is for W_aligned"
