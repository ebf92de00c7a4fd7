"""Fit alignment subspaces from a safety adapter, whose update is V."""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from trl_safety.adapters.checkpoint import Checkpoint, digest
from trl_safety.adapters.fingerprint import NOT_VERIFIED, positions, sample
from trl_safety.adapters.folder import AdapterFolder, Factors
from trl_safety.adapters.marks import KINDS, kind_of, marks
from trl_safety.adapters.names import match
from trl_safety.adapters.record import LAYERS_COMPARED, RECORD, AdapterRecord, local_folder, refuse_unusable
from trl_safety.errors import AdapterError
from trl_safety.linalg.low_rank import product_svd
from trl_safety.linalg.thin_svd import directions_to_keep
from trl_safety.subspace.fit import describe_cut
from trl_safety.subspace.layer import LayerSubspace, Provenance
from trl_safety.subspace.targets import resolve_targets

logger = logging.getLogger(__name__)


def fit_adapter(
    model: str | Path, adapter: str | Path, *, rank: int | None, tolerance: float | None, revision: str | None, trust_remote_code: bool
) -> tuple[dict[str, LayerSubspace], Provenance]:
    """The subspaces of a safety adapter's layers, by the model's names, and their provenance; see `AlignmentSubspace.from_adapter`."""
    cut = "the adapter's own rank" if rank is None and tolerance is None else describe_cut(rank, tolerance, False)
    setting = f"adapter = {str(adapter)!r}"
    folder = open_safety_adapter(adapter, setting)
    checkpoint = Checkpoint(model, revision)
    targets = resolve_targets(checkpoint, None, folder.path, trust_remote_code=trust_remote_code)
    factors = {target: folder.factors[name] for name, target in match(folder.factors, targets).items() if target is not None}
    layers, unchanged = {}, []
    for name, target in targets.items():
        if factors[name].is_zero:
            unchanged.append(name)
            continue
        weight = checkpoint.read(target.tensor_module)
        stored = factors[name].shape[::-1] if target.transposed else factors[name].shape
        if stored != tuple(weight.shape):
            raise AdapterError(
                f"{setting}: its layer {name!r} is {list(stored)}, but {list(weight.shape)} in {str(model)!r}: name the model that it was trained on"
            )
        layers[name] = _fit(name, weight, factors[name], transposed=target.transposed, rank=rank, tolerance=tolerance)
    _check_model(folder, str(model), {name: layer.samples[1] for name, layer in layers.items()}, setting)
    if unchanged:
        logger.warning("%s: %s layers have no update and are left out of the subspace: %s", setting, len(unchanged), ", ".join(unchanged))
    return layers, Provenance(None, str(model), None, checkpoint.revision, cut, adapter=str(adapter))


def open_safety_adapter(adapter: str | Path, setting: str) -> AdapterFolder:
    """Open an adapter whose update is to be V.

    Raises:
        AdapterError: it cannot be read, is zero or not finite, holds more than LoRA factors, is a BufferLoRA, or was corrected.
    """
    folder = AdapterFolder.open(local_folder(adapter, "adapter"))
    if (kind := kind_of(folder.config)) == "buffer":
        raise AdapterError(f"{setting}: is {KINDS[kind]}. V must point towards refusing: give an adapter that was trained to refuse")
    if corrected := marks(folder.config):
        raise AdapterError(
            f"{setting}: was corrected by {', '.join(corrected)}, so it was fine-tuned on a task: its update is no direction towards refusing; give an "
            "adapter that was trained to refuse"
        )
    refuse_unusable(folder, setting)
    return folder


def _fit(name: str, weight: Tensor, factors: Factors, *, transposed: bool, rank: int | None, tolerance: float | None) -> LayerSubspace:
    B, A = factors.scaling * factors.B.double(), factors.A.double()
    U, S, Z = product_svd(B, A)
    kept = directions_to_keep(S, max(factors.shape), rank=rank, tolerance=tolerance)
    norm = float(torch.linalg.vector_norm(S))
    first, second = positions(weight.numel()) // weight.shape[1], positions(weight.numel()) % weight.shape[1]
    rows, columns = (second, first) if transposed else (first, second)
    aligned = sample(weight).double()
    return LayerSubspace(
        name=name,
        shape=factors.shape,
        transposed=transposed,
        frobenius_norm=norm,
        error_bound=float(S[kept]) ** 2 / norm if kept < len(S) else 0.0,
        base_digest=digest(torch.cat([B.flatten(), A.flatten()])),
        aligned_digest=digest(weight),
        # The base that this V would have come from is W − V.
        samples=torch.stack([aligned - (B[rows] * A[:, columns].mT).sum(1), aligned]).float(),
        left=U[:, :kept].float().contiguous(),
        singular_values=S[:kept].float(),
        right=Z[:, :kept].float().contiguous(),
    )


def _check_model(folder: AdapterFolder, model: str, samples: Mapping[str, Tensor], setting: str) -> None:
    """Check that the adapter was trained on the model, as far as that is possible without a network."""
    base = folder.config.base_model_name_or_path
    if (folder.path / RECORD).is_file():
        checked = AdapterRecord.read(folder.path).check_checkpoint(model, setting)
    elif base and base != model and Path(base).is_dir():
        record = AdapterRecord("user", model, quantised=False, samples=dict(samples))
        checked = _record_of(base, list(samples)).check_record(record, setting, model)
    else:
        checked = model if base == model else f"{NOT_VERIFIED}: {base or 'no name in the adapter'} is not available here"
    if checked.startswith(NOT_VERIFIED):
        logger.warning("%s: whether it was trained on %r is %s", setting, model, checked)


def _record_of(base: str, names: Sequence[str]) -> AdapterRecord:
    """The record of an adapter that was trained on this model, with samples of a few layers."""
    checkpoint = Checkpoint(base, quantised=True)
    # At random: every n-th layer would be the same kind of layer again and again.
    some = random.Random(0).sample(list(names), min(LAYERS_COMPARED, len(names)))  # noqa: S311  # no secret here
    read = {name: checkpoint.weight(found) for name, found in match(some, checkpoint.modules).items() if found is not None}
    samples = {name: sample(weight).float() for name, (weight, _) in read.items() if weight is not None}
    return AdapterRecord("user", base, quantised=any(rounded for _, rounded in read.values()), samples=samples)
