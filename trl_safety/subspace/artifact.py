"""`AlignmentSubspace`: what alignment changed in every linear layer of a model, fitted once from a pair and applied afterwards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trl_safety.adapters.files import other_schema, replacing
from trl_safety.adapters.names import is_named, match
from trl_safety.errors import SubspaceError, reason
from trl_safety.subspace.fit import PairFit
from trl_safety.subspace.fit_adapter import fit_adapter
from trl_safety.subspace.layer import SCHEMA_VERSION, LayerSubspace, Provenance, _Origin

METADATA_KEY = "trl_safety.alignment_subspace"

HUB_FILE = "alignment_subspace.safetensors"


class AlignmentSubspace:
    """The alignment subspaces of a model's layers, by module name, with their provenance.

    Attributes:
        layers: module name → `LayerSubspace`.
        provenance: sources, revisions and the truncation.
    """

    def __init__(self, layers: Mapping[str, LayerSubspace], provenance: Provenance) -> None:
        self.layers = dict(layers)
        self.provenance = provenance

    def __repr__(self) -> str:
        source = self.provenance
        return f"AlignmentSubspace({len(self.layers)} layers, {source.cut}, {source.origin})"

    @property
    def identity(self) -> str:
        """A fingerprint of what was read and how it was truncated: equal for two builds from the same pair."""
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

        Weights are paired by NAME; the authors' code pairs by position, which breaks on biases. Memory holds the result and two pairs
        of tensors. For a large model see `build_subspace`, which keeps finished layers on disk.

        Args:
            base: the unaligned model: a local folder or a Hub id. One safetensors file or shards, any float dtype.
            aligned: the aligned model, in the same form.
            target_modules: names or endings, a regular expression, or "all-linear", as in PEFT's LoraConfig.
            adapter: the folder of a trained adapter whose modules to use instead.
            rank: keep the K leading singular directions of every layer (fewer if V has a lower numerical rank).
            tolerance: keep the fewest directions for which the relative error of C is at most this: σ²ₖ₊₁ ≤ t·σ²₁.
            whole: keep V itself. Give exactly one of rank, tolerance and whole.
            base_revision: Hub revision of `base`.
            aligned_revision: Hub revision of `aligned`.
            device: where to compute; a GPU by default if there is one.
            dtype: of the kept V or factors. Factors are float32 by default; a whole V keeps the wider dtype of the two checkpoints. A
                narrower dtype adds its rounding to the error bound.
            trust_remote_code: run model code that comes with the aligned checkpoint, to get its module names.
            progress: show a progress bar.

        Raises:
            CheckpointError: a checkpoint cannot be read, is stored quantised or pickled, or holds NaN.
            SubspaceError: the two checkpoints are identical, differ in shape or lack a layer, the rank exceeds a layer's, or no layer
                is named. The message names the layer and the remedy.
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

    @classmethod
    def from_adapter(
        cls,
        model: str | Path,
        adapter: str | Path,
        *,
        rank: int | None = None,
        tolerance: float | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> AlignmentSubspace:
        """V as the update of a safety adapter: a LoRA that was trained to refuse, on the model that is to be fine-tuned.

        V = s·B·A points from the model to one that refuses more, as a pair's V points from the base to the aligned model. The aligned
        model of this subspace is the model itself, and its base would be W − V. The SVD is exact, through QR factorisations of the
        factors, in float64; memory holds the factors and one weight of the model, which is read to recognise it later.

        Args:
            model: the model that the adapter was trained on, and that is to be fine-tuned: a local folder or a Hub id, in full precision.
            adapter: folder or Hub id of the adapter. A ReinforceLoRA is one, too.
            rank: keep only the K leading singular directions of every layer.
            tolerance: keep the fewest directions with σ²ₖ₊₁ ≤ t·σ²₁. By default all of the adapter's are kept.
            revision: Hub revision of the model.
            trust_remote_code: run model code that comes with the checkpoint, to get its module names.

        Raises:
            AdapterError: the adapter cannot be read, is zero or not finite, is a BufferLoRA, was corrected, holds more than LoRA factors, or
                was trained on another model.
            CheckpointError: the model cannot be read, or is stored quantised.
            SubspaceError: a layer is not in the model, or both rank and tolerance are given.
        """
        return cls(*fit_adapter(model, adapter, rank=rank, tolerance=tolerance, revision=revision, trust_remote_code=trust_remote_code))

    def save(self, path: str | Path, *, plan: str | None = None, left: str | None = None) -> Path:
        """Write one safetensors file with the provenance in its header. The file is either whole or absent.

        Args:
            path: the file.
            plan: the request of the build that the file belongs to; see `build_subspace`.
            left: what is left after a failure, for the message.

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
        """Read a file written by `save`. Tensors are memory-mapped: a layer takes memory only while it is used.

        Raises:
            SubspaceError: the file is missing, truncated, not a safetensors file, not an alignment subspace of this version, or holds
                NaN or infinity. The large tensors are checked for those when they are used.
        """
        name = str(path)
        if not Path(path).is_file():
            raise SubspaceError(f"subspace = {name!r}: no such file; make it with `trl-safety subspace BASE ALIGNED -o {name}`")
        try:
            with safe_open(name, framework="pt") as handle:
                header = (handle.metadata() or {}).get(METADATA_KEY)
                if header is None:
                    raise SubspaceError(
                        f"subspace = {name!r}: is a safetensors file but not an alignment subspace; make one with `trl-safety subspace`"
                    )
                content = json.loads(header)
                version = content["provenance"]["schema_version"]
                if version != SCHEMA_VERSION:
                    again = "make it again with `trl-safety subspace`"
                    wrote = content["provenance"].get("trl_safety")
                    raise SubspaceError(f"subspace = {name!r}: {other_schema(version, SCHEMA_VERSION, wrote, again)}")
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
                provenance = Provenance(**content["provenance"])
            for layer in layers.values():
                layer.check(name)
        except (SafetensorError, OSError, KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
            if isinstance(error, SubspaceError):
                raise
            raise SubspaceError(
                f"subspace = {name!r}: is truncated or not a safetensors file ({error}); make it again with `trl-safety subspace`"
            ) from error
        return cls(layers, provenance)

    @classmethod
    def from_pretrained(cls, source: str | Path, *, revision: str | None = None, token: str | None = None) -> AlignmentSubspace:
        """Load from a file, a folder, or a Hub repository that `push_to_hub` wrote to.

        Raises:
            SubspaceError: there is no subspace there, or it cannot be fetched.
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
                f"subspace = {str(source)!r}: is not a local file, and {HUB_FILE!r} could not be fetched from a Hub repository of that "
                f"name ({reason(error)}); give the path of a subspace file or check the id and your access"
            ) from error

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the file and a card into a folder that `from_pretrained` reads. Returns the file's path; see `save` for errors."""
        path = self.save(Path(folder) / HUB_FILE)
        with replacing(Path(folder) / "README.md", error=SubspaceError, setting="output") as temporary:
            temporary.write_text(self._card(Path(folder).name), encoding="utf-8")
        return path

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, token: str | None = None, revision: str | None = None) -> str:
        """Upload the file with a card, so that others do not need the unaligned base. Returns the commit's URL."""
        import tempfile

        from huggingface_hub import HfApi

        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            (Path(folder) / "README.md").write_text(self._card(repo_id), encoding="utf-8")
            commit = api.upload_folder(repo_id=repo_id, folder_path=folder, revision=revision, commit_message="Upload alignment subspace")
        return str(commit)

    def for_modules(self, names: Iterable[str], skip: Iterable[str] = ()) -> dict[str, LayerSubspace]:
        """The subspace of every adapted module, matched by name whatever prefix a wrapper adds.

        Args:
            names: the adapted modules.
            skip: names or endings of modules to leave out.

        Raises:
            SubspaceError: a module is not in the subspace, or an entry of `skip` matches no module.
        """
        names, skip = list(names), list(skip)
        if unused := [entry for entry in skip if not any(is_named(name, [entry]) for name in names)]:
            raise SubspaceError(f"skip_modules = {unused!r}: matches no adapted module; remove it or correct its name")
        found = match([name for name in names if not is_named(name, skip)], self.layers)
        if missing := [name for name, layer in found.items() if layer is None]:
            shown = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
            remedy = "rebuild the subspace for them (`trl-safety subspace … --adapter A` or --target-modules)"
            if self.provenance.adapter is not None:
                remedy = f"V is {self.provenance.origin}, which has no such layers: use one that has (`trl-safety vector` adapts every linear layer)"
            raise SubspaceError(
                f"{len(missing)} of {len(found)} adapted layers are not in the alignment subspace of {self.provenance.aligned!r}: {shown}. "
                f"They would train unprotected: {remedy}, or list them in skip_modules to leave them alone on purpose"
            )
        if not found:
            raise SubspaceError("skip_modules leaves no adapted layer to protect: remove entries from it")
        return {name: self.layers[layer] for name, layer in found.items() if layer is not None}

    def _card(self, repo_id: str) -> str:
        source = self.provenance
        what = f"What alignment changed from `{source.base}` to `{source.aligned}`"
        if source.adapter is not None:
            what = f"What a LoRA adapter (`{source.adapter}`) that was trained to refuse changes"
        return (
            "---\nlibrary_name: trl-safety\ntags: [trl-safety, alignment-subspace]\n---\n\n"
            f"# Alignment subspace of {source.aligned}\n\n"
            f"{what} in {len(self.layers)} linear layers "
            f"({source.cut}), for trl-safety:\n\n"
            f"```yaml\nsafety:\n  subspace: {repo_id}\n```\n\nand a method that reads it: `trl-safety methods` lists them.\n"
        )
