"""The options of the alignment buffer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

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
    revised,
)

_LOW_RANK: dict[str, Any] = {"when": lambda options: options.how == "low_rank", "when_text": "with how: low_rank"}


class BufferOptions(MethodOptions):
    """Base of the options of the methods that train the adapter on W_aligned − γ·V."""

    excludes: ClassVar[tuple[str, str] | None] = BUFFERS
    shown: ClassVar[Mapping[str, str]] = {**SHOWN, **ON_SHARDS, **BUFFER_OUTSIDE_SFT}
    whole_model: ClassVar[str | None] = "acts on the whole model with how: weights"
    requirements: ClassVar[tuple[Requirement, ...]] = (
        revised(HOOKS_BESIDE_FUSED_KERNELS, **_LOW_RANK),
        revised(HOOKS_BESIDE_COMPILATION, **_LOW_RANK),
        revised(UNSLOTH, **_LOW_RANK),
        revised(
            UNSLOTH,
            reason="Unsloth's kernels, and its vLLM, share the frozen weights, whose exchange has not been shown to reach them",
            when=lambda options: options.how == "weights",
            when_text="with how: weights",
        ),
        PLUGIN_TRAINER,
        *BESIDE_A_BUFFER,
        Requirement(
            "base_weights",
            one_of("8bit"),
            "8-bit",
            "8-bit weights cannot be exchanged and then restored exactly",
            {
                "axolotl": "set how: low_rank, load_in_4bit, or full precision",
                "any": "set how: low_rank, or load the model in 4 bits or in full precision",
            },
            when=lambda options: options.how == "weights",
            when_text="with how: weights",
        ),
    )

    how: Literal["weights", "low_rank"] = "weights"
    """'weights' loads W_aligned − γV from the two checkpoints into the frozen weights, and W_aligned back for every evaluation: exact, no
    memory, no time in a step. 'low_rank' removes the subspace's part of V with a frozen low-rank adapter in training steps."""
    embeddings: bool = True
    """With 'weights': also the embeddings and the output head; set false if the base has not learnt the chat template's tokens."""
    base: str | None = None
    """With 'weights': the unaligned model, folder or Hub id; null: the base of `safety.subspace`."""
    aligned: str | None = None
    """With 'weights': the aligned model's checkpoint; null: that of `safety.subspace`, or else the model that was loaded."""
    base_revision: str | None = None
    """Hub revision of `base`."""
    aligned_revision: str | None = None
    """Hub revision of `aligned`."""

    @model_validator(mode="after")
    def _nothing_unused(self) -> BufferOptions:
        if self.how == "low_rank":
            unused = [name for name in ("base", "aligned", "base_revision", "aligned_revision") if getattr(self, name) is not None]
            unused += ["embeddings"] if not self.embeddings else []
            if unused:
                raise ValueError(
                    f"{unused[0]} = {getattr(self, unused[0])!r} is not used with how: low_rank, which takes V from safety.subspace"
                )
        return self

    @property
    def removed(self) -> float:
        """γ in W_aligned − γ·V."""
        raise NotImplementedError

    @property
    def changes_weights(self) -> bool:
        """Unless γ is 0."""
        return self.removed != 0

    @property
    def cannot_skip(self) -> str | None:
        """A low-rank buffer can leave layers alone."""
        return None if self.how == "low_rank" else self.whole_model

    @property
    def subspace_use(self) -> Literal["reads", "names", "none"]:
        """'low_rank' reads V; 'weights' may take the pair's names from the subspace."""
        if self.how == "low_rank":
            return "reads"
        return "none" if self.base and self.aligned else "names"

    @property
    def every_linear_layer(self) -> bool:
        """A low-rank buffer acts in every linear layer."""
        return self.how == "low_rank"


class _Strength(Options):
    gamma: Annotated[float, Field(ge=0, le=4)] = 1.0
    """γ: how much of V is removed during training. 0 is plain fine-tuning, without protection."""


class AlignmentBufferConfig(BufferOptions, _Strength):
    """A data-free buffer: train the adapter on W_aligned − γ·V, then use it on W_aligned. γ = 1 trains on the unaligned base itself."""

    hook: ClassVar[str] = "trl_safety.training.alignment_buffer:AlignmentBuffer"
    source: ClassVar[str] = "alignment buffer (trained on W_aligned − γ·V)"
    stage: ClassVar[Stage] = "weights"
    needs: ClassVar[str] = "the pair of checkpoints, or an alignment subspace with a rank"
    costs: ClassVar[str] = "nothing in a step; the frozen weights are exchanged around every evaluation"

    @property
    def removed(self) -> float:
        """γ itself."""
        return self.gamma
