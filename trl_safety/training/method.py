"""`TrainingMethod`: the hooks of a method that acts during training, and when the driver calls them."""

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
    """What a training method is built from.

    Attributes:
        trainer: the trainer, with its model, data and arguments.
        block: the whole safety block.
        prepared: the checked adapter.
        subspace: the block's alignment subspace, where there is one.
        groups: the adapter's factors with their operators; None if nothing measures them.
        references: the method's pool of reference rows, prepared by the host; None if it reads none.
        protected_until: (checkpoint, method, settings) → the optimizer step up to which, by the checkpoint's report, the method protected it
            from step 1 on; None if the report does not say so.
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

    The driver builds a block's methods in the order in which they act, wraps their `loss` around the trainer's, enters `step` around every
    training step, and checks after every optimizer step that all `duties` were done.

    Args:
        config: the method's options.
        context: the run.

    Attributes:
        first_step: in a resumed run, the last step that was trained without the method; otherwise 0.
        start_norm: ‖ΔW‖ that the adapter had before the run.
    """

    name: ClassVar[str]
    """Its name in the safety block."""
    action: ClassVar[str]
    """What it does to a layer, for the report: "penalised", "steered", …"""
    covers_past: ClassVar[bool] = False
    """Whether it acts on the whole update, including what was trained before the run."""
    measures: ClassVar[bool] = False
    """Whether it needs `Context.groups`, even where V is kept whole."""
    live_weights: ClassVar[bool] = False
    """Whether it changes the model's frozen weights during training; `enter` and `leave` are then called."""
    pending: str = ""
    """What remains to be done after training, worded as the end of a summary; until then the method has not acted."""
    base_check: str | None = None
    """The result of comparing the base model, if the method compares it."""
    last: CorrectionCallback | None = None
    """A correction that runs after every other callback when training ends."""

    def __init__(self, config: MethodOptions, context: Context) -> None:
        self.config: Any = config
        self.context = context
        self.first_step = 0
        self.start_norm = 0.0
        self._done: set[str] = set()

    @classmethod
    def ready(cls, config: Any, block: SafetyConfig, trainer: Any, references: Any) -> None:
        """Before anything is built, refuse settings that keep the method from acting and that `requirements` cannot express."""

    # The training step.

    def loss(self, inner: Inner, model: Any, inputs: Any, return_outputs: bool, items: Any) -> Any:
        """The loss of one micro-batch in training mode; by default the loss of the methods before this one, or the trainer's."""
        return inner(model, inputs, return_outputs, items)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Wraps one training step: forward, backward, and recomputation by gradient checkpointing."""
        yield

    def after_backward(self, returned: Any, items: Any) -> None:
        """Called after the training step of one micro-batch, with the loss it returned."""

    @property
    def duties(self) -> tuple[str, ...]:
        """What the method must do in every optimizer step; `mark` records that it did."""
        return (self.name,)

    def mark(self, duty: str | None = None) -> None:
        """Record that a duty was done; by default the one named after the method."""
        self._done.add(duty or self.name)

    def undone(self) -> list[str]:
        """The duties not done since the last call."""
        done, self._done = self._done, set()
        return [duty for duty in self.duties if duty not in done]

    # Frozen weights that differ during training; only with `live_weights`.

    def enter(self) -> None:
        """Change the frozen weights for training."""

    def leave(self, *, gather: bool = True) -> None:
        """Restore the aligned model's weights; does nothing if they are in place.

        Args:
            gather: whether all processes will take part.
        """

    @property
    def entered(self) -> bool:
        """Whether the frozen weights are currently the ones for training."""
        return False

    @property
    def leaves_to_save(self) -> bool:
        """Whether saving the adapter would also save changed weights."""
        return False

    # The run.

    def begin(self, checkpoint: Path | None) -> None:
        """Called at the start of training; by default, continue a checkpoint that the method protected from step 1 on.

        Args:
            checkpoint: what the run resumes from.
        """
        step = self.context.trainer.state.global_step
        protected = step == 0 or self.context.protected_until(checkpoint, self.name, self.settings) == step
        self.first_step = 0 if protected else step

    def before_save(self) -> None:
        """Called on every process at the end of an optimizer step that a save will follow."""

    def save(self, checkpoint: Path) -> None:
        """Called on every process after a checkpoint was written: save what a resumed run needs."""

    def end(self, *, ended: bool) -> None:
        """Called when training is over, even after an error."""

    def metrics(self) -> dict[str, float]:
        """Entries for the log, without the prefix `safety/`."""
        return {}

    # The report.

    @property
    def settings(self) -> dict[str, Any]:
        """The options as the report records them."""
        settings: dict[str, Any] = self.config.model_dump()
        return settings

    @property
    def delay(self) -> int:
        """Optimizer steps after `first_step` in which the method only prepares."""
        return 0

    @property
    def idle(self) -> str | None:
        """Why these options protect nothing, whatever is trained; None if they can protect."""
        return None

    not_yet: str = "no step was trained"
    """What the report says before the method has acted."""

    @abstractmethod
    def describe(self, first: int, last: int) -> str:
        """One sentence on what was done in optimizer steps `first` to `last`."""

    def measured(self) -> Mapping[str, Mapping[str, float]]:
        """Module → its measurements, for the report."""
        return {}

    def report(self, steps: int) -> MethodReport:
        """The method's part of the safety report, up to optimizer step `steps`."""
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
    """Settings after a round trip through JSON, as in a report."""
    return json.loads(json.dumps(settings))
