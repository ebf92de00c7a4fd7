"""Fit the alignment subspaces of a pair of checkpoints, layer by layer."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trl_safety.adapters.checkpoint import Checkpoint, digest
from trl_safety.adapters.fingerprint import same_up_to_rounding, sample
from trl_safety.adapters.names import match
from trl_safety.errors import SubspaceError
from trl_safety.linalg.thin_svd import thin_svd
from trl_safety.subspace.layer import SCHEMA_VERSION, LayerSubspace, Provenance
from trl_safety.subspace.targets import resolve_targets
from trl_safety.version import __version__

ROWS_AT_A_TIME = 1024


class PairFit:
    """A layer-by-layer fit of a pair; arguments and errors as in `AlignmentSubspace.from_pair`.

    Attributes:
        targets: module name → where its weight is in the aligned checkpoint.
        provenance: the subspace's provenance.
    """

    def __init__(
        self,
        base: str | Path,
        aligned: str | Path,
        *,
        target_modules: str | Iterable[str] | None = None,
        adapter: str | Path | None = None,
        rank: int | None = None,
        tolerance: float | None = None,
        whole: bool = False,
        base_revision: str | None = None,
        aligned_revision: str | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        cut = describe_cut(rank, tolerance, whole)
        self._base, self._aligned = Checkpoint(base, base_revision), Checkpoint(aligned, aligned_revision)
        self.targets = resolve_targets(self._aligned, target_modules, adapter, trust_remote_code=trust_remote_code)
        paired = match([target.tensor_module for target in self.targets.values()], self._base.modules)
        if missing := [name for name, found in paired.items() if found is None]:
            raise SubspaceError(
                f"layer {missing[0]!r} is in the aligned checkpoint {str(aligned)!r} but not in the base {str(base)!r}: the two are not "
                "a pair with the same architecture"
            )
        self._partners = {name: str(found) for name, found in paired.items()}
        self._cut: dict[str, Any] = {"rank": rank, "tolerance": tolerance, "whole": whole}
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._dtype = dtype
        self.provenance = Provenance(str(base), str(aligned), self._base.revision, self._aligned.revision, cut)

    @property
    def plan(self) -> str:
        """A fingerprint of the request and of the files that it reads: their names, sizes and modification times."""
        files = []
        for checkpoint in (self._base, self._aligned):
            for file in sorted({checkpoint.file_of(name) for name in checkpoint.names}):
                found = checkpoint.path_of(file).stat()
                files.append([file, found.st_size, found.st_mtime_ns])
        source = self.provenance
        revisions = [source.base, source.aligned, source.base_revision, source.aligned_revision]
        asked = [revisions, source.cut, str(self._dtype), [[name, *asdict(target).values()] for name, target in self.targets.items()]]
        return hashlib.sha256(json.dumps([asked, files, SCHEMA_VERSION, __version__]).encode()).hexdigest()[:32]

    def layers(self, *, skip: Collection[str] = (), progress: bool = True) -> Iterator[LayerSubspace]:
        """Fit every layer except those in `skip`, in the checkpoint's order. The next pair is read while one is decomposed."""
        from tqdm.auto import tqdm

        names = [name for name in self.targets if name not in skip]
        bar = tqdm(
            total=len(self.targets),
            initial=len(self.targets) - len(names),
            desc="Alignment subspace",
            unit="layer",
            disable=None if progress else True,
        )
        with bar, ThreadPoolExecutor(1) as reader:
            ahead = deque(reader.submit(self._read, name) for name in names[:1])
            for position in range(len(names)):
                pair = ahead.popleft().result()
                ahead.extend(reader.submit(self._read, name) for name in names[position + 1 : position + 2])
                layer = _fit(pair, **self._cut, device=self._device, dtype=self._dtype)
                del pair
                yield layer
                bar.update()

    def _read(self, name: str) -> _Pair:
        target = self.targets[name]
        base, aligned = self._base.read(self._partners[target.tensor_module]), self._aligned.read(target.tensor_module)
        if base.shape != aligned.shape:
            raise SubspaceError(
                f"layer {name!r} has shape {tuple(base.shape)} in the base and {tuple(aligned.shape)} in the aligned model: the two are not "
                "a pair; if only the vocabulary differs, leave the layer out of target_modules"
            )
        samples = torch.stack([sample(base), sample(aligned)]).float()
        return _Pair(name, base, aligned, target.transposed, samples, digest(base), digest(aligned))


