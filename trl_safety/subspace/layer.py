"""One layer's alignment subspace: V, truncated to a rank or whole, and its operators."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trl_safety.adapters.fingerprint import FINGERPRINT_ENTRIES, relative_differences
from trl_safety.errors import SubspaceError
from trl_safety.linalg.finite import is_finite
from trl_safety.linalg.operators import LowRankOperator, Operator, WholeOperator
from trl_safety.version import __version__

SCHEMA_VERSION = 1


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
        """A tensor through a new mapping; the held tensor if the file was removed or replaced.

        Raises:
            SubspaceError: the file itself was overwritten, which would change the held tensor, too.
        """
        try:
            now = _Origin.of(self.path)
            if now.inode == self.inode and now.modified != self.modified:
                raise SubspaceError(f"subspace = {str(self.path)!r}: was overwritten since it was loaded; load it again")
            if now != self:
                return held
            with safe_open(str(self.path), framework="pt") as handle:
                tensor: Tensor = handle.get_tensor(key)
        except (OSError, SafetensorError):
            return held
        return tensor


@dataclass(frozen=True)
class LayerSubspace:
    """What alignment changed in one layer: V = W_aligned − W_base, truncated to a rank or whole.

    Attributes:
        name: the module's name in the model class.
        shape: (out, in) of V.
        transposed: whether the module stores its weight as in × out.
        frobenius_norm: ‖V‖_F before truncation.
        error_bound: bound on the spectral norm of the error of C = VVᵀ/‖V‖_F as stored here.
        left, singular_values, right: U (out, k), σ (k,), Z (in, k); None if V is whole.
        whole: V, (out, in); None if it is truncated.
        base_digest, aligned_digest: fingerprints of the two tensors that were read.
        samples: 256 entries of the base and of the aligned weight, (2, 256), for recognising a loaded model.
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
        """k, or min(out, in) if V is whole."""
        return min(self.shape) if self.left is None else self.left.shape[1]

    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """U, σ and Z.

        Raises:
            SubspaceError: V is kept whole, without a rank.
        """
        left, singular_values, right = self._part("left"), self._part("singular_values"), self._part("right")
        if left is None or singular_values is None or right is None:
            raise SubspaceError(
                f"layer {self.name!r}: the subspace keeps V whole, and a projector onto all of V would be the identity on a "
                "full-rank layer; build the subspace with a rank or a tolerance"
            )
        return left, singular_values, right

    def _part(self, name: str) -> Tensor | None:
        """One of the tensors, through its own memory mapping if it is in a file.

        What is read through a mapping counts as the process's memory until the mapping is closed. The mapping of the whole file stays
        open; the one made here is closed after use.
        """
        held: Tensor | None = getattr(self, name)
        if held is None or self.origin is None:
            return held
        tensor = self.origin.read(f"{self.name}:{name}", held)
        if not is_finite(tensor):
            raise self._no_numbers(str(self.origin.path), name)
        return tensor

    def check(self, source: str) -> None:
        """Check that the parts belong to one layer and are finite, as far as possible without reading the large ones.

        Raises:
            SubspaceError: a check failed; the message names the part.
        """
        out, width = self.shape
        rank = 0 if self.left is None else self.left.shape[-1]
        shapes = {
            "left": (out, rank),
            "singular_values": (rank,),
            "right": (width, rank),
            "whole": (out, width),
            "samples": (2, FINGERPRINT_ENTRIES),
        }
        parts = {part: tensor for part in shapes if (tensor := getattr(self, part)) is not None}
        if set(parts) not in ({"left", "singular_values", "right", "samples"}, {"whole", "samples"}):
            raise SubspaceError(f"subspace = {source!r}: layer {self.name!r} is incomplete; make the file again with `trl-safety subspace`")
        for part, tensor in parts.items():
            if tuple(tensor.shape) != shapes[part]:
                raise SubspaceError(
                    f"subspace = {source!r}: tensor {f'{self.name}:{part}'!r} has shape {list(tensor.shape)} instead of {list(shapes[part])}; make the file "
                    "again with `trl-safety subspace`"
                )
        for part in ("samples", "singular_values"):
            if part in parts and not is_finite(parts[part]):
                raise self._no_numbers(source, part)
        for part in ("frobenius_norm", "error_bound"):
            if not isinstance(getattr(self, part), int | float) or not math.isfinite(getattr(self, part)):
                raise self._no_numbers(source, part)

    def _no_numbers(self, source: str, part: str) -> SubspaceError:
        return SubspaceError(
            f"subspace = {source!r}: tensor {f'{self.name}:{part}'!r} holds NaN or infinity: the file is damaged; make it again with `trl-safety subspace`"
        )

    def operator(self, kind: Literal["scaled", "orthogonal"]) -> Operator:
        """C = VVᵀ/‖V‖_F ("scaled") or P = UₖUₖᵀ ("orthogonal").

        Raises:
            SubspaceError: "orthogonal" with V kept whole or of full rank, in which case P is the identity and would do nothing.
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
                f"operator = 'orthogonal': layer {self.name!r} has {self.shape[0]} outputs and the subspace has rank {self.rank}, so "
                "the projector is the identity and would do nothing; build the subspace with a smaller rank"
            )
        return LowRankOperator(left, torch.ones_like(singular_values))

    def difference(self, weight: Tensor) -> tuple[float, float, float]:
        """See `relative_differences`."""
        return relative_differences(weight, self.samples)


@dataclass(frozen=True)
class Provenance:
    """Where a subspace comes from. It is written into the subspace's file and into every report.

    Attributes:
        base: the unaligned model of the pair; None if V is an adapter's update.
        aligned: the model that is fine-tuned and served.
        base_revision, aligned_revision: their Hub commits.
        cut: how V was truncated.
        adapter: the safety adapter whose update V is, trained on `aligned`; None if V is the difference of a pair.
    """

    base: str | None
    aligned: str
    base_revision: str | None
    aligned_revision: str | None
    cut: str
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    trl_safety: str = __version__
    schema_version: int = SCHEMA_VERSION
    adapter: str | None = None

    @property
    def origin(self) -> str:
        """What V is, in words."""
        return subspace_origin(asdict(self))


def subspace_origin(provenance: Mapping[str, Any], named: Callable[[str], str] = repr) -> str:
    """What V is, in words.

    Args:
        provenance: a `Provenance`, as a report records it.
        named: how to write the name of a model.
    """
    aligned = named(provenance["aligned"])
    if provenance.get("adapter") is not None:
        return f"the update of the safety adapter {named(provenance['adapter'])} on {aligned}"
    return f"{named(provenance['base'])} → {aligned}"
