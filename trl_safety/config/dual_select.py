"""The options of DualSelect."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from trl_safety.config.options import Options


class DualSelectConfig(Options):
    """DualSelect (arXiv 2606.09866): references and samples chosen by their gradients, and the reference gradient as a correction."""

    reference_dataset: str | dict[str, Any] | None = None
    """The pool of safety references: a local file (.jsonl, .json, .csv, .parquet), a dataset folder or a Hub id; in Axolotl also an
    entry as under `datasets`. Rows with a prompt and no answer are held to the starting model's distribution by KL."""
    warmup_steps: Annotated[int, Field(ge=1)] = 10
    """n₀: plain optimizer steps before the first refresh, whose gradients are the first task direction."""
    refresh_steps: Annotated[int, Field(ge=1)] | None = None
    """Score the pool again every so many optimizer steps; null: after the warm-up and then once an epoch."""
    selection: Literal["hard", "soft"] = "hard"
    """'hard' keeps samples with weight 1, 'soft' weights them by softmin(score / T)."""
    keep: Annotated[int, Field(ge=1)] | None = None
    """K: samples kept of each per-device batch. Default 4. Of a batch that is not full, the same share."""
    keep_tokens: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Instead of `keep`: the share of each batch's supervised tokens that is kept at most (the paper: 0.9)."""
    references: Annotated[int, Field(ge=1)] | None = None
    """K_ref: references chosen at each refresh. Default 32."""
    reference_share: Annotated[float, Field(gt=0, le=1)] | None = None
    """Instead of `references`: the share of the pool, rounded up (the paper: 0.1)."""
    rho: Annotated[float, Field(ge=0)] = 0.2
    """ρ: weight of the reference gradient in each update. 0 selects samples and corrects nothing."""
    mu_task: Annotated[float, Field(ge=0)] = 1.0
    """μ of the samples' scores."""
    mu_reference: Annotated[float, Field(ge=0)] = 1.0
    """μ of the references' scores."""
    nu: Annotated[float, Field(ge=0)] = 1.0
    """ν: weight of the gradients' conflict in both scores."""
    task_temperature: Annotated[float, Field(gt=0)] = 0.1
    """T of the soft weights of samples."""
    reference_temperature: Annotated[float, Field(gt=0)] = 0.1
    """T of the soft weights of references."""
    reference_gradient: Literal["cached", "fresh"] = "cached"
    """'cached': the mean gradient at the last refresh (authors). 'fresh': that of a batch of the chosen references in every step."""

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        data = dict(data)
        if data.get("keep") is None and data.get("keep_tokens") is None:
            data["keep"] = 4
        if data.get("references") is None and data.get("reference_share") is None:
            data["references"] = 32
        return data

    @model_validator(mode="after")
    def _one_of_each(self) -> DualSelectConfig:
        if (self.keep is None) == (self.keep_tokens is None):
            raise ValueError("give either keep (e.g. 4) or keep_tokens (e.g. 0.9), not both")
        if (self.references is None) == (self.reference_share is None):
            raise ValueError("give either references (e.g. 32) or reference_share (e.g. 0.1), not both")
        if self.selection == "hard" and (unused := [n for n in ("task_temperature", "reference_temperature") if getattr(self, n) != 0.1]):
            raise ValueError(f"{unused[0]} = {getattr(self, unused[0]):g} is used with selection: soft alone: remove it, or select softly")
        if self.reference_gradient == "fresh" and self.rho == 0:
            raise ValueError(
                "reference_gradient = 'fresh' is not used with rho = 0, which adds no reference gradient: remove one of the two"
            )
        if self.nu == 0 and self.rho == 0:
            raise ValueError("nu = 0 and rho = 0: the references would be neither compared with the samples nor added to the update")
        return self
