"""The lab's settings."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

SHARED = ("samples", "poison", "epochs", "batch", "learning_rate", "lora_rank")
"""The settings of every fine-tuning."""


@dataclass(frozen=True)
class Settings:
    """How the lab fine-tunes, and the strengths at which it tries each method.

    Attributes:
        samples: the user's rows.
        poison: share of them that comply with a forbidden request.
        epochs: of every fine-tuning.
        batch: rows in a step.
        learning_rate: of every fine-tuning, with a cosine schedule.
        lora_rank: rank of every adapter; alpha is twice that.
        subspace_rank: rank of V where a method uses a part of it.
        scales: factors of the plainly trained update: the cheapest protection there is.
        safe_lora_threshold: cosine at or below which Safe LoRA projects a layer.
        safe_lora_layers: number of layers that Safe LoRA projects in its other mode.
        asft_weights: AsFT's λ.
        references: refusals of forbidden requests and answers to benign ones in DualSelect's pool. The attack's topics are not in it.
        dual_select_keep: samples of a batch that DualSelect keeps.
        dual_select_references: samples of the pool that it chooses.
        provider_harmful: samples of the BufferLoRA. The attack's topics are not in them.
        provider_refusals: refusals that the ReinforceLoRA learns.
        provider_benign: answers to benign requests that it learns.
        vector_gammas: strengths of the alignment vector added after training.
        buffer_gammas: strengths of the alignment buffer.
        sbr_prompts: forbidden requests whose states SBR holds.
        sbr_weight: SBR's λ.
        control_runs: trainings that a control by plain L2 may take to meet its method's ‖ΔW‖; 0 leaves these controls out.
        control_tolerance: allowed difference of the norms' logarithms.
    """

    samples: int = 1_000
    poison: float = 0.10
    epochs: int = 5
    batch: int = 16
    learning_rate: float = 5e-4
    lora_rank: int = 16
    subspace_rank: int = 16
    scales: tuple[float, ...] = (0.8, 0.65, 0.5, 0.3)
    safe_lora_threshold: float = 0.5
    safe_lora_layers: int = 10
    asft_weights: tuple[float, ...] = (0.01, 0.1, 1.0)
    references: tuple[int, int] = (200, 100)
    dual_select_keep: int = 8
    dual_select_references: int = 32
    provider_harmful: int = 1_000
    provider_refusals: int = 1_000
    provider_benign: int = 1_000
    vector_gammas: tuple[float, ...] = (0.5, 1.0, 1.5)
    buffer_gammas: tuple[float, ...] = (0.5, 1.0)
    sbr_prompts: int = 8
    sbr_weight: float = 50.0
    control_runs: int = 5
    control_tolerance: float = 0.03

    def of(self, *prefixes: str) -> dict[str, Any]:
        """The settings that every row depends on, and those whose names begin with one of `prefixes`."""
        return {name: value for name, value in asdict(self).items() if name in SHARED or name.startswith(prefixes)}


FULL = Settings()
"""Every method at several strengths, with every control."""

QUICK = replace(FULL, scales=(0.65,), asft_weights=(0.1,), vector_gammas=(0.5,), buffer_gammas=(0.5,), control_runs=0)
"""Every method at one strength, without the controls that are trained several times."""
