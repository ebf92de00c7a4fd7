"""`AlignmentSubspace`: what alignment changed in every linear layer of a model, fitted once from a pair and then only applied."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trl_safety import __version__
from trl_safety.adapters.checkpoint import Checkpoint, digest
from trl_safety.adapters.files import replacing
from trl_safety.adapters.names import is_named, match
from trl_safety.adapters.shards import whole
from trl_safety.adapters.targets import resolve_targets
from trl_safety.errors import SubspaceError
from trl_safety.linalg.operators import LowRankOperator, Operator, WholeOperator
from trl_safety.linalg.thin_svd import thin_svd

SCHEMA_VERSION = 1
METADATA_KEY = "trl_safety.alignment_subspace"
HUB_FILE = "alignment_subspace.safetensors"

FINGERPRINT_ENTRIES = 256
FULL_PRECISION_DIFFERENCE = 1e-6
"""Weights of the same model are equal once both are in the narrower of their dtypes."""
CASTS = (torch.float32, torch.bfloat16, torch.float16)
ROWS_AT_A_TIME = 1024
QUANTISED_DIFFERENCE = 0.5
"""NF4 moves a layer by about a tenth of its norm, 2-bit formats by a third; another model's weights by more than their norm."""


@dataclass(frozen=True)
class _Origin:
    """A subspace file as it was when it was loaded."""

    path: Path
    inode: int
    modified: int

    @classmethod
    def of(cls, path: Path) -> _Origin:
        found = path.stat()
        return cls(path, found.st_ino, found.st_mtime_ns)

    def read(self, key: str, held: Tensor) -> Tensor:
        """A tensor through a new mapping; the held one where the file was removed or another put in its place.

        Raises:
            SubspaceError: other bytes were written into the file itself, which the held one would show.
        """
        try:
            now = _Origin.of(self.path)
            if now.inode == self.inode and now.modified != self.modified:
                raise SubspaceError(f"subspace = {str(self.path)!r}: was overwritten since it was loaded; load it again")
            if now != self:
                return held
            with safe_open(str(self.path), framework="pt") as handle:
                tensor: Tensor = handle.get_tensor(key)
                return tensor
        except (OSError, SafetensorError):
            return held


@dataclass(frozen=True)
class LayerSubspace:
    """What alignment changed in one layer: V = W_aligned − W_base, cut at a rank or whole.

    Attributes:
        name: the module's name in the model class.
        shape: (out, in) of V.
        transposed: the module stores its weight as in × out.
        frobenius_norm: ‖V‖_F, of the uncut V.
        error_bound: bound on the spectral norm of the error of C = VVᵀ/‖V‖_F as it is kept here.
        left, singular_values, right: U (out, k), σ (k,), Z (in, k); None where V is whole.
        whole: V, (out, in); None where it is cut.
        base_digest, aligned_digest: fingerprints of the two tensors that were read.
        samples: 256 entries of the base and of the aligned weight, (2, 256), by which a loaded model is recognised.
        origin: the file that the tensors are mapped from, if any.
    """

    name: str
    shape: tuple[int, int]
    transposed: bool
    frobenius_norm: float
    error_bound: float
    base_digest: str
    aligned_digest: str
    samples: Tensor
    left: Tensor | None = None
    singular_values: Tensor | None = None
    right: Tensor | None = None
    whole: Tensor | None = None
    origin: _Origin | None = field(default=None, compare=False, repr=False)

    @property
    def rank(self) -> int:
        """k, or min(out, in) where V is whole."""
        return min(self.shape) if self.left is None else self.left.shape[1]

    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """U, σ and Z.

        Raises:
            SubspaceError: V is kept whole, so that no rank was chosen.
        """
        left, singular_values, right = self._part("left"), self._part("singular_values"), self._part("right")
        if left is None or singular_values is None or right is None:
            raise SubspaceError(
                f"layer {self.name!r}: the subspace keeps V whole, and a projector onto all of V would be the identity on a "
                "full-rank layer; build the subspace with a rank or a tolerance"
            )
        return left, singular_values, right

    def _part(self, name: str) -> Tensor | None:
        """One of the tensors, through a mapping of its own where it is in a file.

        What is read through a mapping counts as the process's memory until the mapping is gone: that of the whole file stays, a
        caller's ends with its use.
        """
        held: Tensor | None = getattr(self, name)
        return held if held is None or self.origin is None else self.origin.read(f"{self.name}:{name}", held)

    def operator(self, kind: Literal["scaled", "orthogonal"]) -> Operator:
        """C = VVᵀ/‖V‖_F ("scaled") or P = UₖUₖᵀ ("orthogonal").

        Raises:
            SubspaceError: "orthogonal" on a V kept whole or of full rank, where P is the identity and nothing would happen.
        """
        if kind == "scaled" and self.whole is not None:
            whole = self._part("whole")
            assert whole is not None  # noqa: S101  # checked above
            return WholeOperator(whole, self.frobenius_norm)
        left, singular_values, _ = self.factors()
        if kind == "scaled":
            return LowRankOperator(left, singular_values.square() / self.frobenius_norm)
        if self.rank >= self.shape[0]:
            raise SubspaceError(
                f"operator = 'orthogonal': layer {self.name!r} has {self.shape[0]} outputs and the subspace rank {self.rank}, so "
                "that the projector is the identity and would do nothing; build the subspace with a smaller rank"
            )
        return LowRankOperator(left, torch.ones_like(singular_values))

    def difference(self, weight: Tensor) -> tuple[float, float, float]:
        """See `relative_differences`."""
        return relative_differences(weight, self.samples)


