"""What an options class says of its method: where its code is, what it needs, and what it may not stand beside."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any, ClassVar, Literal

from trl_safety.config.options import Options
from trl_safety.config.requirements import Requirement

Stage = Literal["weights", "selection", "loss", "correction", "merge"]
STAGES: tuple[Stage, ...] = ("weights", "selection", "loss", "correction", "merge")
"""The order in which methods act: what changes the weights that training sees, what chooses samples and gradients, terms of the loss,
corrections of the trained adapter, and what comes after these."""


class MethodOptions(Options):
    """Base of the options of one method. The class is its entry in the registry.

    A field of this type in `SafetyConfig`, or an entry point in the group `trl_safety.methods`, is all that a method needs outside its
    own rooms.
    """

    hook: ClassVar[str]
    """`module:Class` of the `TrainingMethod` or `Correction`, imported when it is used."""
    source: ClassVar[str]
    """The paper, as reports and tables name it."""
    stage: ClassVar[Stage]
    """When it acts."""
    needs: ClassVar[str] = "nothing but the training data"
    """What a user must have, in words."""
    costs: ClassVar[str]
    """What it costs in time and memory, in words."""
    excludes: ClassVar[tuple[str, str] | None] = None
    """A group of which a block may have one method, and why, in words that complete "A and B …"."""
    whole_model: ClassVar[str | None] = None
    """What it acts on so that it cannot leave modules alone, in words that complete "NAME …"; None where it can."""
    changes_weights: ClassVar[bool] = False
    """Whether the model that is trained is another one than the model that is used."""
    reads_references: ClassVar[str | None] = None
    """The option that names a pool of rows, prepared by the host as it prepares the training data."""
    loses_by_scaling: ClassVar[bool] = False
    """Whether what it adds to the adapter would be lost where a later method scales the adapter down."""
    requirements: ClassVar[tuple[Requirement, ...]] = ()
    """What it cannot act beside, on top of `EVERY_METHOD`."""
    curves: ClassVar[Mapping[str, str]] = {}
    """Metrics that it logs, without `safety/`, and what each is, for the page of a run."""
    measured: ClassVar[Mapping[str, str]] = {}
    """What its report measures in every layer, and what each is, for the page of a run."""
    shown: ClassVar[Mapping[str, str]] = {}
    """"fact: meaning" of a requirement that the method does not have → the test that shows that it acts there."""

    @property
    def subspace_use(self) -> Literal["reads", "names", "none"]:
        """Whether these options read V from `safety.subspace`, take from it the names of the pair alone, or have no use for it."""
        return "none"

    @property
    def every_linear_layer(self) -> bool:
        """Whether these options read V of layers that the adapter does not have."""
        return False

    @property
    def scales_adapter(self) -> str | None:
        """The option by which the finished adapter is scaled down as a whole, where one is set."""
        return None

    @classmethod
    def correction_options(cls) -> type[MethodOptions] | None:
        """The options of the correction that this method is, or brings; None where it needs training."""
        return None

    @classmethod
    def load_hook(cls) -> Any:
        """The class that `hook` names."""
        module, _, name = cls.hook.partition(":")
        return getattr(import_module(module), name)
