"""The data-free buffer in training: W_aligned − γ·V in the frozen weights, or by a frozen low-rank adapter in training steps."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from transformers import TrainerCallback

from trl_safety.adapters.checkpoint import Checkpoint
from trl_safety.adapters.exchange import WeightExchange
from trl_safety.adapters.folder import Factors
from trl_safety.adapters.frozen import FrozenAdapter
from trl_safety.config.alignment_buffer import AlignmentBufferConfig
from trl_safety.config.block import SafetyConfig
from trl_safety.config.subspace import SubspaceConfig
from trl_safety.corrections.prepared import Prepared
from trl_safety.errors import ConfigurationError, SubspaceError
from trl_safety.methods import alignment_buffer
from trl_safety.reports.report import SOURCES, LayerReport, MethodReport, came_with
from trl_safety.subspace.artifact import AlignmentSubspace
from trl_safety.training.engines import refuse_on_fsdp

logger = logging.getLogger(__name__)

NAME = "alignment_buffer"


class AlignmentBuffer:
    """One protected run's data-free buffer.

    Args:
        config: the safety block, with `alignment_buffer`.
        trainer: with its model, loaded from the aligned checkpoint.
        prepared: the user's adapter, checked.
        subspace: the block's subspace, where there is one.

    Raises:
        ConfigurationError: the pair is not named, or the buffer cannot act beside another option.
        CheckpointError, AdapterError, SubspaceError: the pair is not the model's.
    """

    def __init__(self, config: SafetyConfig, trainer: Any, prepared: Prepared, subspace: AlignmentSubspace | None) -> None:
        assert config.alignment_buffer is not None  # noqa: S101  # made only then
        self.config: AlignmentBufferConfig = config.alignment_buffer
        self.first_step = 0
        self.start_norm = 0.0
        self._prepared = prepared
        self._taken = False
        self._layers = 0
        self.exchange: WeightExchange | None = None
        self.frozen: FrozenAdapter | None = None
        if getattr(trainer.args, "torch_compile", False) and self.config.how == "low_rank":
            raise ConfigurationError("torch_compile = True: a compiled model goes by the low-rank buffer; turn it off, or use how: weights")
        if self.config.how == "low_rank":
            self.frozen = self._low_rank(trainer.model, subspace)
            self.base_check = prepared.base_check
        else:
            base, aligned = self._pair(config, trainer, subspace)
            setting = f"{NAME}: {base.source!r} → {aligned.source!r}"
            self.exchange = WeightExchange(trainer.model, base, aligned, embeddings=self.config.embeddings, setting=setting)
            self.base_check = self.exchange.check
            if any(type(place.parameter).__name__ == "Params4bit" for place in self.exchange.places):
                refuse_on_fsdp(
                    f"{NAME}.how = 'weights'", "quantises 4-bit weights again", "use how: low_rank, or load the model in 16 bits"
                )

    def _low_rank(self, model: Any, subspace: AlignmentSubspace | None) -> FrozenAdapter:
        assert subspace is not None  # noqa: S101  # required by the block
        factors = {}
        for name, layer in subspace.layers.items():
            if layer.left is None:
                raise SubspaceError(
                    f"layer {name!r}: the subspace keeps V whole, which a low-rank buffer cannot take out; build it with a rank or a tolerance, or use how: weights"
                )
            factors[name] = Factors(*alignment_buffer.low_rank(*layer.factors(), self.config.gamma), 1.0)
        self._layers = len(factors)
        return FrozenAdapter(model, factors, f"{NAME}.how = 'low_rank'")

    def _pair(self, config: SafetyConfig, trainer: Any, subspace: AlignmentSubspace | None) -> tuple[Checkpoint, Checkpoint]:
        own = self.config
        pair = config.subspace if isinstance(config.subspace, SubspaceConfig) else subspace.provenance if subspace else None
        base = own.base or (pair.base if pair else None)
        if base is None:
            raise ConfigurationError(f"{NAME}.base is missing: name the unaligned model there, or give safety.subspace")
        loaded = self._prepared.base_model or getattr(trainer.model.config, "name_or_path", None)
        aligned = own.aligned or (pair.aligned if pair else None) or loaded
        if not aligned:
            raise ConfigurationError(f"{NAME}.aligned is missing: the model does not say where it was loaded from; name its checkpoint")
        revisions = [own.base_revision, own.aligned_revision]
        if pair:
            revisions = [
                own.base_revision or (None if own.base else pair.base_revision),
                own.aligned_revision or (None if own.aligned else pair.aligned_revision),
            ]
        return Checkpoint(base, revisions[0]), Checkpoint(aligned, revisions[1])

    @property
    def taken(self) -> bool:
        """Whether the frozen weights are W_aligned − γ·V now."""
        return self._taken

    @property
    def resized(self) -> bool:
        """See `WeightExchange.resized`."""
        return self.exchange is not None and self.exchange.resized

    def frame(self, callbacks: list[Any]) -> None:
        """Put the buffer's callbacks around a trainer's others, whenever those were added."""
        callbacks[:] = [_PutBack(self), *(c for c in callbacks if not isinstance(c, _PutBack | _TakeOut)), _TakeOut(self)]

    def take_out(self) -> None:
        """At the start of training, and after an evaluation: W_aligned − γ·V into the frozen weights."""
        if self.config.gamma == 0:
            logger.warning("alignment_buffer.gamma = 0: this is plain fine-tuning, and the report will say so")
        if self.exchange is None or self.config.gamma == 0:
            return
        self._taken = True
        self.exchange.put(lambda aligned, base: alignment_buffer.take_out(aligned, base, self.config.gamma))

    def put_back(self, *, gather: bool = True) -> None:
        """W_aligned into the frozen weights; when training ends, however it ends. See `WeightExchange.put_back`."""
        if self.exchange is not None and self._taken:
            self.exchange.put_back(gather=gather)
            self._taken = False

    @contextmanager
    def aligned(self) -> Iterator[None]:
        """The model as it will be used: within it the frozen weights are W_aligned."""
        taken = self._taken
        self.put_back()
        try:
            yield
        finally:
            if taken:
                self.take_out()

    def attached(self) -> AbstractContextManager[None]:
        """Around one training step: where the buffer is a low-rank adapter it acts within it alone."""
        return nullcontext() if self.frozen is None or self.config.gamma == 0 else self.frozen.in_step()

    def report(self, steps: int) -> MethodReport:
        """What was trained on, until optimizer step `steps`."""
        acted = steps > self.first_step and self.config.gamma != 0
        if self.config.gamma == 0:
            summary = "gamma is 0: trained on the aligned model itself"
        elif not acted:
            summary = "no step was trained"
        else:
            how = (
                f"in {len(self.exchange.places)} frozen tensors"
                if self.exchange
                else f"by a frozen low-rank adapter in {self._layers} layers"
            )
            summary = f"trained on W_aligned − {self.config.gamma:g}·V ({how}) in optimizer steps {self.first_step + 1} to {steps}; the adapter is for W_aligned"
        if self.first_step:
            summary += f"; steps 1 to {self.first_step} were trained without it"
        if self.start_norm:
            summary += f"; {came_with(self.start_norm)}"
        row = LayerReport(action="buffered" if acted else "left_alone", reason=None if acted else summary)
        return MethodReport(
            name=NAME,
            source=SOURCES[NAME],
            reconstruction=False,
            settings={**self.config.model_dump(), "pair": self.exchange.identity if self.exchange else None},
            acted=acted and self.first_step == 0 and not self.start_norm,
            summary=summary,
            steps=(self.first_step + 1, steps) if acted else None,
            layers={module.name: row for module in self._prepared.modules},
        )


class _PutBack(TrainerCallback):
    """First of all when training ends: what other callbacks check, correct and save is W_aligned's."""

    def __init__(self, buffer: AlignmentBuffer) -> None:
        self._buffer = buffer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # `auto_find_batch_size` begins again after running out of memory.
        self._buffer.put_back()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._buffer.put_back()


class _TakeOut(TrainerCallback):
    """Last of all when training begins, since corrections check then that the model is the aligned one."""

    def __init__(self, buffer: AlignmentBuffer) -> None:
        self._buffer = buffer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._buffer.take_out()
