"""The options that all corrections share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from trl_safety.config.method import MethodOptions, Stage
from trl_safety.config.requirements import ON_SHARDS, SHOWN


class CorrectionConfig(MethodOptions):
    """Base of the options of all corrections of a trained adapter."""

    stage: ClassVar[Stage] = "correction"
    excludes: ClassVar[tuple[str, str] | None] = ("correction", "both rewrite the trained adapter")
    needs: ClassVar[str] = "an alignment subspace"
    shown: ClassVar[Mapping[str, str]] = {**SHOWN, **ON_SHARDS}
    costs: ClassVar[str] = "nothing while training; seconds when it ends"

    corrected_checkpoints: bool = False
    """Write a corrected copy into `checkpoint-N/safety/corrected/`; the checkpoint itself stays uncorrected and resumable."""

    @property
    def idle(self) -> str | None:
        """Why these options cannot change any adapter; None if they can. A sweep may include such a point, a run may not."""
        return None

    @property
    def subspace_use(self) -> Literal["reads", "names", "none"]:
        """A correction reads V."""
        return "reads"

    @classmethod
    def correction_options(cls) -> type[MethodOptions] | None:
        """The class itself."""
        return cls
