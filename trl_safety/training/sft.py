"""`trl-safety sft`, `buffer`, `reinforce` and `vector`: the arguments and YAML of `trl sft`, plus what each needs."""

from __future__ import annotations

import dataclasses
import difflib
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from datasets import Dataset
from datasets.exceptions import DatasetsError
from jinja2 import TemplateError
from trl import (
    DatasetMixtureConfig,
    ModelConfig,
    ScriptArguments,
    SFTConfig,
    SFTTrainer,
    TrlParser,
    get_dataset,
    get_peft_config,
    get_quantization_config,
)

from trl_safety.adapters.architecture import UNREADABLE
from trl_safety.adapters.checkpoint import Checkpoint
from trl_safety.adapters.folder import refuse_diverged
from trl_safety.adapters.lora import unwrap
from trl_safety.adapters.record import open_kind
from trl_safety.config.options import read_yaml
from trl_safety.errors import ConfigurationError, SafetyError, reason
from trl_safety.messages import ShapeError, conversation, text_of
from trl_safety.scoring import KeywordJudge, Prompt
from trl_safety.subspace.artifact import HUB_FILE, AlignmentSubspace
from trl_safety.training.data import check_columns, check_filled, check_tokens, load_rows, load_splits
from trl_safety.training.start import refuse_empty
from trl_safety.training.trainer import BufferTrainer, ReinforceTrainer, SafeSFTConfig, SafeSFTTrainer

logger = logging.getLogger(__name__)


@dataclass
class ReinforceArguments:
    """What `trl-safety reinforce` takes besides `trl sft`'s arguments."""

    buffer: str = field(metadata={"help": "The BufferLoRA to train beside: a folder made by `trl-safety buffer`, or a Hub id."})


def run(arguments: Sequence[str]) -> None:
    """Parse `trl sft`'s arguments, train with `SafeSFTTrainer`, save the adapter.

    Differs from `trl sft` in two checks: an unknown key in the YAML is an error (there, a misspelt `safety` would be
    ignored), and so is a run without a safety block.

    Raises:
        ConfigurationError: a key is unknown, or the safety block is missing or invalid.
    """
    script, training, model, mixture = _parse(arguments, "sft", (ScriptArguments, SafeSFTConfig, ModelConfig, DatasetMixtureConfig))
    if training.safety is None:
        raise ConfigurationError("safety is missing: nothing would protect this run; add a `safety:` block to the YAML, or use `trl sft`")
    _train(SafeSFTTrainer, script, training, model, mixture)


def run_buffer(arguments: Sequence[str]) -> None:
    """Train and save a BufferLoRA with `trl sft`'s arguments. Raises as `run` does."""
    _train(BufferTrainer, *_parse(arguments, "buffer", (ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig)))


def run_reinforce(arguments: Sequence[str]) -> None:
    """Train and save a ReinforceLoRA with `trl sft`'s arguments and `buffer`. Raises as `run` does."""
    kinds = (ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig, ReinforceArguments)
    script, training, model, mixture, own = _parse(arguments, "reinforce", kinds)
    _train(ReinforceTrainer, script, training, model, mixture, buffer=own.buffer)


VECTOR_RECIPE: dict[str, Any] = {
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_target_modules": ["all-linear"],
    "learning_rate": 2e-4,
    "num_train_epochs": 3,
    "per_device_train_batch_size": 8,
}
"""What `trl-safety vector` trains with, unless the user says otherwise: an ordinary LoRA recipe, not tuned."""
VECTOR_ADAPTER = "adapter"
"""The folder inside the output in which `trl-safety vector` keeps the safety adapter."""


