"""The options of Buffer-and-Reinforce and of its merge."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from trl_safety.config.options import Options


class ReinforceMergeConfig(Options):
    """How a user's adapter and a ReinforceLoRA become one: w_U·W_U + w_R·(I − αQQᵀ)·W_R."""

    alpha: Annotated[float, Field(ge=0, le=1)] = 0.1
    """α: how much of the ReinforceLoRA's part in the user's output directions is removed."""
    user_weight: Annotated[float, Field(gt=0)] = 0.5
    """w_U: weight of the user's update in the merged adapter."""
    reinforce_weight: Annotated[float, Field(gt=0)] = 0.5
    """w_R: weight of the orthogonalised ReinforceLoRA in the merged adapter."""
    rank: Annotated[int, Field(ge=1)] | None = None
    """Cut the merged adapter, of the sum of both ranks, back to this; the report has the energy lost."""
    collapse_threshold: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """τ: eigenvalues of AAᵀ of the user's A that are at most τ times the largest do not count as the user's directions (rank collapse)."""


class BufferReinforceConfig(ReinforceMergeConfig):
    """Buffer-and-Reinforce (arXiv 2605.24550): train beside a frozen jailbreak buffer, detach it, merge with a reinforcing LoRA by QR."""

    buffer: str
    """Folder or Hub id of a BufferLoRA made by `trl-safety buffer`. It acts in training steps alone and is in no file of the run."""
    reinforce: str | None = None
    """Folder or Hub id of a ReinforceLoRA made by `trl-safety reinforce`; null trains beside the buffer and merges nothing."""

    @model_validator(mode="after")
    def _nothing_unused(self) -> BufferReinforceConfig:
        given = self.model_dump(exclude_defaults=True, include=set(ReinforceMergeConfig.model_fields))
        if self.reinforce is None and given:
            option, value = next(iter(given.items()))
            raise ValueError(f"{option} = {value!r} is used in the merge alone: give reinforce, or remove {option}")
        return self
