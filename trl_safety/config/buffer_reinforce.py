"""The options of Buffer-and-Reinforce and of its merge."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from trl_safety.config.correction import CorrectionConfig
from trl_safety.config.method import MethodOptions, Stage
from trl_safety.config.options import Options
from trl_safety.config.requirements import (
    BESIDE_A_BUFFER,
    BUFFER_OUTSIDE_SFT,
    BUFFERS,
    HOOKS_BESIDE_COMPILATION,
    HOOKS_BESIDE_FUSED_KERNELS,
    ON_SHARDS,
    PLUGIN_TRAINER,
    SHOWN,
    UNSLOTH,
    Requirement,
    one_of,
)


class _MergeOptions(Options):
    """The parameters of the merge w_U·W_U + w_R·(I − αQQᵀ)·W_R."""

    alpha: Annotated[float, Field(ge=0, le=1)] = 0.1
    """α: how much of the ReinforceLoRA's part in the user's output directions is removed."""
    user_weight: Annotated[float, Field(gt=0)] = 0.5
    """w_U: weight of the user's update in the merged adapter."""
    reinforce_weight: Annotated[float, Field(gt=0)] = 0.5
    """w_R: weight of the orthogonalised ReinforceLoRA in the merged adapter."""
    rank: Annotated[int, Field(ge=1)] | None = None
    """Truncate the merged adapter, whose rank is the sum of both, to this rank; the report gives the energy lost."""
    collapse_threshold: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """τ: eigenvalues of the user's AAᵀ that are at most τ times the largest do not count as the user's directions (rank collapse)."""


class ReinforceMergeConfig(_MergeOptions, CorrectionConfig):
    """How a user's adapter and a ReinforceLoRA are merged: w_U·W_U + w_R·(I − αQQᵀ)·W_R."""

    hook: ClassVar[str] = "trl_safety.corrections.buffer_reinforce:ReinforceMerge"
    source: ClassVar[str] = "Buffer-and-Reinforce, arXiv 2605.24550"
    stage: ClassVar[Stage] = "merge"
    excludes: ClassVar[tuple[str, str] | None] = None
    needs: ClassVar[str] = "a provider's ReinforceLoRA"

    reinforce: str | None = None
    """Folder or Hub id of a ReinforceLoRA made by `trl-safety reinforce`."""

    @property
    def subspace_use(self) -> Literal["reads", "names", "none"]:
        """The merge reads a ReinforceLoRA instead of V."""
        return "none"

    @property
    def scales_adapter(self) -> str | None:
        """The merge, which applies the user's weight."""
        return "reinforce"


class BufferReinforceConfig(_MergeOptions, MethodOptions):
    """Buffer-and-Reinforce (arXiv 2605.24550): train with a frozen jailbreak buffer, detach it, merge with a reinforcing LoRA by QR."""

    hook: ClassVar[str] = "trl_safety.training.buffer_reinforce:BufferReinforce"
    source: ClassVar[str] = "Buffer-and-Reinforce, arXiv 2605.24550"
    stage: ClassVar[Stage] = "merge"
    excludes: ClassVar[tuple[str, str] | None] = BUFFERS
    needs: ClassVar[str] = "a provider's BufferLoRA, and a ReinforceLoRA for the merge"
    measured: ClassVar[Mapping[str, str]] = {
        "reinforce_norm": "‖ΔW‖ of the ReinforceLoRA",
        "removed_share": "share of its squared norm that was removed, along the user's directions",
        "kept_directions": "number of the user's directions",
    }
    shown: ClassVar[Mapping[str, str]] = {**SHOWN, **ON_SHARDS, **BUFFER_OUTSIDE_SFT}
    costs: ClassVar[str] = "a second frozen adapter in every training step; the merge takes seconds"
    whole_model: ClassVar[str | None] = "acts on the whole model"
    requirements: ClassVar[tuple[Requirement, ...]] = (
        HOOKS_BESIDE_FUSED_KERNELS,
        HOOKS_BESIDE_COMPILATION,
        UNSLOTH,
        PLUGIN_TRAINER,
        *BESIDE_A_BUFFER,
        Requirement(
            "engine",
            one_of("fsdp2"),
            "FSDP",
            "the merge changes the adapter's rank, which FSDP's shards do not allow",
            {"any": "remove reinforce, and merge the saved adapter with `trl-safety merge-reinforce`"},
            when=lambda options: options.reinforce is not None,
            when_text="with reinforce",
        ),
    )

    buffer: str
    """Folder or Hub id of a BufferLoRA made by `trl-safety buffer`. It acts only in training steps and is in no file of the run."""
    reinforce: str | None = None
    """Folder or Hub id of a ReinforceLoRA made by `trl-safety reinforce`; null trains with the buffer and merges nothing."""

    @model_validator(mode="after")
    def _nothing_unused(self) -> BufferReinforceConfig:
        given = self.model_dump(exclude_defaults=True, include=set(_MergeOptions.model_fields))
        if self.reinforce is None and given:
            option, value = next(iter(given.items()))
            raise ValueError(f"{option} = {value!r} is used only in the merge: give reinforce, or remove {option}")
        return self

    @property
    def changes_weights(self) -> bool:
        """The buffer is in the model while it trains."""
        return True

    @property
    def scales_adapter(self) -> str | None:
        """The merge, which applies the user's weight."""
        return "reinforce" if self.reinforce is not None else None

    @classmethod
    def correction_options(cls) -> type[MethodOptions] | None:
        """The options of the merge."""
        return ReinforceMergeConfig

    def merge(self) -> ReinforceMergeConfig | None:
        """The options of the merge at the end of training, if one is asked for."""
        return ReinforceMergeConfig(**self.model_dump(include=set(ReinforceMergeConfig.model_fields))) if self.reinforce else None
