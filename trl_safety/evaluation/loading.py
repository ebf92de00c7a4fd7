"""A model with its adapter, ready to be asked."""

from __future__ import annotations

import json
import logging
import random
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    BitsAndBytesConfig,
)

from trl_safety.adapters.architecture import UNREADABLE
from trl_safety.adapters.checkpoint import Checkpoint, why_no_bitsandbytes
from trl_safety.adapters.fingerprint import QUANTISED_DIFFERENCE, sample
from trl_safety.adapters.folder import PEFT_PREFIX, AdapterFolder, token_lists
from trl_safety.adapters.lora import lora_modules
from trl_safety.adapters.marks import refuse_provider
from trl_safety.adapters.names import match
from trl_safety.adapters.record import LAYERS_COMPARED
from trl_safety.errors import AdapterError, ConfigurationError, reason

logger = logging.getLogger(__name__)

COMMIT = "trl_safety_commit"
"""Attribute of a model that was loaded from the Hub: the commit of its weights."""


def load_model(
    model: str | Path | None, adapter: str | Path | None, *, load_in_4bit: bool = False, revision: str | None = None
) -> tuple[Any, Any]:
    """A language model, on a GPU in bfloat16 where there is one, with an adapter on it; and the tokenizer.

    The tokenizer and its chat template are the adapter's where its folder holds them. Embeddings are resized where the adapter
    brought tokens. Of a vision-language model the text part is asked.

    Args:
        model: folder or Hub id; None: the adapter's own base.
        adapter: folder of a user's adapter.
        load_in_4bit: load the model in NF4.
        revision: branch, tag or commit of the model on the Hub; None: the one that the adapter names, where the model is its base.

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
    revision = _revision(source, revision, folder)
    gpu = torch.cuda.is_available()
    options: dict[str, Any] = {"dtype": torch.bfloat16} if gpu else {}
    if load_in_4bit:
        options["quantization_config"] = _nf4(torch.bfloat16 if gpu else torch.float32)
    if gpu or load_in_4bit:
        options["device_map"] = {"": "cuda" if gpu else "cpu"}
    if folder is not None and model is not None:
        _same_model(folder, source)
    _check_generation(source, revision)
    loaded = _model(source, revision, folder, options)
    setattr(loaded, COMMIT, _commit(source, revision))
    own = folder is not None and (folder.path / "tokenizer_config.json").is_file()
    tokenizer = _tokenizer(str(adapter), None) if own else _tokenizer(source, revision)
    if folder is not None:
        _fit_vocabulary(loaded, folder, len(tokenizer) if own else 0)
        loaded = attach(loaded, folder)
    return loaded.eval(), tokenizer


def _nf4(compute: torch.dtype) -> Any:
    # Transformers looks for the library when it loads, PEFT when it wraps: too late for a message of ours.
    if (why := why_no_bitsandbytes()) is not None:
        raise ConfigurationError(
            f"load_in_4bit = True: bitsandbytes cannot be used ({why}); pip install 'trl-safety[qlora]', or leave it out"
        )
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)


def attach(model: Any, folder: AdapterFolder, name: str = "default") -> Any:
    """Put a saved adapter on a model, with or without others on it, and see that all of it is there.

    Args:
        model: a Transformers model or a `PeftModel`; its embeddings are as large as the adapter's.
        folder: the adapter.
        name: what to call it in the model.

    Returns:
        The `PeftModel`.

    Raises:
        AdapterError: it does not fit the model.
    """
    try:
        if isinstance(model, PeftModel):
            model.load_adapter(str(folder.path), name)
        else:
            model = PeftModel.from_pretrained(model, str(folder.path), adapter_name=name)
    except (RuntimeError, ValueError, KeyError, IndexError, TypeError, ImportError) as error:
        raise AdapterError(
            f"adapter = {str(folder.path)!r}: PEFT cannot put it on the model ({reason(error)}): name the model that it was trained on"
        ) from error
    check_loaded(model, folder, name)
    return model


def check_loaded(model: Any, folder: AdapterFolder, adapter: str = "default") -> None:
    """Check that the model takes every tensor of a saved adapter. PEFT only warns about the others, and leaves zeros in their place.

    Raises:
        AdapterError: the model lacks one; the message names the first.
    """
    modules = {module.name: module for module in lora_modules(model, adapter)}
    for name, found in match(folder.factors, modules).items():
        factors = folder.factors[name]
        live = modules[found] if found is not None else None
        if live is None or not all(_equal(saved, now) for saved, now in ((factors.B, live.B.detach()), (factors.A, live.A.detach()))):
            raise AdapterError(
                f"adapter = {str(folder.path)!r}: its layer {name!r} is not in the loaded model as it was saved: it was trained on another class of model"
            )
    if not folder.others:
        return
    state = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=True)
    for name, tensor in folder.others.items():
        if name not in state or not _equal(tensor, state[name].detach()):
            raise AdapterError(
                f"adapter = {str(folder.path)!r}: its tensor {name!r} is not in the loaded model as it was saved: it was trained on another class of model"
            )


def _equal(saved: Tensor, now: Tensor) -> bool:
    return saved.shape == now.shape and torch.equal(saved.to(now), now)


def _revision(source: str, asked: str | None, folder: AdapterFolder | None) -> str | None:
    """The revision to load: the one that was asked for, or the one that the adapter names of its base, where there is such a one."""
    local = Path(source).is_dir()
    if asked is not None:
        if local:
            raise ConfigurationError(f"revision = {asked!r}: model = {source!r} is a folder, which has no revisions; leave it out")
        if _commit(source, asked) is None:
            raise ConfigurationError(
                f"revision = {asked!r}: {source!r} has none of this name that can be reached; check it, or leave it out"
            )
        return asked
    named = folder.config.revision if folder is not None and folder.config.base_model_name_or_path == source else None
    if not named or (local and named == "main"):
        return None
    if not local and isinstance(named, str) and _commit(source, named) is not None:
        return named
    why = "is a folder, which has no revisions" if local else "has none of this name that can be reached"
    logger.warning(
        "revision = %r in the adapter's %s is not used: its base %r %s. What is loaded may be other weights than it was trained on",
        named,
        "adapter_config.json",
        source,
        why,
    )
    return None


def _commit(source: str, revision: str | None) -> str | None:
    """The commit of a Hub model's revision, in the cache or on the Hub; None for a folder, and where there is none of this name."""
    if Path(source).is_dir():
        return None
    try:
        # The cache keeps every commit's files in a folder named after it.
        return Path(hf_hub_download(source, "config.json", revision=revision)).parent.name
    except (HFValidationError, HfHubHTTPError, OSError, ValueError):
        return None


