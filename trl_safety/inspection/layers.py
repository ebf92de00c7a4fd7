"""An adapter's update measured against the alignment subspace: one row per layer, and a plot."""

from __future__ import annotations

import json
import os.path
from collections.abc import Sequence
from pathlib import Path

import torch
from pydantic import BaseModel

from trl_safety.adapters.files import replacing
from trl_safety.adapters.folder import AdapterFolder
from trl_safety.adapters.marks import marks
from trl_safety.corrections.base import on_host, working_factors
from trl_safety.errors import SafetyError
from trl_safety.linalg.alignment import cosine as cosine_of
from trl_safety.linalg.alignment import energies
from trl_safety.subspace.artifact import AlignmentSubspace
from trl_safety.subspace.recognition import check_base, check_shape


class LayerView(BaseModel):
    """One layer: the norm of its update, its cosine with C·ΔW, and its energy shares (None where V is kept whole)."""

    layer: str
    rank: int
    alignment_norm: float
    update_norm: float
    cosine: float
    inside: float | None = None
    partial: float | None = None
    outside: float | None = None


class AdapterView(BaseModel):
    """All layers of an adapter, and the corrections applied to it."""

    adapter: str
    subspace: str
    base_check: str
    corrected_by: list[str]
    layers: list[LayerView]


def inspect_adapter(adapter: str | Path, subspace: AlignmentSubspace, *, device: str | torch.device | None = None) -> AdapterView:
    """Measure a saved adapter against the alignment subspace without loading any model.

    Raises:
        AdapterError: the adapter cannot be read or belongs to another model.
        SubspaceError: an adapted layer is not in the subspace.
    """
    folder = AdapterFolder.open(adapter)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    found = subspace.for_modules(folder.factors)
    base_check = check_base(folder, subspace, found)
    rows = []
    for name, layer in found.items():
        factors = folder.factors[name]
        check_shape(name, factors.shape, layer)
        B, A = working_factors(factors.B.to(where), factors.A.to(where))
        image = layer.operator("scaled").to(where, B.dtype).apply(B)
        cosine, norm, _ = cosine_of(image, B, A)
        parts = [torch.full_like(norm, torch.nan)] * 3
        if layer.whole is None:
            left, _, right = layer.factors()
            parts = list(energies(B, A, left.to(B), right.to(A)))
        rows.append(torch.stack([cosine, norm * factors.scaling, *(part / norm.square().clamp(min=1e-300) for part in parts)]))
    views = []
    for (name, layer), (cosine, norm, *shares) in zip(found.items(), on_host(rows).tolist(), strict=True):
        split = dict(zip(("inside", "partial", "outside"), shares, strict=True)) if layer.whole is None else {}
        views.append(LayerView(layer=name, rank=layer.rank, alignment_norm=layer.frobenius_norm, update_norm=norm, cosine=cosine, **split))
    return AdapterView(
        adapter=str(adapter), subspace=repr(subspace), base_check=base_check, corrected_by=marks(folder.config), layers=views
    )


def write_json(view: BaseModel, path: Path) -> None:
    """Write a view as JSON; the file is whole or absent. Raises `SafetyError` if it cannot be written."""
    with replacing(path, error=SafetyError, setting="json") as temporary:
        temporary.write_text(json.dumps(view.model_dump(), indent=2) + "\n", encoding="utf-8")


def common_prefix(names: Sequence[str]) -> str:
    """The leading name parts that all modules share, including the last dot."""
    shared = os.path.commonprefix(list(names)) if len(names) > 1 else ""  # noqa: RUF071  # cut at a dot below
    return shared[: shared.rfind(".") + 1]


def plot(view: AdapterView, path: Path) -> None:
    """Draw a view as PNG: energy shares, update norm and cosine by layer. Raises `SafetyError` if it cannot be written."""
    from matplotlib.figure import Figure

    layers = view.layers
    figure = Figure(figsize=(10, max(4.0, 0.16 * len(layers) + 2)), layout="constrained")
    shares, norms, cosines = figure.subplots(1, 3, sharey=True, width_ratios=(2, 1, 1))
    positions = list(range(len(layers)))
    start = [0.0] * len(layers)
    for part, colour in (("inside", "#2a7f62"), ("partial", "#d9a441"), ("outside", "#b5483a")):
        values = [getattr(layer, part) or 0.0 for layer in layers]
        shares.barh(positions, values, left=start, color=colour, label=part, height=0.8)
        start = [a + b for a, b in zip(start, values, strict=True)]
    shares.set(xlabel="share of ‖ΔW‖²", xlim=(0, 1), yticks=positions)
    shared = common_prefix([layer.layer for layer in layers])
    shares.set_yticklabels([layer.layer.removeprefix(shared) for layer in layers], fontsize=6)
    shares.invert_yaxis()
    if all(layer.inside is None for layer in layers):
        shares.text(
            0.5, 0.5, "the subspace keeps V whole:\nno shares; build one with a rank", ha="center", va="center", transform=shares.transAxes
        )
    else:
        shares.legend(loc="lower right", fontsize=7)
    norms.barh(positions, [layer.update_norm for layer in layers], color="#44617b", height=0.8)
    norms.set(xlabel="‖ΔW‖")
    cosines.barh(positions, [layer.cosine for layer in layers], color="#7a6a8e", height=0.8)
    cosines.set(xlabel="cos(C·ΔW, ΔW)", xlim=(0, 1))
    figure.suptitle(f"{Path(view.adapter).name}: update against the alignment subspace", fontsize=10)
    with replacing(path, error=SafetyError, setting="plot") as temporary:
        figure.savefig(temporary, format="png", dpi=130)
