"""`SafeSFTTrainer` and `SafeSFTConfig`, TRL's SFT with a `safety` block, and the trainers of a provider's adapters. With `sft.py` the
only file that imports trl.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Union

from datasets import Dataset
from trl import SFTConfig, SFTTrainer, pack_dataset

from trl_safety.config.block import SafetyConfig
from trl_safety.errors import ConfigurationError
from trl_safety.subspace.artifact import AlignmentSubspace
from trl_safety.training.data import load_rows, splittable
from trl_safety.training.documents import ROW, number_documents, number_tokens, with_rows
from trl_safety.training.mixin import SafetyMixin
from trl_safety.training.provider import ProviderMixin, refuse_push
from trl_safety.training.references import (
    References,
    check_format,
    pools,
    prompts_only,
    tokenised_answers,
    tokenised_prompts,
)
from trl_safety.training.start import safety_section

TRAIN_DATASET = 3
"""Position of `train_dataset` among SFTTrainer's arguments."""


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

    @property
    def train_batch_size(self) -> int:
        """As the parent's. Every Trainer asks for it when it is made, so that it is the place to refuse one without protection."""
        if self.safety is not None and not self._taken:
            raise ConfigurationError("args.safety is set, but the trainer is no SafeSFTTrainer and would ignore it: use SafeSFTTrainer")
        size: int = super().train_batch_size
        return size

    def __getstate__(self) -> dict[str, Any]:
        """A copy, or what a checkpoint keeps of it, is nobody's."""
        return {name: value for name, value in vars(self).items() if name != "_taken"}


@contextmanager
def _served(args: Any) -> Iterator[None]:
    """Within it a SafeSFTTrainer works with these arguments; any other trainer that does would ignore their block."""
    if not isinstance(args, SafeSFTConfig) or args._taken:
        yield
        return
    args._taken = True
    try:
        yield
    finally:
        args._taken = False


class SafeSFTTrainer(SafetyMixin, SFTTrainer):
    """`trl.SFTTrainer` that keeps the model's safety.

    A drop-in: the same arguments, and without a safety block the same computation bit for bit. With one it differs in: what
    the methods add to the training loss is part of the logged `loss`, a correction is applied when training ends,
    `safety/…` metrics are in every log, and `safety_report.json` lies beside every saved adapter.

    Args:
        *args: as in `SFTTrainer`.
        safety: the safety block: a `SafetyConfig`, a mapping, or the path of a YAML file. Or `args.safety`.
        reference_dataset: the pool of safe references for a method that reads one, in any format that `train_dataset` takes, or as prompts
            only; used instead of the method's own option.
        subspace: an `AlignmentSubspace` (or its file or Hub id), used instead of the block's `subspace`.
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
        reference_dataset: Dataset | None = None,
        **kwargs: Any,
    ) -> None:
        training_args = kwargs.get("args", args[1] if len(args) > 1 else None)
        in_args = getattr(training_args, "safety", None)
        if safety is not None and in_args is not None:
            raise ConfigurationError("safety is given to SafeSFTTrainer and in args.safety: keep one of them")
        # Validated before the parent loads a model and tokenises a dataset.
        block = safety if safety is not None else in_args
        config = SafetyConfig.parse(block) if block is not None else None
        if in_args is not None:
            # A copy: the user's own arguments, given to another trainer, are refused by it.
            taken: Any = copy.copy(training_args)
            args, kwargs = (args, {**kwargs, "args": taken}) if "args" in kwargs else ((args[0], taken, *args[2:]), kwargs)
        references = self._references(config, reference_dataset)
        if references:
            args, kwargs = _numbered(args, kwargs)
        with _served(taken if in_args is not None else None):
            super().__init__(*args, **kwargs)
        self.start_safety(config, subspace, self._prepared(config, references, kwargs.get("formatting_func")))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """The parent's."""
        with _served(self.args):
            return super().train(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """The parent's."""
        with _served(self.args):
            return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """The parent's."""
        with _served(self.args):
            return super().predict(*args, **kwargs)

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, packing: Any, *rest: Any, **options: Any) -> Any:
        """The parent's. Where rows are numbered and packed, the numbers are packed with their tokens, which the parent would drop."""
        cut = args.max_length is None or args.packing_strategy == "wrapped"
        if not packing or cut or ROW not in dataset.column_names:
            return super()._prepare_dataset(dataset, processing_class, args, packing, *rest, **options)
        tokenised: Any = copy.copy(args)
        # Packing cuts by itself. Beside Liger's kernels the parent drops every column that is not its own.
        tokenised.max_length, tokenised.use_liger_kernel = None, False
        dataset = number_tokens(super()._prepare_dataset(dataset, processing_class, tokenised, False, *rest, **options))
        options = {"num_proc": args.dataset_num_proc, "desc": "Packing the dataset"}
        packed = number_documents(pack_dataset(dataset, args.max_length, args.packing_strategy, options), args.max_length)
        return packed.shuffle(seed=args.seed) if args.shuffle_dataset else packed

    @staticmethod
    def _references(config: SafetyConfig | None, given: Dataset | None) -> dict[str, Dataset]:
        """The pools of the methods that read one, loaded before the parent loads a model."""
        wanted = pools(config) if config else {}
        if given is not None and not wanted:
            raise ConfigurationError(
                "reference_dataset is given but no method of the safety block reads one: add one that does, or remove the data set"
            )
        return {name: _pool(setting, getattr(config, name), given) for name, setting in wanted.items()}

    def _prepared(self, config: SafetyConfig | None, references: Mapping[str, Dataset], formatting_func: Any) -> dict[str, References]:
        """The tokenised pools. Only answers are supervised, whatever the format of the training data."""
        prepared = {}
        for name, setting in (pools(config) if config else {}).items():
            raw = references[name]
            kl = prompts_only(raw, setting)
            if kl:
                rows = tokenised_prompts(raw, self.processing_class, self.args.max_length, setting)
            elif splittable(raw.column_names) and "input_ids" not in raw.column_names:
                rows = tokenised_answers(
                    raw,
                    self.processing_class,
                    self.args.max_length,
                    setting,
                    keep_end=getattr(self.args, "truncation_mode", "keep_start") == "keep_end",
                    chat_template=self.chat_template,
                )
            else:
                check_format(raw, self.args.dataset_text_field if formatting_func is None else None, setting)
                # The parent derived this from the training data.
                own = getattr(self, "completion_only_loss")  # noqa: B009  # the parent is unknown to the type check
                self.completion_only_loss = True
                try:
                    rows = self._prepare_dataset(raw, self.processing_class, self.args, False, formatting_func, "reference")
                finally:
                    self.completion_only_loss = own
            if len(rows) < len(raw):
                raise ConfigurationError(
                    f"{setting}: {len(raw) - len(rows)} of {len(raw)} references have no answer within max_length = "
                    f"{self.args.max_length}: raise it, or remove those rows"
                )
            prepared[name] = References(rows, kl)
        return prepared

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The parent's model card with the safety section."""
        super().create_model_card(*args, **kwargs)
        safety_section(self, Path(self.args.output_dir) / "README.md")