def run_vector(
    model: str, refusals: str, benign: str, output: Path, *, buffer: str | None = None, arguments: Sequence[str] = ()
) -> AlignmentSubspace | None:
    """Train a safety adapter on the user's own model, and write its update as V.

    Only answers are supervised. The adapter stays beside the subspace, so that V can be made again without training.

    Args:
        model: the model that is to be fine-tuned: local folder or Hub id, stored in full precision.
        refusals: rows with a harmful request and a refusal: what `load_rows` reads, with an answer in every row.
        benign: rows with a benign request and an answer.
        output: a folder, for the subspace, its card and the adapter.
        buffer: a BufferLoRA to train beside, as a ReinforceLoRA is trained.
        arguments: further arguments of `trl sft`.

    Returns:
        The subspace; None on every process but the first.

    Raises:
        ConfigurationError: the data cannot be used, or an argument is unknown or not used here.
        CheckpointError: the model cannot be read, or is stored quantised.
        AdapterError: the buffer is not one, or the trained adapter holds NaN, infinity or no update.
    """
    if (output / HUB_FILE).exists():
        raise ConfigurationError(f"output = {str(output)!r}: already holds a subspace, which is never overwritten; name a new folder")
    fixed = {"model_name_or_path": model, "output_dir": str(output / VECTOR_ADAPTER), "use_peft": True}
    kinds = (ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig)
    script, training, options, mixture = _parse(arguments, "vector", kinds, defaults={**VECTOR_RECIPE, **fixed})
    for name, value in fixed.items():
        if (found := getattr(training if name == "output_dir" else options, name)) != value:
            raise ConfigurationError(f"{name} = {found!r}: `trl-safety vector` sets it to {value!r}: remove it")
    if script.dataset_name or mixture.datasets:
        raise ConfigurationError(f"{_named(script, mixture)}: `trl-safety vector` trains on refusals and benign rows alone: remove it")
    if training.eval_strategy != "no":
        raise ConfigurationError(f"eval_strategy = {str(training.eval_strategy)!r}: there is no split to evaluate on; set it to no")
    Checkpoint(model, options.model_revision)
    if buffer is not None:
        open_kind(buffer, "buffer", "buffer")
    wanted, other = _pairs(refusals, "refusals"), _pairs(benign, "benign")
    _check_direction(wanted, other)
    pairs = [*wanted, *other]
    if len({(type(pair["prompt"]), type(pair["completion"])) for pair in pairs}) > 1:
        raise ConfigurationError(
            f"refusals = {refusals!r}, benign = {benign!r}: some rows hold text and others messages; give all of them in one form"
        )
    data = {script.dataset_train_split: Dataset.from_list(pairs).shuffle(seed=training.seed)}
    beside = {} if buffer is None else {"buffer": buffer}
    trainer = _train(SFTTrainer if buffer is None else ReinforceTrainer, script, training, options, mixture, datasets=data, **beside)
    if not trainer.is_world_process_zero():
        return None
    found = AlignmentSubspace.from_adapter(
        model, training.output_dir, revision=options.model_revision, trust_remote_code=training.trust_remote_code
    )
    found.save_pretrained(output)
    return found


def _check_direction(refusals: Sequence[Mapping[str, Any]], benign: Sequence[Mapping[str, Any]]) -> None:
    """Check by phrases of refusal that the two data sets are not swapped: V would then point away from refusing."""
    shares = []
    for pairs in (refusals, benign):
        answers = [
            answer if isinstance(answer, str) else text_of(answer[-1]["content"]) for answer in (pair["completion"] for pair in pairs)
        ]
        verdicts = KeywordJudge().verdicts([Prompt(answer) for answer in answers], answers)
        shares.append(verdicts.count("refused") / len(verdicts))
    said = f"{shares[0]:.0%} of the answers in refusals read like refusals, and {shares[1]:.0%} of those in benign"
    if shares[0] < shares[1]:
        raise ConfigurationError(f"{said}: the two are swapped, and V would point away from refusing; swap them")
    if shares[0] == shares[1]:
        logger.warning("%s: check that the first do refuse", said)


def _pairs(source: str, setting: str) -> list[dict[str, Any]]:
    """A data set's requests and answers, as TRL's prompts and completions."""
    pairs = []
    for number, row in enumerate(load_rows(source, setting), 1):
        try:
            prompt, answer = conversation(row)
        except ShapeError as error:
            raise ConfigurationError(f"{setting} = {source!r}, row {number}: {error}; give prompt and completion, or messages") from error
        if not answer:
            raise ConfigurationError(f"{setting} = {source!r}, row {number}: has no answer; give prompt and completion, or messages")
        parts = {"prompt": prompt, "completion": answer}
        pairs.append({key: part if isinstance(part, str) else list(part) for key, part in parts.items()})
    return pairs


def _parse(arguments: Sequence[str], command: str, kinds: tuple[Any, ...], defaults: Mapping[str, Any] | None = None) -> Any:
    parser = TrlParser(kinds, prog=f"trl-safety {command}")
    parser.set_defaults(**(defaults or {}))
    arguments = list(arguments)
    if "--config" in arguments[:-1]:
        # TRL's own reader silently keeps the last of two equal keys.
        read_yaml(Path(arguments[arguments.index("--config") + 1]), "--config")
    try:
        return parser.parse_args_and_config(arguments, fail_with_unknown_args=True)
    except ConfigurationError:
        raise
    except ValueError as error:
        raise ConfigurationError(_explain(str(error), parser)) from error


