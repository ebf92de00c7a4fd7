"""Correct a live model's adapter."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from trl_safety.adapters.lora import DIVERGED, LoraModule, adapter_config, extend_adapter, lora_modules, no_numbers, not_finite, unwrap
from trl_safety.adapters.marks import update_config
from trl_safety.adapters.shards import put, settle, sharded, whole
from trl_safety.corrections.base import Correction, LayerInput, LayerResult, changed
from trl_safety.corrections.prepared import Prepared, prepare
from trl_safety.errors import ConfigurationError
from trl_safety.reports.report import MethodReport, SafetyReport
from trl_safety.reports.source import report_source
from trl_safety.subspace.artifact import AlignmentSubspace


@torch.no_grad()
def correct_model(
    model: nn.Module,
    subspace: AlignmentSubspace | None,
    correction: Correction,
    prepared: Prepared,
    others: Sequence[MethodReport] = (),
    skip_modules: Iterable[str] = (),
) -> SafetyReport:
    """Correct a model's adapter in place, mark it, and make every later save write the report, including those of other methods.

    An adapter that holds NaN or infinity is left unchanged. It can be saved, and is reported as not protected.
    """
    model = unwrap(model)
    settle(model)
    if (name := not_finite(prepared.modules)) is not None:
        methods = correction.not_done(others, f"did not act: {no_numbers(name)}: {DIVERGED}")
        report = prepared.report(subspace, methods, final=True).model_copy(update={"protected": False})
        report_source(model, prepared.adapter).freeze(model, report)
        return report
    # The user's own LoraConfig object is not changed, because another run may use it.
    config = copy.deepcopy(adapter_config(model, prepared.adapter))
    cast(Any, model).peft_config[prepared.adapter] = config
    further = correction.further_layers(model, prepared, subspace, list(skip_modules))
    if further:
        extend_adapter(model, prepared.adapter, further)
        prepared.modules = lora_modules(model, prepared.adapter)
        prepared.subspaces = {**prepared.subspaces, **{name: layer for name, layer in further.items() if layer is not None}}
    results = correction.run(
        [LayerInput(m.name, _trained(m, further), m.scaling, prepared.subspaces.get(m.name), m.B.device) for m in prepared.covered]
    )
    if sharded(model):
        # GPUs may round a cosine at the threshold, or a singular vector's sign, differently, so the first process decides.
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
    update_config(config, correction.name if changed(results) else None, scalings, scalings if reshaped else {})
    report = prepared.report(subspace, correction.reports(others, results), final=True)
    report_source(model, prepared.adapter).freeze(model, report)
    return report


def _trained(module: LoraModule, further: Collection[str]) -> tuple[Tensor, Tensor]:
    """A layer's trained factors; of rank 0 if the layer was not the adapter's."""
    B, A = whole(module.B).detach(), whole(module.A).detach()
    return (B[:, :0], A[:0]) if module.name in further else (B, A)


def apply_correction(
    model: nn.Module, subspace: AlignmentSubspace | None, correction: Correction, skip_modules: Iterable[str], adapter: str | None
) -> SafetyReport:
    """Check a model's adapter and correct it in place."""
    prepared = prepare_for(model, subspace, correction, skip_modules, adapter)
    return correct_model(model, subspace, correction, prepared, skip_modules=skip_modules)


def prepare_for(
    model: nn.Module,
    subspace: AlignmentSubspace | None,
    correction: Correction,
    skip_modules: Iterable[str] = (),
    adapter: str | None = None,
    *,
    trained: bool = False,
) -> Prepared:
    """Check a live model's adapter, and raise if a correction cannot act on it. For `trained` see `prepare`.

    Raises:
        AdapterError, SubspaceError, ConfigurationError: see `prepare` and the correction.
    """
    skip_modules = list(skip_modules)
    prepared = prepare(model, subspace, skip_modules, adapter, accept=correction.accept, trained=trained)
    correction.check_live(model, prepared, subspace, skip_modules)
    if sharded(model) and not correction.keeps_ranks({module.name: int(module.A.shape[0]) for module in prepared.covered}):
        remedy = f"cut it back to the adapter's own rank, or correct the saved adapter with `trl-safety correct --method {correction.name}`"
        raise ConfigurationError(f"{correction.name}: changes the adapter's rank, which FSDP's shards do not allow; {remedy}")
    return prepared
