"""The options of the alignment buffer."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from trl_safety.config.options import Options


class AlignmentBufferConfig(Options):
    """A data-free buffer: train the adapter on W_aligned − γ·V, then put it on W_aligned. With γ = 1 that is the unaligned base itself."""

    gamma: Annotated[float, Field(ge=0, le=4)] = 1.0
    """γ: how much of V is taken out while training. 0 is plain fine-tuning and protects nothing."""
    how: Literal["weights", "low_rank"] = "weights"
    """'weights' reads W_aligned − γV from the two checkpoints into the frozen weights, and W_aligned back for every evaluation: exact, no
    memory, no time in a step. 'low_rank' takes the subspace's part of V out by a frozen low-rank adapter in training steps."""
    embeddings: bool = True
    """With 'weights': also the embeddings and the output head; false where the base has not learnt the chat template's tokens."""
    base: str | None = None
    """With 'weights': the unaligned model, folder or Hub id; null: that of `safety.subspace`."""
    aligned: str | None = None
    """With 'weights': the aligned model's checkpoint; null: that of `safety.subspace`, else the one that was loaded."""
    base_revision: str | None = None
    """Hub revision of `base`."""
    aligned_revision: str | None = None
    """Hub revision of `aligned`."""

    @model_validator(mode="after")
    def _nothing_unused(self) -> AlignmentBufferConfig:
        if self.how == "low_rank":
            unused = [name for name in ("base", "aligned", "base_revision", "aligned_revision") if getattr(self, name) is not None]
            unused += ["embeddings"] if not self.embeddings else []
            if unused:
                raise ValueError(
                    f"{unused[0]} = {getattr(self, unused[0])!r} is not used with how: low_rank, which takes V from safety.subspace"
                )
        return self
