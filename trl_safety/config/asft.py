"""The options of AsFT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from trl_safety.config.method import MethodOptions, Stage
from trl_safety.config.options import Operator
from trl_safety.config.requirements import ON_SHARDS, OUTSIDE_SFT, PLUGIN_TRAINER, SHOWN, Requirement


class AsftConfig(MethodOptions):
    """AsFT (arXiv 2506.08473): the loss term λ Σ ‖(I − C) ΔW‖²_F."""

    hook: ClassVar[str] = "trl_safety.training.asft:Asft"
    source: ClassVar[str] = "AsFT, arXiv 2506.08473"
    stage: ClassVar[Stage] = "loss"
    needs: ClassVar[str] = "an alignment subspace"
    requirements: ClassVar[tuple[Requirement, ...]] = (PLUGIN_TRAINER,)
    curves: ClassVar[Mapping[str, str]] = {"asft_penalty": "squared norm of the update outside the subspace, before the weight λ"}
    shown: ClassVar[Mapping[str, str]] = {
        **SHOWN,
        **ON_SHARDS,
        **OUTSIDE_SFT,
        "reference: computed before training, or by a second model": "tests/training/test_preference.py::test_another_reference_without_a_buffer",
        "unsloth: true": "tests/training/test_unsloth.py::test_what_reads_the_factors_acts_and_the_rest_is_refused",
    }
    costs: ClassVar[str] = "a few per cent of a step, and the subspace's factors on the device"

    weight: Annotated[float, Field(ge=0)] = 1.0
    """λ. The paper found 0.1 to 10 to work. 0 measures and logs the penalty, without protection."""
    operator: Operator = "scaled"
    """How the alignment subspace acts; see `safe_lora.operator`."""
    scaled: bool = False
    """Penalise ΔW = s·B·A with PEFT's scaling s; false is the authors' ΔW = B·A."""
    paper_lambda: bool = False
    """Apply λ once per micro-batch, as the authors' code does, so that the penalty grows with gradient accumulation."""

    @property
    def subspace_use(self) -> Literal["reads", "names", "none"]:
        """The penalty reads V."""
        return "reads"
