"""`TrainingMethod`: what a method that acts while training may do, and when the driver asks it to."""

# ruff: noqa: B027  # hooks that do nothing by default are the protocol
from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from trl_safety.config.block import SafetyConfig
from trl_safety.config.method import MethodOptions
from trl_safety.corrections.callback import CorrectionCallback
from trl_safety.corrections.prepared import Prepared
from trl_safety.reports.report import LayerReport, MethodReport, came_with
from trl_safety.subspace.artifact import AlignmentSubspace
from trl_safety.training.factor_groups import FactorGroups

Inner = Callable[[Any, Any, bool, Any], Any]
"""(model, inputs, return_outputs, num_items_in_batch) → what `compute_loss` returns."""


@dataclass(frozen=True)
class Context:
    """What a method is made from.

    Attributes:
        trainer: with its model, data and arguments.
        block: the whole safety block.
        prepared: the adapter, checked.
        subspace: the block's alignment subspace, where there is one.
        groups: the adapter's factors with their operators, where the block measures them.
        references: the method's pool of rows, prepared by the host; None where it reads none.
        protected_until: (checkpoint, method, settings) → the optimizer step up to which the checkpoint's report says that the method
            protected it from the first step on; None where it does not say so.
    """

    trainer: Any
    block: SafetyConfig
    prepared: Prepared
    subspace: AlignmentSubspace | None
    groups: FactorGroups | None
    references: Any
    protected_until: Callable[[Path | None, str, Mapping[str, Any]], int | None]


class TrainingMethod(ABC):
    """One method in one protected run. Every hook has a default that does nothing.

    The driver makes the methods of a block in the order in which they act, folds their `loss` around the trainer's, enters their `step`
    around every training step, and checks after each optimizer step that all of their `duties` were done.

    Args:
        config: the method's options.
        context: the run.

    Attributes:
        first_step: the steps before it, in a resumed run, were trained without the method.
        start_norm: ‖ΔW‖ of an adapter that was trained before the run.
    """

    name: ClassVar[str]
    """As in the block."""
    action: ClassVar[str]
    """What it does to a layer, for the report: "penalised", "steered", …"""
    covers_past: ClassVar[bool] = False
    """Whether it acts on the whole update, also on what was trained before the run."""
    measures: ClassVar[bool] = False
    """Whether it needs `Context.groups`, with V kept whole, too."""
    live_weights: ClassVar[bool] = False
    """Whether it changes the model's frozen weights while training, so that `enter` and `leave` are called."""
    pending: str = ""
    """What is still to come after training, as the end of a summary; the method has not acted until then."""
    base_check: str | None = None
    """What it found out about the base model, where it compared it."""
    last: CorrectionCallback | None = None
    """A correction that comes after every other callback when training ends."""

    def __init__(self, config: MethodOptions, context: Context) -> None:
        self.config: Any = config
        self.context = context
        self.first_step = 0
        self.start_norm = 0.0
        self._done: set[str] = set()

    @classmethod
    def ready(cls, config: Any, block: SafetyConfig, trainer: Any, references: Any) -> None:
        """Refuse what the method cannot act beside, before anything is built; what `requirements` cannot say."""

    # The training step.

    def loss(self, inner: Inner, model: Any, inputs: Any, return_outputs: bool, items: Any) -> Any:
        """The loss of one micro-batch while the model is in training mode; by default that of the methods before, or the trainer's."""
        return inner(model, inputs, return_outputs, items)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around one training step: forward, backward and what gradient checkpointing computes again."""
        yield

    def after_backward(self, returned: Any, items: Any) -> None:
        """After the training step of one micro-batch, with the loss that it returned."""

    @property
    def duties(self) -> tuple[str, ...]:
        """What the method must have done by the end of every optimizer step; `mark` says that it was."""
        return (self.name,)

    def mark(self, duty: str | None = None) -> None:
        """Note that a duty was done; by default the method's own name."""
        self._done.add(duty or self.name)

    def undone(self) -> list[str]:
        """The duties that were not done since this was asked last."""
        done, self._done = self._done, set()
        return [duty for duty in self.duties if duty not in done]

    # Frozen weights that training sees otherwise; only with `live_weights`.

    def enter(self) -> None:
        """Change the frozen weights for training."""

    def leave(self, *, gather: bool = True) -> None:
        """Put the aligned model's weights back; does nothing where they are there.

        Args:
            gather: whether the other processes can be counted on.
        """

    @property
    def entered(self) -> bool:
        """Whether the frozen weights are those for training now."""
        return False

    @property
    def leaves_to_save(self) -> bool:
        """Whether a save of the adapter would hold weights that were changed."""
        return False

    # The run.

    def begin(self, checkpoint: Path | None) -> None:
        """At the start of training; by default, take over a checkpoint that the method protected from its first step on.

        Args:
            checkpoint: what the run resumes from.
        """
        step = self.context.trainer.state.global_step
        protected = step == 0 or self.context.protected_until(checkpoint, self.name, self.settings) == step
        self.first_step = 0 if protected else step

    def before_save(self) -> None:
        """At the end of an optimizer step after which something will be saved, on every process."""

    def save(self, checkpoint: Path) -> None:
        """After a checkpoint was written, on every process: keep what a resumed run needs."""

    def end(self, *, ended: bool) -> None:
        """When training is over, however it ended."""

    def metrics(self) -> dict[str, float]:
        """Entries for the log, without the prefix `safety/`."""
        return {}

    # The report.

    @property
    def settings(self) -> dict[str, Any]:
        """The options as the report has them."""
        settings: dict[str, Any] = self.config.model_dump()
        return settings

    @property
    def delay(self) -> int:
        """Optimizer steps after `first_step` in which the method only gets ready."""
        return 0

    @property
    def idle(self) -> str | None:
        """Why these options protect nothing, whatever is trained; None where they may."""
        return None

    not_yet: str = "no step was trained"
    """What the report says before the method has acted."""

    @abstractmethod
    def describe(self, first: int, last: int) -> str:
        """One sentence on what was done in the optimizer steps `first` to `last`."""

    def measured(self) -> Mapping[str, Mapping[str, float]]:
        """Module → what was measured there, for the report."""
        return {}

    def report(self, steps: int) -> MethodReport:
        """The method's part of the safety report, until optimizer step `steps`."""
        first = self.first_step + self.delay
        active = steps > first
        if self.idle is not None:
            summary = self.idle
        elif not active:
            summary = self.not_yet
        else:
            summary = self.describe(first + 1, steps)
            if self.first_step:
                summary += f"; steps 1 to {self.first_step} were trained without it"
            if self.start_norm:
                summary += f"; {came_with(self.start_norm, covered=self.covers_past)}"
        acts = active and self.idle is None
        from_start = self.first_step == 0 and (self.covers_past or not self.start_norm)
        acted = acts and from_start and not self.pending
        rows = self.measured()
        layer_acts = acts and (from_start or not self.covers_past)
        return MethodReport(
            name=self.name,
            source=self.config.source,
            reconstruction=False,
            settings=self.settings,
            acted=acted,
            summary=summary + self.pending,
            steps=(first + 1, steps) if active and (acts or self.covers_past) else None,
            layers={
                module.name: LayerReport(
                    action=self.action if layer_acts else "left_alone",
                    reason=None if layer_acts else summary,
                    measured=dict(rows.get(module.name, {})),
                )
                for module in self.context.prepared.covered
            },
        )


def as_json(settings: Mapping[str, Any]) -> Any:
    """Settings after a round through JSON, as a report has them."""
    return json.loads(json.dumps(settings))
