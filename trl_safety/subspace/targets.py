"""Which modules of a checkpoint an adapter would wrap, by PEFT's own rules and the model's own class.

The model is built on the meta device, so no weight is allocated.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from trl_safety.adapters.checkpoint import Checkpoint
from trl_safety.adapters.names import is_named, match
from trl_safety.errors import SubspaceError

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class Target:
    """One module to compute V for.

    Attributes:
        tensor_module: the module's name in the checkpoint, which is another module's name if weights are tied.
        transposed: whether the weight is stored in × out (GPT-2's Conv1D).
    """

    tensor_module: str
    transposed: bool


def resolve_targets(
    checkpoint: Checkpoint,
    target_modules: str | Iterable[str] | None,
    adapter: str | Path | None,
    *,
    trust_remote_code: bool = False,
) -> dict[str, Target]:
    """Module name → where its weight is.

    Args:
        checkpoint: the aligned model.
        target_modules: names or endings, a regular expression, or "all-linear", all as in PEFT's LoraConfig.
        adapter: the folder of a trained adapter whose modules to use instead.
        trust_remote_code: run model code that comes with the checkpoint.

    Raises:
        SubspaceError: both or neither is given, an entry matches no linear layer, or a module has no weight in the checkpoint.
        CheckpointError: the model class is not known to Transformers.
    """
    if (target_modules is None) == (adapter is None):
        raise SubspaceError(
            "give either target_modules (names, a regular expression or 'all-linear') or adapter (a trained adapter's folder)"
        )
    skeleton = checkpoint.skeleton(trust_remote_code=trust_remote_code)
    linear = _linear_modules(skeleton, checkpoint)
    if adapter is not None:
        from trl_safety.adapters.folder import AdapterFolder

        wanted = match(AdapterFolder.open(adapter).factors, linear)
        if missing := [name for name, found in wanted.items() if found is None]:
            raise SubspaceError(
                f"adapter = {str(adapter)!r} wraps layers that {checkpoint.source!r} does not have ({_few(missing)}): "
                "it was trained on another model"
            )
        names = [found for found in wanted.values() if found is not None]
    else:
        assert target_modules is not None  # noqa: S101  # narrowed by the first check
        names = _select(linear, target_modules, _head(skeleton), checkpoint)
    stored = match(names, checkpoint.modules)
    tied = _tied(skeleton, checkpoint)
    targets = {}
    for name in names:
        tensor_module = stored[name] or tied.get(name)
        if tensor_module is None:
            raise SubspaceError(
                f"layer {name!r} has no weight in {checkpoint.source!r}, which is not a complete checkpoint of its model class: fetch or save it again, or "
                + (
                    "name the other layers in target_modules instead of adapter"
                    if adapter is not None
                    else "leave the layer out of target_modules"
                )
            )
        targets[name] = Target(tensor_module, linear[name])
    return targets


def _linear_modules(skeleton: nn.Module | None, checkpoint: Checkpoint) -> dict[str, bool]:
    """Name → transposed, for every module that LoRA can wrap with ΔW = s·B·A on a two-dimensional weight."""
    if skeleton is None:
        return dict.fromkeys(checkpoint.modules, False)
    from transformers.pytorch_utils import Conv1D

    return {name: isinstance(module, Conv1D) for name, module in skeleton.named_modules() if isinstance(module, nn.Linear | Conv1D)}


def _select(linear: Mapping[str, bool], target_modules: str | Iterable[str], head: str | None, checkpoint: Checkpoint) -> list[str]:
    if isinstance(target_modules, str) and target_modules.lower() == ALL_LINEAR:
        if not checkpoint.config:
            raise SubspaceError(
                f"target_modules = 'all-linear': {checkpoint.source!r} has no config.json that says which weights are linear "
                "layers; add it or name the modules"
            )
        # PEFT leaves the output head out of "all-linear", too.
        return [name for name in linear if name != head]
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    entries = target_modules if isinstance(target_modules, str) else list(target_modules)
    config = LoraConfig(target_modules=entries)
    names = [name for name in linear if check_target_module_exists(config, name)]
    unmatched = [] if isinstance(entries, str) else [e for e in entries if not any(is_named(name, [e]) for name in names)]
    if unmatched or not names:
        raise SubspaceError(
            f"target_modules = {target_modules!r}: {', '.join(map(repr, unmatched)) or 'it'} matches no linear layer of "
            f"{checkpoint.source!r}; its layers end in {', '.join(sorted({name.rpartition('.')[2] for name in linear}))}"
        )
    return names


def _head(skeleton: nn.Module | None) -> str | None:
    output = _embedding(skeleton, "get_output_embeddings")
    return next((name for name, module in skeleton.named_modules() if module is output), None) if skeleton and output is not None else None


def _embedding(skeleton: nn.Module | None, getter: str) -> Any:
    method: Any = getattr(skeleton, getter, None)
    return method() if method else None


def _tied(skeleton: nn.Module | None, checkpoint: Checkpoint) -> dict[str, str]:
    """Output head → input embedding's stored name, if the model ties their weights."""
    head = _head(skeleton)
    text = checkpoint.config.get("text_config")
    ties = checkpoint.config.get("tie_word_embeddings", (text or {}).get("tie_word_embeddings", False) if isinstance(text, dict) else False)
    if skeleton is None or head is None or not ties:
        return {}
    embedding = _embedding(skeleton, "get_input_embeddings")
    name = next(name for name, module in skeleton.named_modules() if module is embedding)
    stored = match([name], checkpoint.modules)[name]
    return {head: stored} if stored else {}


def _few(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
