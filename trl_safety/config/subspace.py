"""The options for building an alignment subspace before training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag, model_validator

from trl_safety.config.options import Options


class SubspaceConfig(Options):
    """Build the alignment subspace from a pair of checkpoints before training. Exactly one of rank, tolerance, whole."""

    base: str
    """The unaligned model: a local folder or a Hub id. Full precision, safetensors."""
    aligned: str
    """The aligned model that is fine-tuned: a local folder or a Hub id. Full precision, safetensors."""
    base_revision: str | None = None
    """Hub revision of `base`."""
    aligned_revision: str | None = None
    """Hub revision of `aligned`."""
    rank: Annotated[int, Field(ge=1)] | None = None
    """Keep this many singular directions of every layer."""
    tolerance: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Keep the fewest directions for which the relative error of C is at most this: σ²ₖ₊₁ ≤ tolerance · σ²₁."""
    whole: bool = False
    """Keep V itself, for an exact C."""
    trust_remote_code: bool = False
    """Run model code that comes with the checkpoint, to get its module names."""

    @model_validator(mode="after")
    def _one_cut(self) -> SubspaceConfig:
        if sum((self.rank is not None, self.tolerance is not None, self.whole)) != 1:
            raise ValueError("give exactly one of rank (e.g. 64), tolerance (e.g. 0.001) or whole: true")
        return self


def _kind(value: Any) -> str:
    return "<pair>" if isinstance(value, Mapping | SubspaceConfig) else "<path>"


# Discriminated by type, so that an error about a pair is not also reported as one about a path.
SubspaceSource = Annotated[Annotated[str, Tag("<path>")] | Annotated[SubspaceConfig, Tag("<pair>")], Discriminator(_kind)]