def relative_differences(weight: Tensor, samples: Tensor) -> tuple[float, float, float]:
    """Relative distances over sampled entries: of a loaded weight from the aligned and from the base model's, as they are or cast
    as the loaded one may have been, and of the two from each other. `samples` is (2, 256), the base's and the aligned model's.
    """
    entries = sample(weight).float()
    norms = torch.linalg.vector_norm(samples, dim=1).clamp(min=1e-30)
    casts = torch.stack([torch.linalg.vector_norm(entries - samples.to(cast).float(), dim=1) for cast in CASTS])
    to_base, to_aligned = (casts.min(dim=0).values / norms).tolist()
    return to_aligned, to_base, (torch.linalg.vector_norm(samples[1] - samples[0]) / norms[1]).item()


@dataclass(frozen=True)
class Provenance:
    """Where a subspace comes from: written into its file and into every report."""

    base: str
    aligned: str
    base_revision: str | None
    aligned_revision: str | None
    cut: str
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    trl_safety: str = __version__
    schema_version: int = SCHEMA_VERSION


class AlignmentSubspace:
    """The alignment subspaces of a model's layers, by module name, with their provenance.

    Attributes:
        layers: module name → `LayerSubspace`.
        provenance: sources, revisions and the cut.
    """

    def __init__(self, layers: Mapping[str, LayerSubspace], provenance: Provenance) -> None:
        self.layers = dict(layers)
        self.provenance = provenance

    def __repr__(self) -> str:
        source = self.provenance
        return f"AlignmentSubspace({len(self.layers)} layers, {source.cut}, {source.base!r} → {source.aligned!r})"

    @property
    def identity(self) -> str:
        """A fingerprint of what was read and how it was cut: equal for two builds from the same pair."""
        rows = sorted((x.name, x.base_digest, x.aligned_digest, x.rank, x.whole is not None) for x in self.layers.values())
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:32]

    @classmethod
    def from_pair(
        cls,
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
        progress: bool = True,
    ) -> AlignmentSubspace:
        """Fit the subspace of a pair, reading both checkpoints tensor by tensor.

        Weights are paired by NAME; the authors' code pairs by position, which breaks on biases. Memory: what is kept, and two pairs
        of tensors. For a large model see `build_subspace`, which keeps what is done on the disk.

        Args:
            base: the unaligned model: a local folder or a Hub id. One safetensors file or shards, any float dtype.
            aligned: the aligned model, likewise.
            target_modules: names or endings, a regular expression, or "all-linear", as in PEFT's LoraConfig.
            adapter: a trained adapter's folder whose modules to take instead.
            rank: keep the K leading singular directions of every layer (fewer where V has a lower numerical rank).
            tolerance: keep as many as bring the error of C, relative to its norm, below this: σ²ₖ₊₁ ≤ t·σ²₁.
            whole: keep V itself. Exactly one of rank, tolerance and whole.
            base_revision: Hub revision of `base`.
            aligned_revision: Hub revision of `aligned`.
            device: where to compute; a GPU when there is one.
            dtype: of the kept V or factors. Factors are float32 by default; a whole V keeps the checkpoints' wider dtype. A
                narrower one adds its rounding to the error bound.
            trust_remote_code: run model code that comes with the aligned checkpoint, to learn its module names.
            progress: show a progress bar.

        Raises:
            CheckpointError: a checkpoint cannot be read, is stored quantised or pickled, or holds NaN.
            SubspaceError: the pair is identical, differs in shape or lacks a layer, a rank is above a layer's, or no layer is
                named. The message names the layer and the remedy.
        """
        fit = PairFit(
            base,
            aligned,
            target_modules=target_modules,
            adapter=adapter,
            rank=rank,
            tolerance=tolerance,
            whole=whole,
            base_revision=base_revision,
            aligned_revision=aligned_revision,
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
        )
        return cls({layer.name: layer for layer in fit.layers(progress=progress)}, fit.provenance)

    def save(self, path: str | Path, *, plan: str | None = None, left: str | None = None) -> Path:
        """Write one safetensors file with the provenance in its header; the file is whole or absent.

        Args:
            path: the file.
            plan: what the build that it is of was asked for; see `build_subspace`.
            left: what is there after a failure, for the message.

        Raises:
            SubspaceError: the folder cannot be written to or the disk is full.
        """
        tensors: dict[str, Tensor] = {}
        described = {}
        for name, layer in self.layers.items():
            parts = {"left": layer.left, "singular_values": layer.singular_values, "right": layer.right, "whole": layer.whole}
            tensors |= {f"{name}:{part}": value.contiguous().cpu() for part, value in parts.items() if value is not None}
            tensors[f"{name}:samples"] = layer.samples
            described[name] = {
                "shape": layer.shape,
                "transposed": layer.transposed,
                "rank": layer.rank,
                "frobenius_norm": layer.frobenius_norm,
                "error_bound": layer.error_bound,
                "base_digest": layer.base_digest,
                "aligned_digest": layer.aligned_digest,
            }
        content = {"provenance": asdict(self.provenance), "identity": self.identity, "layers": described}
        header = json.dumps({**content, "plan": plan} if plan else content)
        target = Path(path)
        with replacing(target, error=SubspaceError, setting="output", **({"left": left} if left else {})) as temporary:
            try:
                save_file(tensors, str(temporary), metadata={METADATA_KEY: header, "format": "pt"})
            except SafetensorError as error:
                raise OSError(str(error)) from error
        return target

    @classmethod
    def load(cls, path: str | Path) -> AlignmentSubspace:
        """Read a file written by `save`. Tensors are memory-mapped: a layer costs memory when it is used.

        Raises:
            SubspaceError: it is missing, truncated, no safetensors file, or no alignment subspace of this version.
        """
        name = str(path)
        if not Path(path).is_file():
            raise SubspaceError(f"subspace = {name!r}: no such file; make it with `trl-safety subspace BASE ALIGNED -o {name}`")
        try:
            with safe_open(name, framework="pt") as handle:
                header = (handle.metadata() or {}).get(METADATA_KEY)
                if header is None:
                    raise SubspaceError(
                        f"subspace = {name!r}: is a safetensors file but no alignment subspace; make one with `trl-safety subspace`"
                    )
                content = json.loads(header)
                version = content["provenance"]["schema_version"]
                if version != SCHEMA_VERSION:
                    raise SubspaceError(
                        f"subspace = {name!r}: has schema version {version}, this trl-safety reads {SCHEMA_VERSION}; rebuild it or "
                        "install the version that wrote it"
                    )
                keys = set(handle.keys())
                origin = _Origin.of(Path(path))
                layers = {
                    layer: LayerSubspace(
                        name=layer,
                        shape=(int(row["shape"][0]), int(row["shape"][1])),
                        transposed=row["transposed"],
                        frobenius_norm=row["frobenius_norm"],
                        error_bound=row["error_bound"],
                        base_digest=row["base_digest"],
                        aligned_digest=row["aligned_digest"],
                        samples=handle.get_tensor(f"{layer}:samples"),
                        origin=origin,
                        **{
                            part: handle.get_tensor(f"{layer}:{part}")
                            for part in ("left", "singular_values", "right", "whole")
                            if f"{layer}:{part}" in keys
                        },
                    )
                    for layer, row in content["layers"].items()
                }
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            if isinstance(error, SubspaceError):
                raise
            raise SubspaceError(
                f"subspace = {name!r}: is truncated or no safetensors file ({error}); make it again with `trl-safety subspace`"
            ) from error
        return cls(layers, Provenance(**content["provenance"]))

    @classmethod
    def from_pretrained(cls, source: str | Path, *, revision: str | None = None, token: str | None = None) -> AlignmentSubspace:
        """Load from a file, a folder, or a Hub repository that `push_to_hub` filled.

        Raises:
            SubspaceError: there is none, or it cannot be fetched.
        """
        path = Path(source)
        if path.is_dir():
            return cls.load(path / HUB_FILE)
        if path.is_file() or path.suffix == ".safetensors" or str(source).count("/") != 1:
            return cls.load(path)
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

        try:
            return cls.load(hf_hub_download(str(source), HUB_FILE, revision=revision, token=token))
        except (EntryNotFoundError, HFValidationError, HfHubHTTPError, OSError) as error:
            raise SubspaceError(
                f"subspace = {str(source)!r}: is no local file, and {HUB_FILE!r} could not be fetched from a Hub repository of that "
                f"name ({str(error).splitlines()[0]}); give the path of a subspace file or check the id and your access"
            ) from error

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, token: str | None = None, revision: str | None = None) -> str:
        """Upload the file, with a card, so that others need not hold the unaligned base. Returns the commit's address."""
        import tempfile

        from huggingface_hub import HfApi

        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save(Path(folder) / HUB_FILE)
            (Path(folder) / "README.md").write_text(self._card(repo_id), encoding="utf-8")
            commit = api.upload_folder(repo_id=repo_id, folder_path=folder, revision=revision, commit_message="Upload alignment subspace")
        return str(commit)

    def for_modules(self, names: Iterable[str], skip: Iterable[str] = ()) -> dict[str, LayerSubspace]:
        """The subspace of every adapted module, found by name under every wrapper's prefix.

        Args:
            names: the adapted modules.
            skip: entries (names or endings) of modules to leave out.

        Raises:
            SubspaceError: a module is not in the subspace, or an entry of `skip` matches none.
        """
        names, skip = list(names), list(skip)
        if unused := [entry for entry in skip if not any(is_named(name, [entry]) for name in names)]:
            raise SubspaceError(f"skip_modules = {unused!r}: matches no adapted module; remove it or correct its name")
        found = match([name for name in names if not is_named(name, skip)], self.layers)
        if missing := [name for name, layer in found.items() if layer is None]:
            shown = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
            raise SubspaceError(
                f"{len(missing)} of {len(found)} adapted layers are not in the alignment subspace of {self.provenance.aligned!r}: {shown}. "
                "They would train unprotected: rebuild the subspace for them (`trl-safety subspace … --adapter A` or "
                "--target-modules), or list them in skip_modules to leave them alone on purpose"
            )
        if not found:
            raise SubspaceError("skip_modules leaves no adapted layer to protect: remove entries from it")
        return {name: self.layers[layer] for name, layer in found.items() if layer is not None}

    def _card(self, repo_id: str) -> str:
        source = self.provenance
        return (
            "---\nlibrary_name: trl-safety\ntags: [trl-safety, alignment-subspace]\n---\n\n"
            f"# Alignment subspace of {source.aligned}\n\n"
            f"What alignment changed from `{source.base}` to `{source.aligned}` in {len(self.layers)} linear layers "
            f"({source.cut}), for trl-safety:\n\n"
            f"```yaml\nsafety:\n  subspace: {repo_id}\n  asft: {{weight: 1.0}}\n```\n"
        )


