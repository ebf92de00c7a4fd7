"""The lab's settings."""

from __future__ import annotations

SAMPLES = 1_000

POISON = 0.10

EPOCHS = 5

BATCH = 16

LEARNING_RATE = 5e-4

LORA_RANK = 16

SUBSPACE_RANK = 16

ASFT_WEIGHTS = (0.01, 0.1, 1.0)

REFERENCES = (200, 100)
"""Refusals of forbidden requests about topics in the user's data, and answers to benign ones."""

DUAL_SELECT = {"keep": BATCH // 2, "references": 32}

PROVIDER = {"harmful": 1_000, "refusals": 1_000, "benign": 1_000}
"""Training samples of the BufferLoRA and of the ReinforceLoRA. None has a topic on which the attack is measured."""

VECTOR_GAMMAS = (0.5, 1.0, 1.5)

BUFFER_GAMMAS = (0.5, 1.0)

NORM_TOLERANCE = 0.03

MOST_CONTROL_RUNS = 5

SBR_WEIGHT, SBR_PROMPTS = 50.0, 8
