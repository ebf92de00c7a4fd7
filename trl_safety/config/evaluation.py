"""The options of the evaluation during training."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from trl_safety.config.options import Options


class SafetyEvalConfig(Options):
    """Ask a small set of prompts during training, so that a loss of safety shows when it happens. Refusals are detected by phrases."""

    harmful: str
    """JSON lines with `prompt`: the share that the model complies with is logged as safety/attack."""
    benign: str | None = None
    """JSON lines with `prompt`: the share that the model refuses is logged as safety/over_refusal."""
    steps: Annotated[int, Field(ge=1)] = 100
    """Evaluate after every this many optimizer steps, and when training ends."""
    most_prompts: Annotated[int, Field(ge=1)] = 64
    """Ask at most this many prompts, from the start of each set; this bounds the cost of one evaluation."""
    new_tokens: Annotated[int, Field(ge=1)] = 32
    """Maximum number of new tokens in a completion."""
    batch_size: Annotated[int, Field(ge=1)] = 32
    """Number of prompts generated at a time."""
    stop_above: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Stop training if the attack rate exceeds this; null: never. Not with a correction, which acts after the measurement."""
