"""`SafeSFTTrainer` and `SafeSFTConfig`, TRL's SFT with a `safety` block, and the trainers of a provider's adapters."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import SFTConfig, SFTTrainer, pack_dataset

from trl_safety.config.block import SafetyConfig
from trl_safety.errors import ConfigurationError
from trl_safety.subspace.artifact import AlignmentSubspace
from trl_safety.training.block_trainer import BlockTrainer, SafeArguments, served
from trl_safety.training.data import load_rows, splittable
from trl_safety.training.documents import ROW, number_documents, number_tokens, with_rows
from trl_safety.training.provider import ProviderMixin, refuse_push
from trl_safety.training.references import (
    References,
    check_format,
    pools,
    prompts_only,
    tokenised_answers,
    tokenised_prompts,
)


@dataclass
class SafeSFTConfig(SafeArguments, SFTConfig):
    """`trl.SFTConfig` plus one field, `safety`; see `SafeArguments`. With `safety=None` nothing differs from the parent."""

    _VALID_DICT_FIELDS = [*SFTConfig._VALID_DICT_FIELDS, "safety"]  # noqa: RUF012  # TrainingArguments' own protocol


class SafeSFTTrainer(BlockTrainer, SFTTrainer):
    """`trl.SFTTrainer` that preserves the model's safety.

    A drop-in replacement: it takes the same arguments, and without a safety block it computes the same, bit for bit. With one, the logged
    `loss` includes the methods' terms, a correction is applied when training ends, every log has `safety/…` metrics, and
    `safety_report.json` is saved beside every adapter.

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
        config, given = self.with_block(args, kwargs, safety)
        references = self._references(config, reference_dataset)
        if references:
            # Before TRL filters and shuffles the rows.
            given["train_dataset"] = with_rows(given.get("train_dataset"), "train_dataset")
        with served(given.get("args")):
            # BlockTrainer's constructor would take the block, which is handled here because of the references.
            super(BlockTrainer, self).__init__(**given)
        self.start_safety(config, subspace, self._prepared(config, references, given.get("formatting_func")))

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, packing: Any, *rest: Any, **options: Any) -> Any:
        """The parent's, except that row numbers, which the parent would drop, are packed with their tokens."""
        cut = args.max_length is None or args.packing_strategy == "wrapped"
        if not packing or cut or ROW not in dataset.column_names:
            return super()._prepare_dataset(dataset, processing_class, args, packing, *rest, **options)
        tokenised: Any = copy.copy(args)
        # Packing cuts long rows itself. With Liger's kernels the parent drops every column that it does not know.
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
