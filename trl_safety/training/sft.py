"""`trl-safety sft`, `buffer` and `reinforce`: the arguments and YAML of `trl sft`, plus what each needs."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from datasets.exceptions import DatasetsError
from jinja2 import TemplateError
from trl import (
    DatasetMixtureConfig,
    ModelConfig,
    ScriptArguments,
    SFTConfig,
    TrlParser,
    get_dataset,
    get_peft_config,
    get_quantization_config,
)

from trl_safety.adapters.architecture import UNREADABLE
from trl_safety.adapters.folder import refuse_diverged
from trl_safety.adapters.lora import unwrap
from trl_safety.config.options import read_yaml
from trl_safety.errors import ConfigurationError, SafetyError, reason
from trl_safety.training.data import check_columns, check_filled, check_tokens, load_splits
from trl_safety.training.start import refuse_empty
from trl_safety.training.trainer import BufferTrainer, ReinforceTrainer, SafeSFTConfig, SafeSFTTrainer


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


def _parse(arguments: Sequence[str], command: str, kinds: tuple[Any, ...]) -> Any:
    parser = TrlParser(kinds, prog=f"trl-safety {command}")
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


def _train(trainer_class: Any, script: Any, training: Any, model: Any, mixture: Any, **kwargs: Any) -> None:
    if not model.use_peft:
        raise ConfigurationError("use_peft = False: the safety methods act on LoRA; set use_peft: true")
    evaluated = training.eval_strategy != "no"
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
