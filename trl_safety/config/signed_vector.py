"""The options of the signed vector."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from trl_safety.config.alignment_buffer import BufferOptions
from trl_safety.config.alignment_vector import AlignmentVectorConfig
from trl_safety.config.correction import CorrectionConfig
from trl_safety.config.method import MethodOptions, Stage
from trl_safety.config.options import Options
from trl_safety.config.requirements import BUFFERS, PLUGIN_TRAINER, Requirement, revised

SOURCE = "signed vector (trained on W_aligned + a·V, served on W_aligned + b·V)"


class _Served(Options):
    """What is added to the trained adapter."""

    serve: Annotated[float, Field(ge=-4, le=4)] = 0.0
    """b: how much of V is added to the finished adapter. 0 adds nothing; a negative value removes alignment."""
    rank: Annotated[int, Field(ge=1)] | None = None
    """k: how many of V's leading directions are used; null: all that the subspace keeps. Training with `how: weights` uses the whole V."""
    cut_to: Annotated[int, Field(ge=1)] | None = None
    """Truncate the adapter with V from rank r + k to this rank; the report gives the energy lost."""
    all_layers: bool = False
    """Also add b·V to layers of the subspace that the adapter does not have."""


class ServedVectorConfig(CorrectionConfig, _Served):
    """The signed vector on a trained adapter: ΔW ← ΔW + b·V, appended to the adapter's factors, whatever weights it was trained on."""

    hook: ClassVar[str] = "trl_safety.corrections.signed_vector:SignedVectorCorrection"
    source: ClassVar[str] = SOURCE
    needs: ClassVar[str] = AlignmentVectorConfig.needs
    costs: ClassVar[str] = AlignmentVectorConfig.costs
    loses_by_scaling: ClassVar[bool] = True

    @property
    def every_linear_layer(self) -> bool:
        """With `all_layers`."""
        return self.all_layers

    @property
    def idle(self) -> str | None:
        """See `CorrectionConfig.idle`."""
        return "serve = 0: nothing of V is added" if self.serve == 0 else None

    def vector(self) -> AlignmentVectorConfig:
        """The same correction with γ = b."""
        return AlignmentVectorConfig(gamma=self.serve, **self.model_dump(exclude={"serve"}))


class _Numbers(Options):
    train: Annotated[float, Field(ge=-4, le=4)] = 0.0
    """a: the adapter is trained on W_aligned + a·V. 0 trains on W_aligned, and −1 on the unaligned base itself."""


def _when_trained(found: Requirement) -> Requirement:
    """A requirement of training on other weights."""
    return revised(
        found, when=lambda options: options.train != 0 and found.when(options), when_text=f"{found.when_text} unless train is 0".strip()
    )


class SignedVectorConfig(BufferOptions, _Served, _Numbers):
    """Train the adapter on W_aligned + a·V, and serve it on W_aligned + b·V (a: `train`, b: `serve`).

    (0, 0) is plain fine-tuning, (0, γ) RESTA (arXiv 2402.11746), (−γ, 0) the data-free buffer, (γ, γ) LoX (arXiv 2506.15606).
    """

    hook: ClassVar[str] = "trl_safety.training.signed_vector:SignedVector"
    source: ClassVar[str] = SOURCE
    stage: ClassVar[Stage] = "merge"
    needs: ClassVar[str] = "an alignment subspace with a rank; without serve, the pair of checkpoints is enough"
    costs: ClassVar[str] = (
        "nothing in a step; with train, the frozen weights are exchanged around every evaluation; with serve, the adapter's rank becomes r + k"
    )
    measured: ClassVar[Mapping[str, str]] = AlignmentVectorConfig.measured
    loses_by_scaling: ClassVar[bool] = True
    requirements: ClassVar[tuple[Requirement, ...]] = (
        PLUGIN_TRAINER,
        *(_when_trained(found) for found in BufferOptions.requirements if found is not PLUGIN_TRAINER),
    )

    @model_validator(mode="after")
    def _nothing_ignored(self) -> SignedVectorConfig:
        given = self.model_fields_set
        if not given & {"train", "serve"}:
            raise ValueError("names neither train nor serve, so this is plain fine-tuning: set one of them")
        if self.train == 0 and (unused := [name for name in BufferOptions.model_fields if name in given]):
            raise ValueError(
                f"{unused[0]} = {getattr(self, unused[0])!r} is used only in training on other weights: set train, or remove it"
            )
        reads = self.serve != 0 or (self.train != 0 and self.how == "low_rank")
        unused = [name for name in ("cut_to", "all_layers") if getattr(self, name) and self.serve == 0]
        unused += ["rank"] if self.rank is not None and not reads else []
        if unused:
            where = "serve" if unused[0] != "rank" else "serve or how: low_rank"
            raise ValueError(f"{unused[0]} = {getattr(self, unused[0])!r} is used only with {where}: set it, or remove {unused[0]}")
        return self

    @property
    def removed(self) -> float:
        """−a."""
        return -self.train

    @property
    def groups(self) -> tuple[tuple[str, str], ...]:
        """A buffer with `train`, a correction with `serve`."""
        parts = (BUFFERS if self.train else None, CorrectionConfig.excludes if self.serve else None)
        return tuple(part for part in parts if part is not None)

    @property
    def cannot_skip(self) -> str | None:
        """Only training on exchanged weights acts on the whole model."""
        return super().cannot_skip if self.train else None

    @property
    def subspace_use(self) -> Literal["reads", "names", "none"]:
        """`serve` and a low-rank `train` read V; `train` by weights may take the pair's names from the subspace."""
        if self.serve:
            return "reads"
        return super().subspace_use if self.train else "names"

    @property
    def every_linear_layer(self) -> bool:
        """A low-rank `train` acts in every linear layer, `serve` with `all_layers`."""
        return self.all_layers or (self.train != 0 and super().every_linear_layer)

    @classmethod
    def correction_options(cls) -> type[MethodOptions] | None:
        """The options of what is done to the trained adapter."""
        return ServedVectorConfig

    def served(self) -> ServedVectorConfig:
        """The options of what is done to the trained adapter."""
        return ServedVectorConfig(**self.model_dump(include=set(_Served.model_fields)))
