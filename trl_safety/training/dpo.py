"""`SafeDPOTrainer` and `SafeDPOConfig`: TRL's DPO with a `safety` block."""

from __future__ import annotations

from dataclasses import dataclass

from trl import DPOConfig, DPOTrainer

from trl_safety.training.block_trainer import BlockTrainer, SafeArguments


@dataclass
class SafeDPOConfig(SafeArguments, DPOConfig):
    """`trl.DPOConfig` plus one field, `safety`; see `SafeArguments`. With `safety=None` nothing differs from the parent."""

    _VALID_DICT_FIELDS = [*DPOConfig._VALID_DICT_FIELDS, "safety"]  # noqa: RUF012  # TrainingArguments' own protocol


class SafeDPOTrainer(BlockTrainer, DPOTrainer):
    """`trl.DPOTrainer` that preserves the model's safety: a drop-in replacement, like `SafeSFTTrainer` for SFT.

    The reference's log-probabilities come from the same frozen weights as the policy's: TRL computes both in one training step, the
    reference's with the adapter off, so that a buffer is in both or in neither. A block with a buffer therefore refuses
    `ref_model` and `precompute_ref_log_probs`, which would not include it.

    Args:
        *args: as in `DPOTrainer`.
        safety: the safety block: a `SafetyConfig`, a mapping, or the path of a YAML file. Or `args.safety`.
        subspace: an `AlignmentSubspace` (or its file or Hub id), used instead of the block's `subspace`.
        **kwargs: as in `DPOTrainer`.

    Raises:
        ConfigurationError: an option is unknown, out of bounds or contradictory, a method cannot act in DPO, or the block is given twice.
        AdapterError: the model has no LoRA adapter, one of an unsupported kind, or is not the aligned model.
        SubspaceError: an adapted layer is not in the alignment subspace.
    """
