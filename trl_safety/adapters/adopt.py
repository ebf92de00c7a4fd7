"""Adopt a provider's adapter that was trained elsewhere: give it the record and the mark that our own adapters get."""

from __future__ import annotations

import copy
from pathlib import Path

from trl_safety.adapters.checkpoint import Checkpoint
from trl_safety.adapters.fingerprint import NOT_VERIFIED, sample
from trl_safety.adapters.folder import AdapterFolder, Factors
from trl_safety.adapters.marks import KINDS, kind_of, mark, marks
from trl_safety.adapters.names import match
from trl_safety.adapters.record import RECORD, AdapterRecord, local_folder, refuse_unusable
from trl_safety.errors import AdapterError, CheckpointError, ConfigurationError


def adopt(adapter: str | Path, output: str | Path, kind: str, model: str | Path | None = None) -> str:
    """Copy an adapter and give it the record and the mark of a buffer or a ReinforceLoRA, so that it can be used as one.

    Args:
        adapter: folder or Hub id of a LoRA adapter that was trained elsewhere. It is never changed.
        output: a new or empty folder.
        kind: "buffer" or "reinforce".
        model: folder or Hub id of the model that it was trained on. Later uses are checked against its weights; None: they are not.

    Returns:
        What is known about the model that it was trained on.

    Raises:
        ConfigurationError: there is no such kind.
        AdapterError: the adapter cannot be read, is already one of ours, holds more than LoRA factors, does nothing, or does not fit
            the model; or the output cannot be written.
        CheckpointError: the model's weights cannot be read.
    """
    if kind not in KINDS:
        raise ConfigurationError(f"as = {kind!r}: an adapter can be adopted as {' or '.join(KINDS)}")
    setting = f"adapter = {str(adapter)!r}"
    folder = AdapterFolder.open(local_folder(adapter, "adapter"))
    if (known := kind_of(folder.config)) != "user":
        raise AdapterError(f"{setting}: is already marked as a {known} adapter: use it as it is")
    if corrected := marks(folder.config):
        raise AdapterError(
            f"{setting}: was corrected by {', '.join(corrected)}, so it is a user's adapter: give the one that is to become a {kind} adapter"
        )
    refuse_unusable(folder, setting)
    base = folder.config.base_model_name_or_path
    if model is None:
        record = AdapterRecord(kind, base, quantised=False, samples={})
        checked = f"{NOT_VERIFIED}: no model was given to compare with; the adapter names {base or 'none'}"
    else:
        record = _record(folder, kind, str(model), setting)
        checked = f"later uses will be checked against {len(record.samples)} layers of {str(model)!r}"
        if base and Path(base).is_dir() and Path(base).resolve() != Path(model).resolve():
            checked += f"; {record.check_checkpoint(base, setting)}"
        elif base != str(model):
            checked += (
                f"; {NOT_VERIFIED}: whether it was trained on that model, since {base or 'the model that it names'} is not available here"
            )
    config = copy.deepcopy(folder.config)
    mark(config, kind, folder.factors)
    folder.write(Path(output), {}, config, setting="output", report=lambda _: {RECORD: record.text()})
    return checked


def _record(folder: AdapterFolder, kind: str, model: str, setting: str) -> AdapterRecord:
    """A record with samples of a model's weights, one for every layer that the adapter has."""
    checkpoint = Checkpoint(model, quantised=True)
    samples, rounded = {}, False
    for name, found in match(folder.factors, checkpoint.modules).items():
        if found is None:
            raise AdapterError(f"{setting}: its layer {name!r} is not in model = {model!r}: give the model that it was trained on")
        weight, quantised = checkpoint.weight(found)
        if weight is None:
            raise CheckpointError(
                f"model = {model!r}: is stored quantised in a format that cannot be read: name the full-precision checkpoint"
            )
        _check_shape(folder.factors[name], tuple(weight.shape), bool(folder.config.fan_in_fan_out), f"{setting}: its layer {name!r}", model)
        samples[name] = sample(weight).float()
        rounded |= quantised
    return AdapterRecord(kind, model, quantised=rounded, samples=samples)


def _check_shape(factors: Factors, stored: tuple[int, ...], transposed: bool, what: str, model: str) -> None:
    shape = factors.shape[::-1] if transposed else factors.shape
    if shape != stored:
        raise AdapterError(f"{what} is {list(shape)}, but {list(stored)} in model = {model!r}: give the model that it was trained on")
