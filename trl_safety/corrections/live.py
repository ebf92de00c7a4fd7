"""A correction on a live model's adapter."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn

from trl_safety.adapters.fingerprint import FULL_PRECISION_DIFFERENCE, QUANTISED_DIFFERENCE
from trl_safety.adapters.lora import (
    LoraModule,
    adapter_config,
    extend_adapter,
    full_precision,
    linear_layers,
    linear_shape,
    lora_modules,
    unwrap,
)
from trl_safety.adapters.marks import update_config
from trl_safety.adapters.names import is_named, match
from trl_safety.adapters.shards import put, settle, sharded, whole
from trl_safety.corrections.base import Correction, LayerInput, LayerResult, _acted
from trl_safety.corrections.prepared import Prepared, prepare
from trl_safety.errors import AdapterError, ConfigurationError, SubspaceError
from trl_safety.reports.report import MethodReport, SafetyReport
from trl_safety.reports.source import report_source
from trl_safety.subspace.artifact import AlignmentSubspace
from trl_safety.subspace.layer import LayerSubspace
from trl_safety.subspace.recognition import check_shape


@torch.no_grad()
def correct_model(
    model: nn.Module,
    subspace: AlignmentSubspace,
    correction: Correction,
    prepared: Prepared,
    others: Sequence[MethodReport] = (),
    skip_modules: Iterable[str] = (),
) -> SafetyReport:
    """Correct a model's adapter in place, mark it, and make every later save write the report, with that of other methods."""
    model = unwrap(model)
    settle(model)
    # The user's own LoraConfig object, which may serve another run, stays as it is.
    config = copy.deepcopy(adapter_config(model, prepared.adapter))
    cast(Any, model).peft_config[prepared.adapter] = config
    further = _further_layers(model, subspace, correction, prepared, skip_modules)
    if further:
        extend_adapter(model, prepared.adapter, further)
        prepared.modules = lora_modules(model, prepared.adapter)
        prepared.subspaces = {**prepared.subspaces, **further}
    results = correction.run(
        [LayerInput(m.name, _trained(m, further), m.scaling, prepared.subspaces[m.name], m.B.device) for m in prepared.covered]
    )
    if sharded(model):
        # GPUs may round a cosine at the threshold, or a singular vector's sign, one way and the other: the first process decides.
        acted = [[name for name, result in results.items() if result.factors is not None]]
        torch.distributed.broadcast_object_list(acted, src=0)
        results = {
            module.name: LayerResult(
                results[module.name].report,
                (results[module.name].factors or _trained(module, further)) if module.name in acted[0] else None,
            )
            for module in prepared.covered
        }
    reshaped = bool(further)
    for module in prepared.modules:
        factors = results[module.name].factors if module.name in results else None
        if factors is None:
            continue
        B, A = factors
        if A.shape == module.A.shape:
            put(module.B, B, source=0)
            put(module.A, A, source=0)
        else:
            module.replace(B, A)
            reshaped = True
    scalings = {module.name: (int(module.A.shape[0]), module.scaling) for module in prepared.modules}
    update_config(config, correction.name if _acted(results) else None, scalings if reshaped else {})
    report = prepared.report(subspace, [*others, correction.report(results)], final=True)
    report_source(model, prepared.adapter).freeze(model, report)
    return report


def _trained(module: LoraModule, further: Mapping[str, object]) -> tuple[Tensor, Tensor]:
    """What training made of a layer: factors of rank 0 where it was not the adapter's."""
    B, A = whole(module.B).detach(), whole(module.A).detach()
    return (B[:, :0], A[:0]) if module.name in further else (B, A)


def apply_correction(
    model: nn.Module, subspace: AlignmentSubspace, correction: Correction, skip_modules: Iterable[str], adapter: str | None
) -> SafetyReport:
    """Check a model's adapter and correct it in place; what `apply_safe_lora` and its like do after reading their options."""
    prepared = prepare(model, subspace, skip_modules, adapter)
    check_correction(model, subspace, correction, prepared, skip_modules)
    return correct_model(model, subspace, correction, prepared, skip_modules=skip_modules)


def check_correction(
    model: nn.Module, subspace: AlignmentSubspace, correction: Correction, prepared: Prepared, skip_modules: Iterable[str]
) -> None:
    """Raise where a correction will not be able to act on a live model; see `prepare`."""
    layers = {**prepared.subspaces, **_further_layers(model, subspace, correction, prepared, skip_modules)}
    correction.check(layers)
    ranks = {module.name: int(module.A.shape[0]) for module in prepared.covered}
    correction.check_ranks(ranks, layers)
    if sharded(model) and not correction.keeps_ranks(ranks):
        remedy = f"cut it back to the adapter's own rank, or correct the saved adapter with `trl-safety correct --method {correction.name}`"
        raise ConfigurationError(f"{correction.name}: changes the adapter's rank, which FSDP's shards do not allow; {remedy}")


def _further_layers(
    model: nn.Module, subspace: AlignmentSubspace, correction: Correction, prepared: Prepared, skip_modules: Iterable[str]
) -> dict[str, LayerSubspace]:
    """The layers besides the adapter's that a correction acts on, by the model's names, checked to be the aligned model's."""
    if not correction.all_layers:
        return {}
    config, skip_modules = adapter_config(model, prepared.adapter), list(skip_modules)
    if config.modules_to_save or config.lora_bias or not isinstance(unwrap(model), PeftModel):
        raise AdapterError(
            f"{correction.name}.all_layers = True: layers cannot be added to an adapter with modules_to_save = {config.modules_to_save!r} and lora_bias = "
            f"{config.lora_bias} on a {type(unwrap(model)).__name__}; adapt those layers (target_modules), or correct the saved adapter with `trl-safety correct`"
        )
    layers = linear_layers(model)
    adapted = {id(layer) for layer in prepared.subspaces.values()}
    further = {}
    wanted = {name: layer for name, layer in subspace.layers.items() if id(layer) not in adapted and not is_named(name, skip_modules)}
    for name, found in match(wanted, layers).items():
        if found is None:
            raise SubspaceError(
                f"the subspace's layer {name!r} is not in the model; list it in skip_modules, or build the subspace for this model"
            )
        layer = layers[found]
        if any(module.name == found for module in prepared.modules):
            continue
        check_shape(found, linear_shape(layer), wanted[name])
        weight = full_precision(layer)
        limit = FULL_PRECISION_DIFFERENCE if weight is layer.weight else QUANTISED_DIFFERENCE
        if weight is None or (apart := wanted[name].difference(weight)[0]) > limit:
            raise AdapterError(
                f"layer {found!r} of the model differs from the aligned model of the subspace"
                + (f" by {apart:.1%}" if weight is not None else ", as far as can be told: its format cannot be read")
            )
        further[found] = wanted[name]
    return further
