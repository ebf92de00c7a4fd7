"""`SafeSFTTrainer` and `SafeSFTConfig`: TRL's SFT with a `safety` block. The only file that imports trl."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Union

from trl import SFTConfig, SFTTrainer

from trl_safety.adapters.subspace import AlignmentSubspace
from trl_safety.config import SafetyConfig
from trl_safety.errors import ConfigurationError
from trl_safety.training.mixin import SafetyMixin, safety_section


@dataclass
class SafeSFTConfig(SFTConfig):
    """`trl.SFTConfig` plus one field; with `safety=None` nothing differs from the parent.

    Args:
        safety: the safety block: a `SafetyConfig`, a mapping, the path of a YAML file, or (on a command line) JSON. It is kept
            as a plain mapping, so that the arguments can be saved and logged.

    Raises:
        ConfigurationError: an option is unknown, out of bounds or contradictory.
    """

    _taken = False
    _VALID_DICT_FIELDS = [*SFTConfig._VALID_DICT_FIELDS, "safety"]  # noqa: RUF012  # TrainingArguments' own protocol

    # HfArgumentParser reads the annotation at run time and accepts a union only in this form.
    safety: Optional[Union[dict, str]] = field(  # type: ignore[type-arg]  # noqa: UP007, UP045
        default=None, metadata={"help": "The safety block: a mapping, the path of a YAML file, or JSON."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.safety is not None:
            self.safety = SafetyConfig.parse(self.safety).model_dump(mode="json", exclude_unset=True)

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """As the parent's. Every Trainer asks for it when training starts, so that it is the place to refuse one without protection."""
        if self.safety is not None and not self._taken:
            raise ConfigurationError("args.safety is set, but the trainer is no SafeSFTTrainer and would ignore it: use SafeSFTTrainer")
        steps: int = super().get_warmup_steps(num_training_steps)
        return steps


class SafeSFTTrainer(SafetyMixin, SFTTrainer):
    """`trl.SFTTrainer` that keeps the model's safety.

    A drop-in: the same arguments, and without a safety block the same computation bit for bit. With one it differs in: the
    AsFT penalty is part of the training loss (and of the logged `loss`), a correction is applied when training ends,
    `safety/…` metrics are in every log, and `safety_report.json` lies beside every saved adapter.

    Args:
        *args: as in `SFTTrainer`.
        safety: the safety block: a `SafetyConfig`, a mapping, or the path of a YAML file. Or `args.safety`.
        subspace: an `AlignmentSubspace` (or its file or Hub id), in place of the block's `subspace`.
        **kwargs: as in `SFTTrainer`.

    Raises:
        ConfigurationError: an option is unknown, out of bounds or contradictory, or the block is given twice.
        AdapterError: the model has no LoRA adapter, one of an unsupported kind, or is not the aligned model.
        SubspaceError: an adapted layer is not in the alignment subspace.
    """

    def __init__(
        self,
        *args: Any,
        safety: SafetyConfig | Mapping[str, Any] | str | Path | None = None,
        subspace: AlignmentSubspace | str | Path | None = None,
        **kwargs: Any,
    ) -> None:
        training_args = kwargs.get("args", args[1] if len(args) > 1 else None)
        in_args = getattr(training_args, "safety", None)
        if safety is not None and in_args is not None:
            raise ConfigurationError("safety is given to SafeSFTTrainer and in args.safety: keep one of them")
        # Validated before the parent loads a model and tokenises a dataset.
        block = safety if safety is not None else in_args
        config = SafetyConfig.parse(block) if block is not None else None
        super().__init__(*args, **kwargs)
        self.start_safety(config, subspace)
        self.args._taken = True

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The parent's model card with the safety section."""
        super().create_model_card(*args, **kwargs)
        safety_section(self, Path(self.args.output_dir) / "README.md")
