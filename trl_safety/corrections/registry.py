"""Options → the correction that they configure, and `correct`, which applies it to a model or a folder."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trl_safety.config.correction import CorrectionConfig
from trl_safety.config.options import validate
from trl_safety.corrections.base import Correction
from trl_safety.corrections.folder import correct_folder
from trl_safety.corrections.live import apply_correction
from trl_safety.errors import ConfigurationError
from trl_safety.reports.report import SafetyReport
from trl_safety.subspace.artifact import AlignmentSubspace


def correction_for(config: CorrectionConfig) -> Correction:
    """The correction that options configure.

    Raises:
        ConfigurationError: the options do not belong to a correction.
    """
    if not isinstance(config, CorrectionConfig):
        raise ConfigurationError(f"{type(config).__name__} is not a correction of a trained adapter")
    correction = config.load_hook()(config)
    if not isinstance(correction, Correction):
        raise ConfigurationError(f"{type(config).__name__}.hook = {config.hook!r}: is not a Correction; ask its author")
    return correction


def correct(
    adapter: nn.Module | str | Path,
    subspace: AlignmentSubspace | str | Path | None,
    config: CorrectionConfig,
    *,
    output: str | Path | None = None,
    skip_modules: Iterable[str] = (),
    adapter_name: str | None = None,
    device: str | torch.device | None = None,
) -> SafetyReport:
    """Correct a live model's adapter in place, or a saved adapter into a new folder.

    Args:
        adapter: a model with a trained LoRA adapter, whose next save also writes the report; or the folder of a saved adapter,
            which is never changed.
        subspace: an `AlignmentSubspace`, its file or a Hub id; None if the correction does not read one.
        config: the options of the correction: an instance of a `CorrectionConfig` subclass.
        output: for a saved adapter, the new folder; None for a model.
        skip_modules: modules to leave alone.
        adapter_name: for a model, the adapter's name; by default the active one.
        device: for a saved adapter, where to compute; a GPU by default if there is one.

    Returns:
        What was measured and done, layer by layer.

    Raises:
        AdapterError: there is no adapter, it is of an unsupported kind, belongs to another model, or was corrected before.
        SubspaceError: an adapted layer is not in the subspace, or the subspace is not of the kind that the correction needs.
        ConfigurationError: an argument is not used here, or is missing.
    """
    correction = correction_for(config)
    space = subspace if isinstance(subspace, AlignmentSubspace | None) else AlignmentSubspace.from_pretrained(subspace)
    if space is not None and not correction.reads_subspace:
        raise ConfigurationError(f"subspace is given, but {correction.name} uses none: remove it")
    if isinstance(adapter, nn.Module):
        for name, given in (("output", output), ("device", device)):
            if given is not None:
                raise ConfigurationError(
                    f"{name} = {str(given)!r}: is not used with a model, whose adapter is corrected in place: remove it"
                )
        return apply_correction(adapter, space, correction, skip_modules, adapter_name)
    if output is None:
        raise ConfigurationError("output is missing: a saved adapter is corrected into a new folder; name it")
    if adapter_name is not None:
        raise ConfigurationError(f"adapter_name = {adapter_name!r}: is not used with a folder: remove it")
    return correct_folder(adapter, output, space, correction, skip_modules=skip_modules, device=device)


def correct_by_name(
    model: nn.Module,
    subspace: AlignmentSubspace,
    options: type[CorrectionConfig],
    name: str,
    given: dict[str, Any],
    skip_modules: Iterable[str],
    adapter: str | None,
) -> SafetyReport:
    """The common part of the functions named after one correction: validate the keywords, and `correct`."""
    config = validate(options, {key: value for key, value in given.items() if value is not None}, name)
    return correct(model, subspace, config, skip_modules=skip_modules, adapter_name=adapter)