class BufferTrainer(ProviderMixin, SFTTrainer):
    """`trl.SFTTrainer` that trains a BufferLoRA (arXiv 2605.24550): plain SFT on harmful requests and answers, on the aligned model.

    It takes the parent's arguments. The adapter makes the model harmful: every saved folder is marked as a buffer, nothing is
    uploaded, and trl-safety refuses it wherever a user's adapter is expected. Differs from the authors' code only in that mark.

    Raises:
        AdapterError: the adapter trains more than plain LoRA factors.
        ConfigurationError: `push_to_hub` is on.
    """

    kind = "buffer"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # The parent creates the Hub repository in its constructor.
        refuse_push(kwargs.get("args", args[1] if len(args) > 1 else None))
        super().__init__(*args, **kwargs)
        self.start_provider(None)


class ReinforceTrainer(ProviderMixin, SFTTrainer):
    """`trl.SFTTrainer` that trains a ReinforceLoRA (arXiv 2605.24550): SFT on harmful requests and refusals, and on benign pairs, beside
    the frozen buffer.

    It takes the parent's arguments. Differs from the authors' code, which merges the buffer into the model: here it is attached only
    during training steps, so evaluation runs without it.

    Args:
        *args: as in `SFTTrainer`.
        buffer: folder or Hub id of a BufferLoRA made by `BufferTrainer` or `trl-safety buffer`.
        **kwargs: as in `SFTTrainer`.

    Raises:
        AdapterError: the adapter trains more than plain LoRA factors, or the buffer is missing or belongs to another model.
        ConfigurationError: `torch_compile` is on.
    """

    kind = "reinforce"

    def __init__(self, *args: Any, buffer: str | Path, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.start_provider(buffer)


def _pool(setting: str, options: Any, given: Dataset | None) -> Dataset:
    named = getattr(options, setting.rpartition(".")[2])
    if given is not None and named is not None:
        raise ConfigurationError(f"{setting} = {named!r}: a reference_dataset is also given as an argument; keep one of them")
    source = given if given is not None else named
    if source is None:
        raise ConfigurationError(f"{setting} is missing: give a .jsonl file, a Hub id, or SafeSFTTrainer(..., reference_dataset=dataset)")
    if isinstance(source, dict):
        raise ConfigurationError(f"{setting} = {source!r}: only Axolotl takes an entry like its datasets; give a file or a Hub id")
    return with_rows(load_rows(source, setting) if isinstance(source, str) else source, "reference_dataset")


def _numbered(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The trainer's arguments with the training rows numbered before TRL filters and shuffles them."""
    if len(args) > TRAIN_DATASET:
        return (*args[:TRAIN_DATASET], with_rows(args[TRAIN_DATASET], "train_dataset"), *args[TRAIN_DATASET + 1 :]), kwargs
    return args, {**kwargs, "train_dataset": with_rows(kwargs.get("train_dataset"), "train_dataset")}