def _check_generation(source: str, revision: str | None) -> None:
    """Refuse a generation config that is damaged: Transformers goes on without it, and answers run on past the end of their turn."""
    file = Path(source) / "generation_config.json"
    if not Path(source).is_dir():
        try:
            file = Path(hf_hub_download(source, file.name, revision=revision))
        except (HFValidationError, HfHubHTTPError, OSError, ValueError):
            return
    if not file.is_file():
        return
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"model = {source!r}: its {file.name} cannot be read ({reason(error)}); fetch or save it again") from error
    if not isinstance(content, dict):
        raise ConfigurationError(f"model = {source!r}: its {file.name} holds no object; fetch or save it again")


def _config(source: str, revision: str | None) -> Any:
    try:
        return AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
    except UNREADABLE as error:
        raise _cannot_load(source, error) from error


def _cannot_load(source: str, error: Exception) -> ConfigurationError:
    remedy = "fetch or save it again" if Path(source).is_dir() and any(Path(source).iterdir()) else "give a folder or a Hub id"
    if "trust_remote_code" in str(error):
        remedy = "it brings code of its own, which is not run here; name a model of a class that Transformers has"
    elif isinstance(error, ImportError):
        remedy = "install what it needs, or name the full-precision model that it was made from"
    return ConfigurationError(f"model = {source!r}: cannot be loaded ({reason(error)}); {remedy}")


def _model(source: str, revision: str | None, folder: AdapterFolder | None, options: dict[str, Any]) -> Any:
    config = _config(source, revision)
    classes = _classes(config)
    if not classes:
        raise ConfigurationError(
            f"model = {source!r}: is of type {config.model_type!r}, which answers no prompts: name a causal language model, or a vision-language model"
        )
    chosen = classes[0]
    try:
        if folder is not None and len(classes) > 1:
            chosen = next((cls for cls in classes if _has_layers(cls, config, folder)), chosen)
        model, found = chosen.from_pretrained(source, revision=revision, output_loading_info=True, trust_remote_code=False, **options)
    except UNREADABLE as error:
        raise _cannot_load(source, error) from error
    # Transformers makes up what it does not find, and only warns.
    if missing := sorted(found["missing_keys"]) or sorted(str(key) for key in found["mismatched_keys"]):
        raise ConfigurationError(
            f"model = {source!r}: cannot be loaded ({missing[0]!r} and {len(missing) - 1} more weights of {type(model).__name__} are not in it); fetch or save "
            "the checkpoint again"
        )
    for name, module in model.named_modules():
        # What its configuration calls quantised, and is not.
        if type(module).__name__ == "Linear4bit" and getattr(module.weight, "quant_state", None) is None:
            raise ConfigurationError(
                f"model = {source!r}: cannot be loaded (its configuration says that it is stored in 4 bits, and {name!r} is not); take quantization_config out of "
                "config.json, or fetch or save it again"
            )
    return model