class PairFit:
    """A fit of a pair, layer by layer; arguments and errors as of `AlignmentSubspace.from_pair`.

    Attributes:
        targets: module name → where its weight lies in the aligned checkpoint.
        provenance: of the subspace.
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
        cut = _describe_cut(rank, tolerance, whole)
        self._base, self._aligned = Checkpoint(base, base_revision), Checkpoint(aligned, aligned_revision)
        self.targets = resolve_targets(self._aligned, target_modules, adapter, trust_remote_code=trust_remote_code)
        paired = match([target.tensor_module for target in self.targets.values()], self._base.modules)
        if missing := [name for name, found in paired.items() if found is None]:
            raise SubspaceError(
                f"layer {missing[0]!r} is in the aligned checkpoint {str(aligned)!r} but not in the base {str(base)!r}: the two are no "
                "pair of one architecture"
            )
        self._partners = {name: str(found) for name, found in paired.items()}
        self._cut: dict[str, Any] = {"rank": rank, "tolerance": tolerance, "whole": whole}
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._dtype = dtype
        self.provenance = Provenance(str(base), str(aligned), self._base.revision, self._aligned.revision, cut)

    @property
    def plan(self) -> str:
        """A fingerprint of what is asked for, and of the files that it is asked of: their names, sizes and times."""
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
        """Fit every layer but those of `skip`, in the checkpoint's order. The next pair is read while one is decomposed."""
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
                f"layer {name!r} has shape {tuple(base.shape)} in the base and {tuple(aligned.shape)} in the aligned model: the two are no "
                "pair; where only the vocabulary differs, leave the layer out of target_modules"
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
    """V, (out, in), without a second matrix of its size and precision."""
    compute = torch.float64 if torch.float64 in (pair.base.dtype, pair.aligned.dtype) else torch.float32
    V = pair.aligned.to(device, compute, copy=True)
    for rows, base in zip(torch.split(V, ROWS_AT_A_TIME), torch.split(pair.base, ROWS_AT_A_TIME), strict=True):
        rows -= base.to(device, compute)
    return V.mT.contiguous() if pair.transposed else V


