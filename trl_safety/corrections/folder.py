"""Correct a saved adapter without loading a model."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path

import torch

from trl_safety.adapters.folder import AdapterFolder
from trl_safety.adapters.lora import target
from trl_safety.adapters.marks import update_config
from trl_safety.corrections.base import Correction, changed
from trl_safety.reports.report import (
    REPORT,
    MethodReport,
    SafetyReport,
    describe_subspace,
    describes,
    read_card,
    read_report,
    settled,
    with_section,
)
from trl_safety.subspace.artifact import AlignmentSubspace


def correct_folder(
    adapter: str | Path,
    output: str | Path,
    subspace: AlignmentSubspace | None,
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
        device: where to compute; a GPU by default if there is one.
        replace: remove what is at `output` once the new folder is complete.

    Raises:
        AdapterError: the adapter is of an unsupported kind, was corrected before or belongs to another model; or the output
            cannot be written.
        SubspaceError: an adapted layer is not in the subspace.
    """
    folder = AdapterFolder.open(adapter)
    setting = f"adapter = {str(adapter)!r}"
    correction.accept(folder.config, setting)
    bound = correction.bind(folder, subspace, list(skip_modules), setting)
    results = correction.run(bound.inputs(folder, torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))))
    new = {name: r.factors for name, r in results.items() if r.factors is not None}
    config = copy.deepcopy(folder.config)
    if added := [name for name in bound.further if name in new]:
        target(config, [*folder.factors, *added])
    scalings = {
        name: (new[name][1].shape[0] if name in new else factors.A.shape[0], factors.scaling) for name, factors in folder.factors.items()
    }
    scalings |= {name: (new[name][1].shape[0], bound.further[name].scaling) for name in added}
    reshaped = bool(added) or any(new[name][1].shape != folder.factors[name].A.shape for name in new)
    update_config(config, correction.name if changed(results) else None, scalings, scalings if reshaped else {})
    methods = correction.reports(
        [method for method in carried_methods(Path(adapter)) if method.acted or method.name == correction.name], results
    )
    report = SafetyReport(
        stage="final",
        protected=any(method.acted for method in methods),
        base_model=config.base_model_name_or_path,
        base_check=bound.base_check,
        subspace=describe_subspace(subspace),
        methods=methods,
        skipped=dict(bound.skipped),
        not_covered=sorted(folder.others),
    )
    text = read_card(folder.path / "README.md")

    def texts(written: Path) -> dict[str, str]:
        final = settled(report, written)
        return {REPORT: final.text(), "README.md": with_section(text, final)}

    folder.write(Path(output), new, config, setting="output", replace=replace, report=texts)
    return settled(report, Path(output))


def carried_methods(folder: Path) -> list[MethodReport]:
    """The methods that an adapter's own report names; none if the report does not describe the adapter as it is now."""
    earlier = read_report(folder) if (folder / REPORT).is_file() else None
    return earlier.methods if earlier and describes(earlier, folder) else []
