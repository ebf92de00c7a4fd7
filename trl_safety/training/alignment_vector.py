"""The signed alignment vector after training: a correction, an adapter of its own, and whole checkpoints."""

from __future__ import annotations

import shutil
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor, nn

from trl_safety.adapters.checkpoint import Checkpoint
from trl_safety.adapters.files import new_folder
from trl_safety.adapters.folder import COPIED_SUFFIXES, PEFT_PREFIX, WEIGHTS
from trl_safety.adapters.names import strip_wrappers
from trl_safety.adapters.subspace import AlignmentSubspace, LayerSubspace, same_up_to_rounding, sample
from trl_safety.config import AlignmentVectorConfig, validate
from trl_safety.errors import CheckpointError, ConfigurationError, SubspaceError
from trl_safety.linalg.low_rank import product_norm_squared, truncate_product
from trl_safety.methods import alignment_vector
from trl_safety.training.correction import Correction, CorrectionCallback, LayerInput, LayerResult, apply_correction, on_host, update_config
from trl_safety.training.report import LayerReport, MethodReport, SafetyReport

VOCABULARY = ("embed", "lm_head", "wte")
"""Parts of the names of tensors with a row for every token."""


class AlignmentVectorCorrection(Correction):
    """ΔW ← κ·ΔW + γ·V_k."""

    name = "alignment_vector"
    config: AlignmentVectorConfig

    def __init__(self, config: AlignmentVectorConfig) -> None:
        super().__init__(config)
        self.all_layers = config.all_layers

    def check(self, layers: Mapping[str, LayerSubspace]) -> None:
        """Every layer has singular vectors, and as many as are asked for."""
        for layer in layers.values():
            if layer.left is None:
                raise SubspaceError(
                    f"layer {layer.name!r}: the subspace keeps V whole, of which an adapter of low rank cannot be made; build the subspace with a rank or a "
                    "tolerance, or add the whole V to a merged model with `trl-safety add-vector`"
                )
            if self.config.rank is not None and self.config.rank > layer.rank:
                raise SubspaceError(
                    f"alignment_vector.rank = {self.config.rank}: the subspace has {layer.rank} directions of layer {layer.name!r}; use at most as many, or "
                    "build it with a larger rank"
                )

    def check_ranks(self, ranks: Mapping[str, int], layers: Mapping[str, LayerSubspace]) -> None:
        """A cut that cuts nothing is refused."""
        largest = max(ranks.get(name, 0) + (self.config.rank or layer.rank) for name, layer in layers.items())
        if self.config.cut_to is not None and self.config.cut_to >= largest:
            raise ConfigurationError(
                f"alignment_vector.cut_to = {self.config.cut_to}: the corrected adapter has rank {largest}, so that nothing would be cut; use less, or leave it out"
            )

    def keeps_ranks(self, ranks: Mapping[str, int]) -> bool:
        """Only where it is cut back to what the adapter had, everywhere."""
        return not self.all_layers and all(rank == self.config.cut_to for rank in ranks.values())

    def report(self, results: Mapping[str, LayerResult], summary: str | None = None) -> MethodReport:
        """As of every correction; but taking alignment out, shrinking or DARE alone is no protection by V."""
        report = super().report(results, summary)
        if self.config.gamma > 0:
            return report
        return report.model_copy(
            update={"acted": False, "summary": f"{report.summary}; NOT a protection, with gamma = {self.config.gamma:g}"}
        )

    def run(self, layers: Sequence[LayerInput]) -> dict[str, LayerResult]:
        """Add V to every layer; one transfer to the host."""
        config = self.config
        computed, rows = [], []
        for layer in layers:
            trained_B, trained_A = layer.factors()
            left, sigma, right = layer.subspace.factors()
            U, values, Z = (t.to(trained_B) for t in (left[:, : config.rank], sigma[: config.rank], right[:, : config.rank]))
            source = trained_B
            if config.dare:
                generator = torch.Generator().manual_seed(config.seed + zlib.crc32(layer.name.encode()))
                source = alignment_vector.drop_and_rescale(source, config.dare, generator)
            B, A = alignment_vector.add(source, trained_A, U, values, Z, gamma=config.gamma, kappa=config.kappa, scaling=layer.scaling)
            lost = B.new_zeros(())
            if config.cut_to is not None and config.cut_to < A.shape[0]:
                B, A, lost = truncate_product(B, A, config.cut_to)
            computed.append(layer.cast(B, A))
            squares = torch.stack(
                [
                    product_norm_squared(trained_B, trained_A),
                    values.square().sum() / layer.scaling**2,
                    alignment_vector.inner(trained_B, trained_A, U, values, Z) / layer.scaling,
                    product_norm_squared(B, A),
                    lost,
                ]
            )
            rows.append(squares * layer.scaling**2)
        results = {}
        for layer, factors, (update, vector, inner, corrected, lost) in zip(layers, computed, on_host(rows).tolist(), strict=True):
            measured = {
                "update_norm": max(update, 0.0) ** 0.5,
                "vector_norm": abs(config.gamma) * vector**0.5,
                "vector_share": vector / layer.subspace.frobenius_norm**2,
                "cosine": inner / (update * vector) ** 0.5 if update > 0 and vector > 0 else 0.0,
                "corrected_norm": max(corrected, 0.0) ** 0.5,
                "energy_lost_by_rank": lost / (corrected + lost) if corrected + lost > 0 else 0.0,
            }
            if config.gamma == 0 and config.kappa == 1 and not config.dare:
                report = LayerReport(action="left_alone", reason="gamma is 0 and kappa 1", measured=measured)
                results[layer.name] = LayerResult(report, None)
            else:
                results[layer.name] = LayerResult(LayerReport(action="corrected", measured=measured), factors)
        return results

    def summary(self, results: Mapping[str, LayerReport]) -> str:
        """What was added, how much of V it is, and what the cut cost."""
        corrected = [report for report in results.values() if report.action == "corrected"]
        if not corrected:
            return "gamma is 0 and kappa 1: the adapter is as it was trained"
        update, vector = (sum(report.measured[key] ** 2 for report in corrected) ** 0.5 for key in ("update_norm", "vector_norm"))
        share = sum(report.measured["vector_share"] for report in corrected) / len(corrected)
        text = (
            f"{self.config.gamma:g}·V added to {self.config.kappa:g}·ΔW in {len(corrected)} layers; ‖γV‖ {vector:.3g} beside ‖ΔW‖ {update:.3g}, with {share:.1%} of "
            "V's energy on average"
        )
        if self.config.dare:
            text += f"; DARE dropped {self.config.dare:.0%} of B's entries"
        if self.config.cut_to is not None:
            text += f"; cut back to rank {self.config.cut_to}, at most {max(r.measured['energy_lost_by_rank'] for r in corrected):.2%} of a layer's energy lost"
        return text