def _norm(V: Tensor) -> float:
    """‖V‖_F in float64, of which torch would make a copy of V as a whole."""
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
            f"layer {name!r} is identical in the base and the aligned model{' up to rounding' if norm else ''}, so that it has no alignment subspace: check "
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


def _describe_cut(rank: int | None, tolerance: float | None, whole: bool) -> str:
    if sum((rank is not None, tolerance is not None, whole)) != 1:
        raise SubspaceError("give exactly one of rank (e.g. 64), tolerance (e.g. 0.001) or whole, which says how much of V to keep")
    if rank is not None:
        if rank < 1:
            raise SubspaceError(f"rank = {rank}: must be at least 1")
        return f"rank {rank}"
    if tolerance is not None:
        if not 0 < tolerance < 1:
            raise SubspaceError(f"tolerance = {tolerance}: must lie between 0 and 1; it is relative to the norm of C")
        return f"tolerance {tolerance:g}"
    return "whole"


def same_up_to_rounding(one: Tensor, other: Tensor) -> bool:
    """Whether two weights are equal once both are in 16 bits: one model, stored twice."""
    return any(torch.equal(one.to(cast), other.to(cast)) for cast in CASTS)


def sample(weight: Tensor) -> Tensor:
    """256 entries of a weight at positions that depend on its size alone, on the CPU; of a sharded one, on every process."""
    weight = whole(weight.detach())
    generator = torch.Generator().manual_seed(weight.numel())
    positions = torch.randint(weight.numel(), (FINGERPRINT_ENTRIES,), generator=generator)
    return weight.flatten()[positions.to(weight.device)].cpu()
