"""What an options class declares about its method: where its code is, what it needs, and what it cannot be combined with."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any, ClassVar, Literal

from trl_safety.config.options import Options
from trl_safety.config.requirements import Requirement

Stage = Literal["weights", "selection", "loss", "correction", "merge"]
STAGES: tuple[Stage, ...] = ("weights", "selection", "loss", "correction", "merge")
"""The order in which methods act: changes to the weights that training sees, selection of samples and gradients, loss terms,
corrections of the trained adapter, and merges after these."""


class MethodOptions(Options):
    """Base of the options of one method. The class is the method's entry in the registry.

    A field of this type in `SafetyConfig`, or an entry point in the group `trl_safety.methods`, is all that a method needs outside its
    own rooms.
    """

    hook: ClassVar[str]
    """`module:Class` of the `TrainingMethod` or `Correction`, imported on use."""
    source: ClassVar[str]
    """The paper, as named in reports and tables."""
    stage: ClassVar[Stage]
    """When it acts."""
    needs: ClassVar[str] = "nothing but the training data"
    """What a user must have, in words."""
    costs: ClassVar[str]
    """What it costs in time and memory, in words."""
    excludes: ClassVar[tuple[str, str] | None] = None
    """A group from which a block may have only one method, and why, in words that complete "A and B …"."""
    whole_model: ClassVar[str | None] = None
    """Why it cannot leave modules alone, in words that complete "NAME …"; None if it can."""
    reads_references: ClassVar[str | None] = None
    """The option that names a pool of rows, which the host prepares like the training data."""
    loses_by_scaling: ClassVar[bool] = False
    """Whether what it adds to the adapter would be lost if a later method scales the adapter down."""
    requirements: ClassVar[tuple[Requirement, ...]] = ()
    """What it cannot be combined with, in addition to `EVERY_METHOD`."""
    curves: ClassVar[Mapping[str, str]] = {}
    """Metrics that it logs, without `safety/`, and what each means, for the run page."""
    measured: ClassVar[Mapping[str, str]] = {}
    """What its report measures in every layer, and what each value means, for the run page."""
    shown: ClassVar[Mapping[str, str]] = {}
    """"fact: meaning" of a requirement that the method does not have → the test that shows that the method acts there."""

    @property
    def groups(self) -> tuple[tuple[str, str], ...]:
        """The groups in which these options are: `excludes`, unless it depends on the options."""
        return (self.excludes,) if self.excludes else ()

    @property
    def cannot_skip(self) -> str | None:
        """Why these options cannot leave modules alone: `whole_model`, unless it depends on the options."""
        return self.whole_model

    @property
    def changes_weights(self) -> bool:
        """Whether training uses other model weights than inference."""
        return False

    @property
    def subspace_use(self) -> Literal["reads", "names", "none"]:
        """Whether these options read V from `safety.subspace`, only take the pair's names from it, or do not use it."""
        return "none"

    @property
    def every_linear_layer(self) -> bool:
        """Whether these options read V of layers that the adapter does not have."""
        return False

    @property
    def scales_adapter(self) -> str | None:
        """The option that scales down the whole finished adapter, if it is set."""
        return None

    @classmethod
    def correction_options(cls) -> type[MethodOptions] | None:
        """The options of the correction that this method is, or provides; None if it needs training."""
        return None

    @classmethod
    def load_hook(cls) -> Any:
        """The class that `hook` names."""
        module, _, name = cls.hook.partition(":")
        return getattr(import_module(module), name)