class AlignmentVectorCallback(CorrectionCallback):
    """Add the alignment vector at the end of training, for any Transformers `Trainer` on a PEFT model.

    Known as RESTA (arXiv 2402.11746). Differs from it in acting on the adapter, of rank r + k then, where that rewrites a merged
    model's weights.

    Args:
        subspace: an `AlignmentSubspace` with a rank, its file, or a Hub id.
        gamma: γ.
        kappa: κ.
        rank: k, of the subspace's directions; default all.
        cut_to: rank to cut the corrected adapter back to; default none.
        all_layers: also add V to layers of the subspace that the adapter does not have.
        dare: share of B's entries that DARE drops.
        seed: of DARE.
        skip_modules: modules to leave alone.
        corrected_checkpoints: write a corrected copy into each checkpoint.

    Raises:
        ConfigurationError: an option is out of bounds.
        SubspaceError: the subspace cannot be read.
    """

    def __init__(
        self,
        subspace: AlignmentSubspace | str | Path,
        *,
        gamma: float = 1.0,
        kappa: float = 1.0,
        rank: int | None = None,
        cut_to: int | None = None,
        all_layers: bool = False,
        dare: float = 0.0,
        seed: int = 0,
        skip_modules: Iterable[str] = (),
        corrected_checkpoints: bool = False,
    ) -> None:
        options = {"gamma": gamma, "kappa": kappa, "rank": rank, "cut_to": cut_to, "all_layers": all_layers, "dare": dare, "seed": seed}
        config = validate(AlignmentVectorConfig, {**options, "corrected_checkpoints": corrected_checkpoints}, "alignment_vector")
        super().__init__(subspace, AlignmentVectorCorrection(config), skip_modules)