@dataclass(frozen=True)
class _Pair:
    """One layer of both checkpoints, read and fingerprinted."""

    name: str
    base: Tensor
    aligned: Tensor
    transposed: bool
    samples: Tensor
    base_digest: str
    aligned_digest: str


def _difference(pair: _Pair, device: torch.device) -> Tensor:
    """V, (out, in), computed without a second matrix of its size and precision."""
    compute = torch.float64 if torch.float64 in (pair.base.dtype, pair.aligned.dtype) else torch.float32
    V = pair.aligned.to(device, compute, copy=True)
    for rows, base in zip(torch.split(V, ROWS_AT_A_TIME), torch.split(pair.base, ROWS_AT_A_TIME), strict=True):
        rows -= base.to(device, compute)
    return V.mT.contiguous() if pair.transposed else V


def _norm(V: Tensor) -> float:
    """‖V‖_F in float64, by blocks of rows, because torch would copy all of V to float64."""
    parts = [torch.linalg.vector_norm(rows, dtype=torch.float64) for rows in torch.split(V, ROWS_AT_A_TIME)]
    return float(torch.linalg.vector_norm(torch.stack(parts)))


def _fit(
    pair: _Pair,
    *,
    rank: int | None,
    tolerance: float | None,
    whole: bool,
    device: torch.device,
    dtype: torch.dtype | None,
) -> LayerSubspace:
    name = pair.name
    V = _difference(pair, device)
    norm = _norm(V)
    if norm == 0 or same_up_to_rounding(pair.base, pair.aligned):
        raise SubspaceError(
            f"layer {name!r} is identical in the base and the aligned model{' up to rounding' if norm else ''}, so it has no alignment subspace: check "
            "that the two are not the same model; if alignment left this layer alone, leave it out of target_modules"
        )
    if rank is not None and rank > min(V.shape):
        raise SubspaceError(
            f"rank = {rank}: layer {name!r} of shape {tuple(V.shape)} has rank at most {min(V.shape)}; choose a smaller one"
        )
    out_features, in_features = V.shape
    common: dict[str, Any] = {
        "name": name,
        "shape": (out_features, in_features),
        "transposed": pair.transposed,
        "frobenius_norm": norm,
        "base_digest": pair.base_digest,
        "aligned_digest": pair.aligned_digest,
        "samples": pair.samples,
    }
    if whole:
        kept = V.to(dtype or torch.promote_types(pair.base.dtype, pair.aligned.dtype))
        rounding = torch.linalg.vector_norm(V - kept.to(V.dtype), dtype=torch.float64).item()
        return LayerSubspace(**common, whole=kept.cpu(), error_bound=2 * rounding + rounding**2 / norm)
    svd = thin_svd(V, rank=rank, tolerance=tolerance)
    kept_dtype = dtype or torch.float32
    left = svd.left.to(kept_dtype)
    rounding = torch.linalg.matrix_norm((left.to(V.dtype) - svd.left), 2).item() if kept_dtype != V.dtype else 0.0
    spectral = svd.singular_values[0].item() ** 2 / norm
    return LayerSubspace(
        **common,
        left=left.cpu(),
        singular_values=svd.singular_values.float().cpu(),
        right=svd.right.to(kept_dtype).cpu(),
        error_bound=svd.gram_error / norm + spectral * (2 * rounding + rounding**2),
    )


def describe_cut(rank: int | None, tolerance: float | None, whole: bool) -> str:
    """The truncation in words, for the provenance. Raises `SubspaceError` if it is none, more than one, or out of range."""
    if sum((rank is not None, tolerance is not None, whole)) != 1:
        raise SubspaceError("give exactly one of rank (e.g. 64), tolerance (e.g. 0.001) or whole, which says how much of V to keep")
    if rank is not None:
        if rank < 1:
            raise SubspaceError(f"rank = {rank}: must be at least 1")
        return f"rank {rank}"
    if tolerance is not None:
        if not 0 < tolerance < 1:
            raise SubspaceError(f"tolerance = {tolerance}: must be between 0 and 1; it is relative to the norm of C")
        return f"tolerance {tolerance:g}"
    return "whole"
