"""`SafeGRPOTrainer` and `SafeGRPOConfig`: TRL's GRPO with a `safety` block."""

from __future__ import annotations

from dataclasses import dataclass

from trl import GRPOConfig, GRPOTrainer

from trl_safety.training.block_trainer import BlockTrainer, SafeArguments


@dataclass
class SafeGRPOConfig(SafeArguments, GRPOConfig):
    """`trl.GRPOConfig` plus one field, `safety`; see `SafeArguments`. With `safety=None` nothing differs from the parent."""

    _VALID_DICT_FIELDS = [*GRPOConfig._VALID_DICT_FIELDS, "safety"]  # noqa: RUF012  # TrainingArguments' own protocol


class SafeGRPOTrainer(BlockTrainer, GRPOTrainer):
    """`trl.GRPOTrainer` that preserves the model's safety: a drop-in replacement, like `SafeSFTTrainer` for SFT.

    The rewarded completions must come from the model that will be used. A block with a buffer, which would be in the model while it
    generates, is therefore refused.

    Args:
        *args: as in `GRPOTrainer`.
        safety: the safety block: a `SafetyConfig`, a mapping, or the path of a YAML file. Or `args.safety`.
        subspace: an `AlignmentSubspace` (or its file or Hub id), used instead of the block's `subspace`.
        **kwargs: as in `GRPOTrainer`.

    Raises:
        ConfigurationError: an option is unknown, out of bounds or contradictory, a method cannot act in GRPO, or the block is given twice.
        AdapterError: the model has no LoRA adapter, one of an unsupported kind, or is not the aligned model.
        SubspaceError: an adapted layer is not in the alignment subspace.
    """