def apply_alignment_vector(
    model: nn.Module,
    subspace: AlignmentSubspace,
    *,
    gamma: float = 1.0,
    kappa: float = 1.0,
    rank: int | None = None,
    cut_to: int | None = None,
    all_layers: bool = False,
    dare: float = 0.0,
    seed: int = 0,
    skip_modules: Iterable[str] = (),
    adapter: str | None = None,
) -> SafetyReport:
    """ΔW ← κ·ΔW + γ·V_k on a PEFT model's adapter, in place; the next save writes its report, too.

    Options as in `AlignmentVectorCallback`.

    Returns:
        What was measured and done, layer by layer.

    Raises:
        AdapterError: no adapter, an unsupported kind, another model's, or one that was corrected before.
        SubspaceError: an adapted layer is not in the subspace, or the subspace has too few directions.
        ConfigurationError: an option is out of bounds.
    """
    options = {"gamma": gamma, "kappa": kappa, "rank": rank, "cut_to": cut_to, "all_layers": all_layers, "dare": dare, "seed": seed}
    correction = AlignmentVectorCorrection(validate(AlignmentVectorConfig, options, "alignment_vector"))
    return apply_correction(model, subspace, correction, skip_modules, adapter)


def write_alignment_adapter(subspace: AlignmentSubspace, output: str | Path, *, gamma: float = 1.0, rank: int | None = None) -> None:
    """Write γ·V_k as a LoRA adapter of its own, to be switched on beside a user's: `load_adapter`, then both active.

    Args:
        subspace: with a rank.
        output: a new or empty folder.
        gamma: γ, above 0.
        rank: k, of the subspace's directions; default all.

    Raises:
        SubspaceError: the subspace keeps V whole or has too few directions.
        ConfigurationError: γ is not above 0.
    """
    if gamma <= 0:
        raise ConfigurationError(f"gamma = {gamma:g}: the adapter would do nothing, or take alignment out; use 1, say")
    config = validate(AlignmentVectorConfig, {"gamma": gamma, "rank": rank}, "alignment_vector")
    AlignmentVectorCorrection(config).check(subspace.layers)
    ranks = {name: rank or layer.rank for name, layer in subspace.layers.items()}
    lora = LoraConfig(
        r=max(ranks.values()),
        lora_alpha=max(ranks.values()),
        target_modules=set(ranks),
        fan_in_fan_out=any(layer.transposed for layer in subspace.layers.values()),
        base_model_name_or_path=subspace.provenance.aligned,
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
    if len(set(ranks.values())) > 1:
        update_config(lora, None, {name: (k, 1.0) for name, k in ranks.items()})
    tensors = {}
    for name, layer in subspace.layers.items():
        left, values, right = (t.float() for t in layer.factors())
        empty = torch.zeros(layer.shape[0], 0), torch.zeros(0, layer.shape[1])
        k = ranks[name]
        B, A = alignment_vector.add(*empty, left[:, :k], values[:k], right[:, :k], gamma=gamma, kappa=1.0, scaling=1.0)
        tensors[f"{PEFT_PREFIX}{name}.lora_A.weight"], tensors[f"{PEFT_PREFIX}{name}.lora_B.weight"] = A.contiguous(), B.contiguous()
    with new_folder(Path(output), error=ConfigurationError, setting="output") as folder:
        save_file(tensors, str(folder / WEIGHTS), metadata={"format": "pt"})
        lora.save_pretrained(str(folder))


def add_vector(
    model: str | Path, base: str | Path, aligned: str | Path, output: str | Path, *, gamma: float = 1.0, kappa: float = 1.0
) -> list[str]:
    """W ← W_aligned + κ·(W − W_aligned) + γ·(W_aligned − W_base) on a whole checkpoint, file by file; V is not cut.

    RESTA (arXiv 2402.11746) as published, for a model that an adapter was merged into or that was fine-tuned in full. Where the
    vocabularies differ, the rows that all three have take part; further rows stay.

    Args:
        model: the fine-tuned model: folder or Hub id, full precision, safetensors.
        base: the unaligned model.
        aligned: the aligned model that was fine-tuned.
        output: a new or empty folder, which gets the model's other files, too.
        gamma: γ.
        kappa: κ.

    Returns:
        Names of the tensors that one of the pair does not have, and that stay as they are.

    Raises:
        CheckpointError: one of the three cannot be read, is quantised, has another architecture, or no tensor is in all of them.
        ConfigurationError: nothing would change, alignment would be taken out, or the output cannot be written.
    """
    if gamma == 0 and kappa == 1:
        raise ConfigurationError("gamma = 0 and kappa = 1: the model would stay as it is; set one of them")
    source, pair = Checkpoint(model), (Checkpoint(base), Checkpoint(aligned))
    stored = [{strip_wrappers(name): name for name in checkpoint.names} for checkpoint in pair]
    if gamma < 0:
        raise ConfigurationError(f"gamma = {gamma:g}: would take alignment out of the model; use 1, say")
    missing, differs = [], False
    to_base = to_aligned = 0.0
    files: dict[str, list[str]] = {}
    for name in source.names:
        files.setdefault(source.file_of(name), []).append(name)
    with new_folder(Path(output), error=ConfigurationError, setting="output") as folder:
        for file, names in files.items():
            tensors = {}
            for name in names:
                weight = source.tensor(name)
                places = [known.get(strip_wrappers(name)) for known in stored]
                if places[0] is None or places[1] is None:
                    missing.append(name)
                    tensors[name] = weight
                    continue
                unaligned, before = (checkpoint.tensor(place) for checkpoint, place in zip(pair, places, strict=True) if place)
                differs |= unaligned.shape != before.shape or not same_up_to_rounding(unaligned, before)
                if weight.shape == unaligned.shape == before.shape:
                    entries, *others = (sample(tensor).double() for tensor in (weight, unaligned, before))
                    to_base, to_aligned = (
                        total + float((entries - other).square().sum()) for total, other in zip((to_base, to_aligned), others, strict=True)
                    )
                tensors[name] = _added(name, weight, unaligned, before, gamma, kappa)
            save_file(tensors, str(folder / file), metadata={"format": "pt"})
        if len(missing) == len(source.names):
            raise CheckpointError(
                f"none of {str(model)!r}'s tensors is in both {str(base)!r} and {str(aligned)!r}: name the pair of this model"
            )
        if not differs:
            raise CheckpointError(f"base = {str(base)!r} and aligned = {str(aligned)!r} do not differ by more than rounding: V would be nothing")
        if to_base < to_aligned:
            raise CheckpointError(
                f"base = {str(base)!r} is nearer to the model than aligned = {str(aligned)!r}, so that alignment would be taken out: name the two in their "
                "right places"
            )
        local = Path(model)
        for path in local.iterdir() if local.is_dir() else ():
            if path.is_file() and path.suffix in COPIED_SUFFIXES:
                shutil.copyfile(path, folder / path.name)
        if not local.is_dir():
            _copy_from_hub(str(model), folder)
    return missing


def _added(name: str, weight: Tensor, base: Tensor, aligned: Tensor, gamma: float, kappa: float) -> Tensor:
    if weight.shape[1:] != aligned.shape[1:] or weight.shape[1:] != base.shape[1:] or weight.ndim == 0:
        raise CheckpointError(
            f"tensor {name!r} is {list(weight.shape)} in the model, {list(aligned.shape)} in the aligned and {list(base.shape)} in the base model: name the pair "
            "of this model"
        )
    rows = min(len(weight), len(aligned), len(base))
    if not len(weight) == len(aligned) == len(base) and not any(part in name for part in VOCABULARY):
        raise CheckpointError(
            f"tensor {name!r} has {len(weight)} rows in the model, {len(aligned)} in the aligned and {len(base)} in the base model: name the pair of this model"
        )
    result = weight.clone()
    one, before, unaligned = (tensor[:rows].float() for tensor in (weight, aligned, base))
    result[:rows] = (before + kappa * (one - before) + gamma * (before - unaligned)).to(weight.dtype)
    return result


def _copy_from_hub(source: str, folder: Path) -> None:
    from huggingface_hub import snapshot_download

    patterns = [f"*{suffix}" for suffix in COPIED_SUFFIXES]
    for path in Path(snapshot_download(source, allow_patterns=patterns)).iterdir():
        if path.is_file() and path.suffix in COPIED_SUFFIXES:
            shutil.copyfile(path, folder / path.name)
