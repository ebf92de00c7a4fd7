"""The options of SBR."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

from pydantic import Field

from trl_safety.config.method import MethodOptions, Stage
from trl_safety.config.requirements import (
    HOOKS_BESIDE_COMPILATION,
    OUTSIDE_SFT,
    PLUGIN_TRAINER,
    SHOWN,
    UNSLOTH,
    Requirement,
    one_of,
    revised,
)


class SbrConfig(MethodOptions):
    """SBR (arXiv 2605.05995): keep the last layer's states of a few harmful prompts close to those of the model before fine-tuning."""

    hook: ClassVar[str] = "trl_safety.training.sbr:Sbr"
    source: ClassVar[str] = "SBR, arXiv 2605.05995"
    stage: ClassVar[Stage] = "loss"
    needs: ClassVar[str] = "eight harmful prompts that the aligned model refuses, without answers"
    shown: ClassVar[Mapping[str, str]] = {**SHOWN, **OUTSIDE_SFT}
    costs: ClassVar[str] = "a forward and a backward pass of the prompts, without logits, in every optimizer step"
    curves: ClassVar[Mapping[str, str]] = {"sbr": "squared distance of the harmful prompts' states from the starting model's"}
    requirements: ClassVar[tuple[Requirement, ...]] = (
        PLUGIN_TRAINER,
        revised(UNSLOTH, reason="the prompts pass through layers that Unsloth has rewritten, which has not been shown to work"),
        revised(
            HOOKS_BESIDE_COMPILATION,
            reason="the prompts pass through the model's own layers, which has not been shown to work in a compiled model",
        ),
        Requirement(
            "engine",
            one_of("fsdp2"),
            "FSDP",
            "the prompts pass through layers whose parameters FSDP gathers only for the trainer's own forward pass",
            {"any": "use DDP"},
        ),
    )

    prompts: str | list[str]
    """Harmful prompts without answers: a local file (.jsonl, .json, .csv, .parquet), a dataset folder, a Hub id, or the prompts themselves."""
    column: str | None = None
    """The column that holds the prompts; null: `prompt`, or the first turns of `messages`."""
    number: Annotated[int, Field(ge=1)] = 8
    """K: how many prompts to use, from the first (the paper: 1 to 8)."""
    weight: Annotated[float, Field(ge=0)] = 50.0
    """λ, of mean_k mean_d (h_θ(x_k) − h_0(x_k))², the mean over prompts AND hidden units, as in the authors' code. The paper's formula sums
    over the d hidden units: its λ is this one divided by d. 0 measures and logs the distance, without protection."""
    ask_first: bool = True
    """Ask the starting model the prompts before training, and warn about those that it does not refuse: bounding them protects nothing."""
