"""A correction on a saved adapter, without any model."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path

import torch

from trl_safety.adapters.fingerprint import NOT_VERIFIED
from trl_safety.adapters.folder import AdapterFolder
from trl_safety.adapters.lora import target
from trl_safety.adapters.marks import refuse_corrected, update_config
from trl_safety.adapters.names import is_named
from trl_safety.corrections.base import Correction, LayerInput, _acted
from trl_safety.errors import AdapterError
from trl_safety.reports.report import (
    REPORT,
    MethodReport,
    SafetyReport,
    describe_subspace,
    describes,
    fingerprints,
    read_report,
    with_section,
)
from trl_safety.subspace.artifact import AlignmentSubspace
from trl_safety.subspace.recognition import check_base, check_shape


def correct_folder(
    adapter: str | Path,
    output: str | Path,
    subspace: AlignmentSubspace,
    correction: Correction,
    *,
    skip_modules: Iterable[str] = (),
    device: str | torch.device | None = None,
    replace: bool = False,
) -> SafetyReport:
    """Correct a saved adapter into a new folder without loading any model.

    Args:
        adapter: a folder that PEFT wrote. It is never changed.
        output: a new or empty folder.
        subspace: of the model that the adapter was trained on.
        correction: what to do.
        skip_modules: modules to leave alone.
        device: where to compute; a GPU when there is one.
        replace: remove what is at `output` once the new folder is complete.

    Raises:
        AdapterError: the adapter is of an unsupported kind, was corrected before, belongs to another model, or the output
            cannot be written.
        SubspaceError: an adapted layer is not in the subspace.
    """
    folder = AdapterFolder.open(adapter)
    refuse_corrected(folder.config, f"adapter = {str(adapter)!r}")
    skip_modules = list(skip_modules)
    subspaces = subspace.for_modules(folder.factors, skip_modules)
    for name, layer in subspaces.items():
        check_shape(name, folder.factors[name].shape, layer)
        if bool(folder.config.fan_in_fan_out) != layer.transposed:
            raise AdapterError(
                f"adapter = {str(adapter)!r}: fan_in_fan_out = {folder.config.fan_in_fan_out} does not fit the subspace's layer {name!r}: they belong "
                "to different model classes"
            )
    further = {}
    if correction.all_layers:
        if folder.config.lora_bias:
            raise AdapterError(
                f"adapter = {str(adapter)!r}: lora_bias = True: {correction.name}.all_layers cannot add layers to it; leave all_layers out"
            )
        used = {layer.name for layer in subspaces.values()}
        further = {name: layer for name, layer in subspace.layers.items() if layer.name not in used and not is_named(name, skip_modules)}
        if further and (other := [name for name, layer in subspaces.items() if name != layer.name]):
            raise AdapterError(
                f"adapter = {str(adapter)!r}: names its layer {other[0]!r} otherwise than the subspace ({subspaces[other[0]].name!r}), so that the names of further "
                "layers in its model are not known; build the subspace for this model, or leave all_layers out"
            )
    correction.check({**subspaces, **further})
    correction.check_ranks({name: folder.factors[name].A.shape[0] for name in subspaces}, {**subspaces, **further})
    base_check = check_base(folder, subspace, subspaces)
    loose = [name for name, layer in subspaces.items() if name != layer.name]
    if loose and base_check.startswith(NOT_VERIFIED):
        raise AdapterError(
            f"adapter = {str(adapter)!r}: its layer {loose[0]!r} is {subspaces[loose[0]].name!r} in the subspace, and its base model is not at hand to tell "
            "whether they are the same: put the base model where base_model_name_or_path says, or build the subspace for this model"
        )
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    inputs = []
    for name, layer in subspaces.items():
        factors = folder.factors[name]
        inputs.append(LayerInput(name, (factors.B, factors.A), factors.scaling, layer, where))
    stored = next(iter(folder.factors.values())).B.dtype
    for name, layer in further.items():
        empty = (torch.zeros(layer.shape[0], 0, dtype=stored), torch.zeros(0, layer.shape[1], dtype=stored))
        inputs.append(LayerInput(name, empty, 1.0, layer, where))
    results = correction.run(inputs)
    changed = {name: r.factors for name, r in results.items() if r.factors is not None}
    config = copy.deepcopy(folder.config)
    if added := [name for name in further if name in changed]:
        target(config, [*folder.factors, *added])
    scalings = {
        name: (changed[name][1].shape[0] if name in changed else factors.A.shape[0], factors.scaling)
        for name, factors in folder.factors.items()
    }
    scalings |= {name: (changed[name][1].shape[0], 1.0) for name in added}
    reshaped = bool(added) or any(changed[name][1].shape != folder.factors[name].A.shape for name in changed)
    update_config(config, correction.name if _acted(results) else None, scalings if reshaped else {})
    methods = [method for method in carried_methods(Path(adapter)) if method.acted] + [correction.report(results)]
    report = SafetyReport(
        stage="final",
        protected=any(method.acted for method in methods),
        base_model=config.base_model_name_or_path,
        base_check=base_check,
        subspace=describe_subspace(subspace),
        methods=methods,
        skipped={name: f"skip_modules: {is_named(name, skip_modules)}" for name in folder.factors if name not in subspaces},
        not_covered=sorted(folder.others),
    )
    card = folder.path / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    folder.write(
        Path(output),
        changed,
        config,
        setting="output",
        replace=replace,
        report=lambda written: {
            REPORT: report.model_copy(update=fingerprints(written)).text(),
            "README.md": with_section(text, report),
        },
    )
    return report


def carried_methods(folder: Path) -> list[MethodReport]:
    """The methods that an adapter's own report names; none where the report is not of this adapter as it is now."""
    earlier = read_report(folder) if (folder / REPORT).is_file() else None
    return earlier.methods if earlier and describes(earlier, folder) else []