def _train(trainer_class: Any, script: Any, training: Any, model: Any, mixture: Any, *, datasets: Any = None, **kwargs: Any) -> Any:
    """Train and save an adapter, on the user's data unless `datasets` gives it by split. Returns the trainer."""
    if not model.use_peft:
        raise ConfigurationError("use_peft = False: the safety methods act on LoRA; set use_peft: true")
    evaluated = training.eval_strategy != "no"
    if datasets is None:
        datasets = _datasets(script, mixture, evaluated=evaluated)
        check_columns(datasets[script.dataset_train_split].column_names, _named(script, mixture), training.dataset_text_field)
        check_filled(datasets[script.dataset_train_split], _named(script, mixture), training.dataset_text_field)
    given = training.model_init_kwargs or {}
    training.model_init_kwargs = {
        "revision": model.model_revision,
        "trust_remote_code": training.trust_remote_code,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **given,
    }
    if isinstance(model.lora_target_modules, str) and model.lora_target_modules.isidentifier():
        # TRL makes a text of a list of one, which PEFT takes for a pattern of whole names.
        model.lora_target_modules = [model.lora_target_modules]
    try:
        trainer = trainer_class(
            model=model.model_name_or_path,
            args=training,
            train_dataset=datasets[script.dataset_train_split],
            eval_dataset=datasets[script.dataset_test_split] if evaluated else None,
            quantization_config=get_quantization_config(model),
            peft_config=get_peft_config(model),
            **kwargs,
        )
    except SafetyError:
        raise
    except (*UNREADABLE, TemplateError) as error:
        # Errors of TRL, PEFT and Transformers about the user's arguments and files, and of the chat template about the data.
        raise ConfigurationError(f"the run cannot start: {str(error) or reason(error)}") from error
    refuse_empty(trainer)
    embeddings: Any = cast(Any, unwrap(trainer.model)).get_input_embeddings()
    check_tokens(datasets[script.dataset_train_split], _named(script, mixture), len(embeddings.weight))
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model(training.output_dir)
    if trainer.is_world_process_zero():
        refuse_diverged(Path(training.output_dir))
    if training.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset_name)
    return trainer


def _explain(message: str, parser: Any) -> str:
    """TRL's message, with the unknown keys and the closest known ones."""
    if not message.startswith("Unknown arguments"):
        return f"the arguments were refused: {message}"
    known = [field.name for kind in parser.dataclass_types for field in dataclasses.fields(kind)]
    keys = re.findall(r"'--([^']+)'", message)
    guesses = [(key, difflib.get_close_matches(key, known, n=1)) for key in keys]
    return "--config: " + "; ".join(f"{key}: unknown key" + (f", did you mean {close[0]!r}?" if close else "") for key, close in guesses)


def _named(script: Any, mixture: Any) -> str:
    """The training data as the user named it."""
    return (
        f"datasets = {', '.join(str(one.path) for one in mixture.datasets)}"
        if mixture.datasets
        else f"dataset_name = {script.dataset_name!r}"
    )


def _datasets(script: Any, mixture: Any, *, evaluated: bool) -> Any:
    """The data set's splits, which include those that the run needs."""
    named = _named(script, mixture)
    if mixture.datasets:
        try:
            found = get_dataset(mixture)
        except (OSError, ValueError, DatasetsError) as error:
            raise ConfigurationError(f"{named}: cannot be loaded ({reason(error)}); check path, split and columns") from error
    elif script.dataset_name:
        found = load_splits(script.dataset_name, "dataset_name", name=script.dataset_config, streaming=script.dataset_streaming)
    else:
        raise ConfigurationError("dataset_name and datasets are both missing: name the training data")
    splits = ", ".join(found)
    if script.dataset_train_split not in found:
        raise ConfigurationError(f"dataset_train_split = {script.dataset_train_split!r}: {named} has the splits {splits}; name one of them")
    if evaluated and script.dataset_test_split not in found:
        raise ConfigurationError(
            f"dataset_test_split = {script.dataset_test_split!r}: {named} has the splits {splits}, and eval_strategy needs one to evaluate on; name one of "
            "them, or set eval_strategy to no"
        )
    return found
