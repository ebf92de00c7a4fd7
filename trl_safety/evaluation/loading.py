"""A model with its adapter, ready to be asked."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from trl_safety.adapters.checkpoint import Checkpoint
from trl_safety.adapters.fingerprint import sample
from trl_safety.adapters.folder import AdapterFolder
from trl_safety.adapters.lora import lora_modules
from trl_safety.adapters.marks import refuse_provider
from trl_safety.adapters.names import match
from trl_safety.adapters.record import LAYERS_COMPARED
from trl_safety.errors import AdapterError, ConfigurationError

logger = logging.getLogger(__name__)


def load_model(model: str | Path | None, adapter: str | Path | None, *, load_in_4bit: bool = False) -> tuple[Any, Any]:
    """A causal model, on a GPU in bfloat16 where there is one, with an adapter on it; and the tokenizer.

    The tokenizer and its chat template are the adapter's where its folder holds them.

    Args:
        model: folder or Hub id; None: the adapter's own base.
        adapter: folder of a user's adapter.
        load_in_4bit: load the model in NF4.

    Raises:
        ConfigurationError: neither says which model, or it cannot be loaded.
        AdapterError: the adapter cannot be read, is a provider's, or was trained on another model.
    """
    folder = AdapterFolder.open(adapter) if adapter is not None else None
    if folder is not None:
        refuse_provider(folder.config, f"adapter = {str(adapter)!r}")
    source = str(model) if model is not None else folder.config.base_model_name_or_path if folder else None
    if not source:
        raise ConfigurationError("model is missing: the adapter does not name its base; give the aligned model")
    gpu = torch.cuda.is_available()
    options: dict[str, Any] = {"dtype": torch.bfloat16} if gpu else {}
    if load_in_4bit:
        compute = torch.bfloat16 if gpu else torch.float32
        options["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)
    if gpu or load_in_4bit:
        options["device_map"] = {"": "cuda" if gpu else "cpu"}
    if folder is not None and model is not None:
        _same_model(folder, str(model))
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(source, **options)
    except OSError as error:
        raise ConfigurationError(
            f"model = {source!r}: cannot be loaded ({str(error).splitlines()[0]}); give a folder or a Hub id"
        ) from error
    tokenizer = AutoTokenizer.from_pretrained(str(adapter) if adapter and (Path(adapter) / "tokenizer_config.json").is_file() else source)
    if folder is not None:
        loaded = PeftModel.from_pretrained(loaded, str(folder.path))
        check_loaded(loaded, folder)
    return loaded.eval(), tokenizer


def _same_model(folder: AdapterFolder, model: str) -> None:
    """Compare the model with the one that the adapter names, where both are at hand."""
    base = folder.config.base_model_name_or_path
    if not base or base == model:
        return
    if not (Path(base).is_dir() and Path(model).is_dir()):
        logger.warning("the adapter names %r as its base, which is not at hand to tell whether %r is the same model", base, model)
        return
    one, other = Checkpoint(base), Checkpoint(model)
    names = random.Random(0).sample(list(folder.factors), min(LAYERS_COMPARED, len(folder.factors)))  # noqa: S311  # no secret here
    places = [match(names, checkpoint.modules) for checkpoint in (one, other)]
    for name in names:
        first, second = (place[name] for place in places)
        if first is None or second is None or not torch.equal(sample(one.read(first)).float(), sample(other.read(second)).float()):
            raise AdapterError(
                f"model = {model!r}: its layer {name!r} is not that of {base!r}, which the adapter was trained on: name that model"
            )


def check_loaded(model: Any, folder: AdapterFolder, adapter: str = "default") -> None:
    """See that every factor of a saved adapter is in the model: PEFT warns of those that find no place, and goes on with zeros.

    Raises:
        AdapterError: naming the first that is not.
    """
    modules = {module.name: module for module in lora_modules(model, adapter)}
    for name, found in match(folder.factors, modules).items():
        factors = folder.factors[name]
        live = modules[found] if found is not None else None
        if live is None or not all(
            torch.equal(saved.to(now), now) for saved, now in ((factors.B, live.B.detach()), (factors.A, live.A.detach()))
        ):
            raise AdapterError(
                f"adapter = {str(folder.path)!r}: its layer {name!r} is not in the loaded model as it was saved: it was trained on another class of model"
            )