def _classes(config: Any) -> list[Any]:
    """The classes that complete text from a checkpoint, Transformers' own choice first."""
    kinds = (MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM), (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoModelForImageTextToText)
    return [auto for mapping, auto in kinds if type(config) in mapping]


def _has_layers(cls: Any, config: Any, folder: AdapterFolder) -> bool:
    """Whether a model class has every layer of an adapter under the very name that the adapter gives it, as PEFT needs it."""
    with torch.device("meta"):
        model = cls.from_config(config)
    return set(folder.factors) <= {name for name, _ in model.named_modules()}


def _tokenizer(source: str, revision: str | None) -> Any:
    try:
        return AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
    except UNREADABLE as error:
        raise ConfigurationError(
            f"model = {source!r}: its tokenizer cannot be loaded ({reason(error)}); save the tokenizer there again"
        ) from error


def _fit_vocabulary(model: Any, folder: AdapterFolder, tokens: int) -> None:
    """Give the model as many embeddings as the adapter was trained with, by PEFT's rule for its auto classes.

    Args:
        model: as it was loaded.
        folder: the adapter.
        tokens: of the tokenizer in the adapter's folder; 0 where there is none.
    """
    ends = [layer for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer is not None]
    names = [name for name, module in model.named_modules() if any(module is layer for layer in ends)]
    # An embedding that is adapted by LoRA itself is saved from within PEFT's wrapper.
    keys = [f"{PEFT_PREFIX}{name}{inner}.weight" for name in names for inner in ("", ".base_layer")]
    saved = [len(folder.others[key]) for key in keys if key in folder.others]
    rows = len(ends[0].weight)
    trained = {int(index) for some in token_lists(folder.config) for index in some}
    wanted = max(saved) if saved else max(rows, tokens, max(trained, default=-1) + 1)
    if wanted == rows:
        return
    made_up = set(range(rows, wanted)) - trained
    if made_up and not saved:
        logger.warning(
            "adapter = %r: brings %d tokens that the model does not have, and no embeddings for %d of them, which are made up when it is loaded",
            str(folder.path),
            wanted - rows,
            len(made_up),
        )
    try:
        model.resize_token_embeddings(wanted, mean_resizing=not saved)
    except (RuntimeError, ValueError) as error:
        raise AdapterError(
            f"adapter = {str(folder.path)!r}: was trained with {wanted} embeddings, and those of the model cannot be resized ({reason(error)}): save the "
            "model with its embeddings resized, and name that model"
        ) from error


def _same_model(folder: AdapterFolder, model: str) -> None:
    """Compare the model with the one that the adapter names, where both are at hand."""
    base = folder.config.base_model_name_or_path
    if not base or base == model:
        return
    if not (Path(base).is_dir() and Path(model).is_dir()):
        logger.warning("the adapter names %r as its base, which is not at hand to tell whether %r is the same model", base, model)
        return
    checkpoints = [Checkpoint(source, quantised=True) for source in (base, model)]
    names = random.Random(0).sample(list(folder.factors), min(LAYERS_COMPARED, len(folder.factors)))  # noqa: S311  # no secret here
    places = [match(names, checkpoint.modules) for checkpoint in checkpoints]
    unread = mixed = False
    for name in names:
        one, other = (place[name] for place in places)
        if one is not None and other is not None:
            (first, rounded), (second, also) = checkpoints[0].weight(one), checkpoints[1].weight(other)
            if first is None or second is None:
                unread = True
                continue
            mixed |= rounded != also
            if _alike(first, second, rounded=rounded or also):
                continue
        raise AdapterError(
            f"model = {model!r}: its layer {name!r} is not that of {base!r}, which the adapter was trained on: name that model"
        )
    if unread:
        logger.warning("%r or %r is stored in a format that cannot be read: whether they are the same model is not known", base, model)
    elif mixed:
        logger.warning(
            "the adapter was trained on %r, and one of it and %r is quantised: they are the same model as far as that shows, but what is measured can differ "
            "from what was trained",
            base,
            model,
        )


def _alike(one: Tensor, other: Tensor, *, rounded: bool) -> bool:
    """Whether two weights are one layer's: equal, or as near as quantisation leaves them."""
    if one.numel() != other.numel():
        return False
    first, second = sample(one).float(), sample(other).float()
    if not rounded:
        return torch.equal(first, second)
    return float(torch.linalg.vector_norm(first - second)) <= QUANTISED_DIFFERENCE * float(torch.linalg.vector_norm(second))
