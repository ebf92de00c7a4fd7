"""Check that a model or an adapter's base is the aligned model of a subspace."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from pathlib import Path

from trl_safety.adapters.checkpoint import Checkpoint
from trl_safety.adapters.fingerprint import FULL_PRECISION_DIFFERENCE, NOT_VERIFIED, Recognition
from trl_safety.adapters.folder import AdapterFolder
from trl_safety.adapters.lora import LoraModule, full_precision
from trl_safety.adapters.names import match
from trl_safety.adapters.shards import CHECKED_ELSEWHERE, is_sharded, placeholders
from trl_safety.errors import AdapterError
from trl_safety.subspace.artifact import AlignmentSubspace
from trl_safety.subspace.layer import LayerSubspace

BASE_LAYERS_SAMPLED = 8

QUANTISED_LAYERS_SAMPLED = 64
"""Rounding leaves little information in each layer, so more are compared."""


def verify_base(modules: Iterable[LoraModule], subspaces: Mapping[str, LayerSubspace]) -> str:
    """Check that the model under the adapter is the aligned model that the subspaces were fitted on.

    Compares 256 sampled entries per layer. In full precision each layer must equal the aligned one, up to a cast. A quantised
    layer (dequantised one at a time) must be within the quantisation error of it, and all of them together must be closer to the
    aligned model than to the base.

    Returns:
        What was verified, for the report.

    Raises:
        AdapterError: a weight has another shape or belongs to another model; the message names the layer.
    """
    modules = list(modules)
    if placeholders() and not any(is_sharded(module.A) for module in modules):
        return CHECKED_ELSEWHERE
    unread, layers, recognition = 0, 0, Recognition()
    for module in modules:
        subspace = subspaces.get(module.name)
        if subspace is None:
            continue
        layers += 1
        check_shape(module.name, module.shape, subspace)
        layer = module.layer.get_base_layer()
        if bool(getattr(module.layer, "fan_in_fan_out", False)) != subspace.transposed:
            raise AdapterError(
                f"layer {module.name!r} stores its weight {'in × out' if not subspace.transposed else 'out × in'}, but the subspace was fitted on the "
                "other orientation: build it from the checkpoint of this model class, with its config.json"
            )
        weight = full_precision(layer)
        if weight is None or weight.numel() != subspace.shape[0] * subspace.shape[1] or weight.is_meta:
            unread += 1
            continue
        if difference := recognition.add(weight, subspace.samples, quantised=weight is not layer.weight):
            to_base = subspace.difference(weight)[1]
            which = "the unaligned base of the pair" if to_base <= FULL_PRECISION_DIFFERENCE else "another model"
            raise AdapterError(_wrong_model(module.name, difference, which))
    if difference := recognition.unaligned:
        raise AdapterError(_wrong_model("all layers together", difference, "the unaligned base of the pair, quantised"))
    if unread == layers:
        return f"{NOT_VERIFIED}: no layer's weights could be read; shapes match"
    text = f"weights match the subspace's aligned model in {layers - unread} of {layers} layers"
    if unread:
        text += "; the others are stored in a format that could not be read"
    return text + recognition.qualifier


def _wrong_model(layer: str, difference: float, which: str) -> str:
    return (
        f"layer {layer!r} of the model differs from the aligned model of the subspace by {difference:.1%}: this is {which}. Train the aligned model, or "
        "build the subspace from the pair that this model belongs to (base first, then aligned)"
    )


def check_shape(name: str, shape: tuple[int, int], subspace: LayerSubspace) -> None:
    """Refuse an adapter layer whose shape differs from the subspace's.

    Raises:
        AdapterError: the shapes differ; the message names the layer and both shapes.
    """
    if shape != subspace.shape:
        raise AdapterError(
            f"layer {name!r} is {shape[0]} × {shape[1]} in the adapter and {subspace.shape[0]} × {subspace.shape[1]} in the alignment subspace: "
            "the subspace belongs to another model"
        )


def check_base(folder: AdapterFolder, subspace: AlignmentSubspace, layers: Mapping[str, LayerSubspace]) -> str:
    """Compare the adapter's base model with the subspace's, as far as that is possible without a network.

    Returns:
        What was verified, for the report.

    Raises:
        AdapterError: it is another model.
    """
    base = folder.config.base_model_name_or_path
    if base and Path(base).is_dir():
        checkpoint = Checkpoint(base, quantised=True)
        # At random: every n-th layer would be the same kind of layer again and again.
        compared = QUANTISED_LAYERS_SAMPLED if checkpoint.config.get("quantization_config") else BASE_LAYERS_SAMPLED
        names = random.Random(0).sample(list(layers), min(compared, len(layers)))  # noqa: S311  # no secret here
        stored = {name: found for name, found in match(names, checkpoint.modules).items() if found is not None}
        recognition = Recognition()
        for name, found in stored.items():
            weight, quantised = checkpoint.weight(found)
            if weight is None:
                return f"{NOT_VERIFIED}: {base} is stored quantised in a format that cannot be read; the subspace is of {subspace.provenance.aligned}; shapes match"
            if apart := recognition.add(weight, layers[name].samples, quantised=quantised):
                raise AdapterError(_wrong_base(base, subspace, f"layer {name!r}", apart))
        if apart := recognition.unaligned:
            raise AdapterError(_wrong_base(base, subspace, "all layers together", apart))
        if stored:
            return f"weights of {base} match the subspace's aligned model in all {len(stored)} layers that were compared{recognition.qualifier}"
    if base and base == subspace.provenance.aligned:
        return f"{base}, whose name is that of the subspace's aligned model"
    return f"{NOT_VERIFIED}: {base or 'no name in the adapter'} is not available here; the subspace is of {subspace.provenance.aligned}; shapes match"


def _wrong_base(base: str, subspace: AlignmentSubspace, where: str, difference: float) -> str:
    return (
        f"base_model_name_or_path = {base!r} of the adapter differs from the subspace's aligned model {subspace.provenance.aligned!r} in {where} by "
        f"{difference:.1%}: use the subspace of the model that the adapter was trained on"
    )
