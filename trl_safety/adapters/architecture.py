"""How a checkpoint's tensors become a model's parameters: the model's class without weights, and Transformers' table of older names."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn

from trl_safety.adapters.names import strip_wrappers
from trl_safety.errors import CheckpointError, reason

UNREADABLE = (
    AttributeError,
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    ImportError,
    KeyError,
    OSError,
    RuntimeError,
    SafetensorError,
    StrictDataclassError,
    TypeError,
    ValueError,
)
"""What Transformers, PEFT and the Hub raise for files that are missing, damaged or not of the kind that they expect."""


def skeleton(source: str, revision: str | None, config: Mapping[str, Any], *, trust_remote_code: bool = False) -> nn.Module | None:
    """The model on the meta device, or None for a folder without a `config.json`.

    Args:
        source: folder or Hub id.
        revision: on the Hub.
        config: the content of its `config.json`.
        trust_remote_code: run model code that comes with the checkpoint.

    Raises:
        CheckpointError: Transformers does not know the class, or the configuration is damaged.
    """
    if not config:
        return None
    import transformers
    from transformers import AutoConfig

    try:
        parsed = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
        architecture = (parsed.architectures or [None])[0]
        remote = getattr(parsed, "auto_map", None) if trust_remote_code else None
        with torch.device("meta"):
            if not remote and architecture and hasattr(transformers, architecture):
                model: nn.Module = getattr(transformers, architecture)(parsed)
            else:
                model = transformers.AutoModelForCausalLM.from_config(parsed, trust_remote_code=trust_remote_code)
    except UNREADABLE as error:
        raise CheckpointError(
            f"the model class of {source!r} (model_type {config.get('model_type')!r}) cannot be built: {reason(error)}. If the model brings its own code and "
            "you trust it, set trust_remote_code"
        ) from error
    return model


@dataclass(frozen=True, eq=False)
class Conversion:
    """Parameters that Transformers computes from stored tensors when it loads: split, joined or permuted.

    Attributes:
        first: Transformers' name for the whole.
        stored: the pattern and the name of every stored tensor, in Transformers' order.
    """

    first: str
    stored: list[tuple[str, str]]
    converter: Any
    model: Any

    def compute(self, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """The parameters by name.

        Args:
            read: returns a stored tensor by its name.
        """
        work = copy.deepcopy(self.converter)
        for pattern, name in self.stored:
            work.add_tensor(self.first, name, pattern, read(name))
        found = work.convert(self.first, model=self.model, config=self.model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in found.items()}


def origins(model: Any, stored: Iterable[str]) -> dict[str, str | Conversion]:
    """Where every parameter of a model comes from, decided as Transformers decides it when it loads the checkpoint.

    Args:
        model: the skeleton.
        stored: the names in the checkpoint.

    Returns:
        parameter → the name that it is stored under, or how it is computed. Stored tensors that the model has no parameter for are
        included under their own names.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    parameters = model.state_dict()
    prefix = model.base_model_prefix
    found: dict[str, str | Conversion] = {}
    groups: dict[str, Conversion] = {}
    for original in sorted(stored, key=dot_natural_key):
        for name in dict.fromkeys((original, strip_wrappers(original))):
            renamed, pattern = rename_source_key(name, renamings, converters, prefix, parameters)
            if renamed not in parameters and name in parameters:
                renamed, pattern = rename_source_key(name, [], [], prefix, parameters)
            if renamed in parameters:
                break
        else:
            renamed, pattern = original, None
        if pattern is None:
            found.setdefault(renamed, original)
            continue
        converter = by_pattern[pattern]
        group = groups.setdefault(renamed, Conversion(renamed, [], converter, model))
        group.stored.append((pattern, original))
    for group in groups.values():
        for name in _targets(group, parameters):
            found.setdefault(name, group)
    return found


def _targets(group: Conversion, parameters: Mapping[str, Tensor]) -> list[str]:
    """The parameters that a conversion produces."""
    patterns = group.converter.target_patterns
    names = dict.fromkeys(group.first.replace(patterns[0], pattern) for pattern in patterns)
    return [
        known
        for name in names
        for known in ([name] if name in parameters else [k for k in parameters if re.fullmatch(re.escape(name).replace(r"\*", r"\d+"), k)])
    ]
