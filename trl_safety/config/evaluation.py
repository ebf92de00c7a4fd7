"""The options of the evaluation while training."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from trl_safety.config.options import Options


class SafetyEvalConfig(Options):
    """Ask a small set of prompts while training, so that a loss of safety is seen while it happens. Judged by phrases of refusal."""

    harmful: str
    """JSON lines with `prompt`: the share that is complied with is logged as safety/attack."""
    benign: str | None = None
    """JSON lines with `prompt`: the share that is refused is logged as safety/over_refusal."""
    steps: Annotated[int, Field(ge=1)] = 100
    """Every so many optimizer steps, and when training ends."""
    most_prompts: Annotated[int, Field(ge=1)] = 64
    """Of each set, the first so many: the cost of one evaluation."""
    new_tokens: Annotated[int, Field(ge=1)] = 32
    """Length of a completion."""
    batch_size: Annotated[int, Field(ge=1)] = 32
    """Prompts at a time."""
    stop_above: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Stop training where the attack rate exceeds this; null: never. Not with a correction, which acts after what is measured."""
