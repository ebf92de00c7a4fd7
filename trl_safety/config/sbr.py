"""The options of SBR."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

from pydantic import Field

from trl_safety.config.method import MethodOptions, Stage
from trl_safety.config.requirements import HOOKS_BESIDE_COMPILATION, PLUGIN_TRAINER, SHOWN, UNSLOTH, Requirement, one_of, revised


class SbrConfig(MethodOptions):
    """SBR (arXiv 2605.05995): hold the last layer's state of a few harmful prompts where the model had it before fine-tuning."""

    hook: ClassVar[str] = "trl_safety.training.sbr:Sbr"
    source: ClassVar[str] = "SBR, arXiv 2605.05995"
    stage: ClassVar[Stage] = "loss"
    needs: ClassVar[str] = "eight harmful prompts that the aligned model refuses, without answers"
    shown: ClassVar[Mapping[str, str]] = SHOWN
    costs: ClassVar[str] = "a forward and a backward pass of the prompts, without logits, in every optimizer step"
    curves: ClassVar[Mapping[str, str]] = {"sbr": "how far the states of the harmful prompts are from those of the starting model, squared"}
    requirements: ClassVar[tuple[Requirement, ...]] = (
        PLUGIN_TRAINER,
        revised(UNSLOTH, reason="the prompts pass through layers that Unsloth has rewritten, which has not been shown to work"),
        revised(
            HOOKS_BESIDE_COMPILATION, reason="the prompts pass through the model's own layers, which has not been shown to work compiled"
        ),
        Requirement(
            "engine",
            one_of("fsdp2"),
            "FSDP",
            "the prompts pass through layers whose parameters FSDP gathers for the trainer's own forward alone",
            {"any": "use DDP"},
        ),
    )

    prompts: str | list[str]
    """Harmful prompts without answers: a local file (.jsonl, .json, .csv, .parquet), a dataset folder, a Hub id, or the prompts themselves."""
    column: str | None = None
    """The column of the prompts; null: `prompt`, or the first turns of `messages`."""
    number: Annotated[int, Field(ge=1)] = 8
    """K: the first so many prompts are used (the paper: 1 to 8)."""
    weight: Annotated[float, Field(ge=0)] = 50.0
    """λ, of mean_k mean_d (h_θ(x_k) − h_0(x_k))², the mean over prompts AND hidden units, as in the authors' code. The paper's formula has the
    sum over the d hidden units: its λ is this one divided by d. 0 measures and logs the distance and protects nothing."""
    ask_first: bool = True
    """Ask the starting model the prompts before training, and warn of those that it does not refuse: they bound nothing worth keeping."""
