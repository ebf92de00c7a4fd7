"""The merge of a user's adapter with a ReinforceLoRA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from trl_safety.adapters.files import sha256
from trl_safety.adapters.fingerprint import NOT_VERIFIED
from trl_safety.adapters.folder import WEIGHTS, AdapterFolder, Factors
from trl_safety.adapters.frozen import FrozenAdapter
from trl_safety.adapters.lora import LoraModule, adapter_config, unwrap
from trl_safety.adapters.marks import marks, refuse_provider
from trl_safety.adapters.names import match, strip_wrappers
from trl_safety.adapters.record import RECORD, AdapterRecord, open_kind
from trl_safety.config.block import options_class
from trl_safety.config.buffer_reinforce import ReinforceMergeConfig
from trl_safety.config.options import validate
from trl_safety.corrections.base import Bound, Correction, LayerInput, LayerResult, continued, on_host, working_factors
from trl_safety.corrections.prepared import Prepared
from trl_safety.corrections.registry import correct
from trl_safety.errors import AdapterError, ConfigurationError
from trl_safety.linalg.low_rank import product_norm_squared, truncate_product
from trl_safety.methods import buffer_reinforce
from trl_safety.reports.report import LayerReport, MethodReport, SafetyReport
from trl_safety.subspace.artifact import AlignmentSubspace
from trl_safety.subspace.layer import LayerSubspace

NAME = "buffer_reinforce"

USER_ADAPTER = Path("safety") / "user_adapter"
"""The place in the output folder of the user's adapter as it was before the merge."""

PENDING = "; the merge with the ReinforceLoRA is still to come"

MEASURES = ("update_norm", "reinforce_norm", "removed_share", "kept_directions", "merged_norm", "lost_norm")


@dataclass(frozen=True)
class Merge:
    """One layer of the merged adapter: factors for the layer's scaling, and what was measured."""

    B: Tensor
    A: Tensor
    scaling: float
    report: LayerReport


def merge_layers(
    user: Mapping[str, Factors],
    reinforce: Mapping[str, Factors],
    config: ReinforceMergeConfig,
    scalings: Mapping[str, float],
    device: torch.device,
) -> dict[str, Merge]:
    """Merge W_U and W_R in every layer that either has: w_U·W_U + w_R·(I − αQQᵀ)·W_R, in float64.

    Args:
        user: the user's factors by module.
        reinforce: the ReinforceLoRA's, under the user's module names.
        config: weights, α, τ and rank.
        scalings: PEFT's scaling of the merged adapter, by module.
        device: where to compute.
    """
    merged: dict[str, tuple[Tensor, Tensor]] = {}
    rows = []
    for name, scaling in scalings.items():
        one, other = (_on(device, factors.get(name), like) for factors, like in ((user, reinforce.get(name)), (reinforce, user.get(name))))
        Q, kept = buffer_reinforce.user_directions(*one[:2], config.collapse_threshold)
        projected = buffer_reinforce.orthogonalise(other[0], Q, config.alpha)
        B, A = buffer_reinforce.concatenate(
            (*one[:2], config.user_weight * one[2]), (projected, other[1], config.reinforce_weight * other[2]), scaling
        )
        lost = B.new_zeros(())
        if config.rank is not None and config.rank < A.shape[0]:
            B, A, lost = truncate_product(B, A, config.rank)
        merged[name] = B, A
        squares = [product_norm_squared(*pair) for pair in (one[:2], other[:2], (projected, other[1]), (B, A))]
        norms = [(value.clamp(min=0).sqrt() * factor) for value, factor in zip(squares, (one[2], other[2], other[2], scaling), strict=True)]
        left = torch.where(squares[1] > 0, squares[2] / squares[1].clamp(min=1e-300), 1)
        rows.append(torch.stack([norms[0], norms[1], 1 - left, kept.to(B), norms[3], lost.clamp(min=0).sqrt() * scaling]))
    result = {}
    for (name, (B, A)), row in zip(merged.items(), on_host(rows).tolist(), strict=True):
        measured = dict(zip(MEASURES, row, strict=True))
        missing = "the user's adapter" if name not in user else "the ReinforceLoRA" if name not in reinforce else None
        report = LayerReport(action="merged", reason=f"not in {missing}" if missing else None, measured=measured)
        result[name] = Merge(B, A, scalings[name], report)
    return result


def _on(device: torch.device, factors: Factors | None, like: Factors | None) -> tuple[Tensor, Tensor, float]:
    """Factors in working precision; zeros of rank 0 if the adapter does not have the layer."""
    if factors is not None:
        return *working_factors(factors.B.to(device), factors.A.to(device)), factors.scaling
    assert like is not None  # noqa: S101  # one of the two has the layer
    return (
        torch.zeros(like.shape[0], 0, dtype=torch.float64, device=device),
        torch.zeros(0, like.shape[1], dtype=torch.float64, device=device),
        like.scaling,
    )


def merge_summary(merges: Mapping[str, Merge], config: ReinforceMergeConfig, user: Mapping[str, Factors]) -> str:
    """One sentence that says what was merged."""
    ranks = sorted({merge.A.shape[0] for merge in merges.values()})
    collapsed = [
        name for name, merge in merges.items() if name in user and merge.report.measured["kept_directions"] < user[name].A.shape[0]
    ]
    lost = sum(merge.report.measured["lost_norm"] ** 2 for merge in merges.values())
    whole = sum(merge.report.measured["merged_norm"] ** 2 for merge in merges.values()) + lost
    text = (
        f"merged with the ReinforceLoRA in {len(merges)} layers (α {config.alpha:g}, weights {config.user_weight:g} and {config.reinforce_weight:g}), "
        f"rank {ranks[0]}{f' to {ranks[-1]}' if len(ranks) > 1 else ''}"
    )
    if collapsed:
        text += f"; in {len(collapsed)} layers the user's update has collapsed to fewer directions than its rank"
    if config.rank is not None:
        text += f"; the cut to rank {config.rank} lost {lost / whole if whole else 0:.2%} of the energy"
    return text


class ReinforceMerge(Correction):
    """W_U → w_U·W_U + w_R·(I − αQQᵀ)·W_R, in every layer that either adapter has.

    Differs from the authors' code in two ways: it writes an adapter of rank r_U + r_R instead of a whole merged model, and it also merges
    layers that only one of the two adapters has.

    Raises:
        ConfigurationError: no ReinforceLoRA is named.
        AdapterError: it cannot be read, or is not a ReinforceLoRA.
    """

    name = NAME
    keeps_uncorrected = USER_ADAPTER
    config: ReinforceMergeConfig

    def __init__(self, config: ReinforceMergeConfig) -> None:
        super().__init__(config)
        if config.reinforce is None:
            raise ConfigurationError(f"{NAME}.reinforce is missing: the merge needs a ReinforceLoRA; name its folder or Hub id")
        self._setting = f"{NAME}.reinforce = {config.reinforce!r}"
        self.folder, self.record = open_kind(config.reinforce, "reinforce", f"{NAME}.reinforce")
        self._factors: dict[str, Factors] = {}
        """The ReinforceLoRA's factors, under the names that the user's adapter uses for its layers."""
        self._text = ""

    def accept(self, config: Any, where: str) -> None:
        """Accept a corrected adapter, but not a provider's, one that was merged before, or one whose correction the merge would scale down."""
        refuse_provider(config, where)
        for name in marks(config):
            if name == NAME:
                raise AdapterError(
                    f"{where}: was already merged with a ReinforceLoRA: give the user's adapter alone ({USER_ADAPTER} of the run)"
                )
            if options_class(name).loses_by_scaling:
                raise AdapterError(
                    f"{where}: contains the {name.replace('_', ' ')}, which the merge would scale down: merge the adapter without it"
                )
        if config.lora_bias:
            raise AdapterError(f"{where}: lora_bias = True: the biases of lora_B cannot be merged; train without lora_bias")

    def bind(self, folder: AdapterFolder, subspace: AlignmentSubspace | None, skip_modules: Sequence[str], setting: str) -> Bound:
        """See `Correction.bind`.

        Raises:
            ConfigurationError: `skip_modules` is given, or the rank would cut nothing.
            AdapterError: the two adapters are for different models.
        """
        self._refuse_skipping(skip_modules)
        base_check = _same_base(folder, self.record, self._setting)
        self._factors = _under_user_names(self.folder, folder.factors, self._setting)
        check_rank(self.config, folder.factors, self._factors)
        further = {
            name: Factors(like.B[:, :0].to(like.B.dtype), like.A[:0], like.scaling)
            for name, like in self._factors.items()
            if name not in folder.factors
        }
        return Bound(dict.fromkeys([*folder.factors, *further]), further, base_check, {})

    def check_layers(self, layers: Mapping[str, Any]) -> None:
        """See `Correction.check_layers`."""
        recorded = match(self.record.samples, layers)
        self.record.check_layers({name: layers[found] for name, found in recorded.items() if found}, self._setting)

    def check_live(self, model: nn.Module, prepared: Prepared, subspace: AlignmentSubspace | None, skip_modules: Sequence[str]) -> None:
        """See `Correction.check_live`.

        Raises:
            ConfigurationError: `skip_modules` is given, or the rank would cut nothing.
            AdapterError: the ReinforceLoRA is for another model, or its layers cannot be added to the user's adapter.
        """
        self._refuse_skipping(skip_modules)
        checked = self.record.check_layers(FrozenAdapter(model, self.folder.factors, self._setting).layers, self._setting)
        if subspace is None:
            prepared.base_check = checked
        user = {module.name: _factors(module) for module in prepared.modules}
        self._factors = _under_user_names(self.folder, user, self._setting)
        check_rank(self.config, user, self._factors)
        if not isinstance(unwrap(model), PeftModel):
            raise AdapterError(
                f"{type(unwrap(model)).__name__} has an adapter but is not a PeftModel, which the merge needs: pass peft_config to the trainer, or a "
                "PeftModel"
            )
        extra = [name for name in self._factors if name not in user]
        whole = adapter_config(model, prepared.adapter).modules_to_save
        if extra and whole:
            raise AdapterError(
                f"modules_to_save = {whole!r}: the ReinforceLoRA also adapts {extra[0]!r}, which cannot be added to an adapter with whole "
                "modules; add that layer to target_modules, or merge the saved adapters with `trl-safety merge-reinforce`"
            )

    def _refuse_skipping(self, skip_modules: Sequence[str]) -> None:
        if skip_modules:
            raise ConfigurationError(
                f"skip_modules = {list(skip_modules)!r}: {NAME} acts on the whole model and cannot leave layers alone; remove one of the two"
            )

    def further_layers(
        self, model: nn.Module, prepared: Prepared, subspace: AlignmentSubspace | None, skip_modules: Sequence[str]
    ) -> dict[str, LayerSubspace | None]:
        """The layers that the ReinforceLoRA has and the user's adapter does not."""
        user = {module.name for module in prepared.modules}
        return {name: None for name in self._factors if name not in user}

    def keeps_ranks(self, ranks: Mapping[str, int]) -> bool:
        """Never: the merged adapter's rank is the sum of both."""
        return False

    def run(self, layers: Sequence[LayerInput]) -> dict[str, LayerResult]:
        """Merge every layer, in float64."""
        user = {layer.name: Factors(*layer.stored, layer.scaling) for layer in layers if layer.stored[1].shape[0]}
        merges = merge_layers(user, self._factors, self.config, {layer.name: layer.scaling for layer in layers}, layers[0].device)
        self._text = merge_summary(merges, self.config, user)
        return {
            layer.name: LayerResult(merges[layer.name].report, layer.cast(merges[layer.name].B, merges[layer.name].A)) for layer in layers
        }

    def summary(self, results: Mapping[str, LayerReport]) -> str:
        """What the last `run` did."""
        return self._text

    def reports(self, earlier: Sequence[MethodReport], results: Mapping[str, LayerResult] | None) -> list[MethodReport]:
        """The reports of the methods that acted before; the merge's report continues the buffer's, if there is one."""
        trained = next((method for method in earlier if method.name == NAME), None)
        if results is None:
            return super().reports(earlier, None) if trained is None else list(earlier)
        own = self.report(results)
        own.settings["reinforce_sha256"] = sha256(self.folder.path / WEIGHTS)
        return continued(own, earlier, PENDING, "the user's adapter has no report on a buffer")

    def not_done(self, earlier: Sequence[MethodReport], why: str) -> list[MethodReport]:
        """See `Correction.not_done`; the buffer's report no longer says that the merge is still to come."""
        said = [method.model_copy(update={"summary": method.summary.removesuffix(PENDING)}) for method in earlier]
        return super().not_done(said, why)


def merge_reinforce(
    user: str | Path,
    reinforce: str | Path,
    output: str | Path,
    *,
    alpha: float = 0.1,
    user_weight: float = 0.5,
    reinforce_weight: float = 0.5,
    rank: int | None = None,
    collapse_threshold: float = 0.01,
    device: str | torch.device | None = None,
) -> SafetyReport:
    """Merge a saved user's adapter with a saved ReinforceLoRA into one ordinary adapter, without loading a model.

    W_final = W + w_U·W_U + w_R·(I − αQQᵀ)·W_R (arXiv 2605.24550, Section 4.3). Differs from the authors' code in two ways: it writes
    an adapter of rank r_U + r_R instead of a whole merged model, and it also merges layers that only one of the two adapters has.

    Args:
        user: the user's adapter, trained with the buffer or not; corrected or not. It is never changed.
        reinforce: folder or Hub id of a ReinforceLoRA made by `trl-safety reinforce`.
        output: a new or empty folder.
        alpha: α.
        user_weight: w_U.
        reinforce_weight: w_R.
        rank: truncate the merged adapter to this rank.
        collapse_threshold: τ.
        device: where to compute; a GPU by default if there is one.

    Raises:
        AdapterError: an adapter is missing, of the wrong kind, for another base model, or was merged before; or the output cannot
            be written.
        ConfigurationError: an option is out of range.
    """
    options = {"alpha": alpha, "user_weight": user_weight, "reinforce_weight": reinforce_weight, "rank": rank}
    given = {**options, "collapse_threshold": collapse_threshold, "reinforce": str(reinforce)}
    return correct(user, None, validate(ReinforceMergeConfig, given, "merge-reinforce"), output=output, device=device)


def _under_user_names(other: AdapterFolder, user: Mapping[str, Factors], setting: str) -> dict[str, Factors]:
    """The ReinforceLoRA's factors under the names that the user's adapter uses for its layers."""
    found = match(other.factors, user)
    loose = [name for name, to in found.items() if to is not None and strip_wrappers(to) != name]
    missing = [name for name, to in found.items() if to is None]
    if loose and missing:
        raise AdapterError(
            f"{setting}: its layer {loose[0]!r} has another name in the user's adapter ({found[loose[0]]!r}), and it has further layers ({missing[0]!r}) whose "
            "names in the user's model are not known: train both with the same model class"
        )
    result = {}
    for name, to in found.items():
        factors = other.factors[name]
        if to is not None and factors.shape != user[to].shape:
            raise AdapterError(
                f"{setting}: its layer {name!r} is {factors.shape}, but {user[to].shape} in the user's adapter: they are for different models"
            )
        result[to or name] = factors
    return result


def check_rank(config: ReinforceMergeConfig, user: Mapping[str, Factors], reinforce: Mapping[str, Factors]) -> None:
    """Refuse a rank that would cut nothing.

    Raises:
        ConfigurationError: no layer of the merged adapter would have a larger rank.
    """
    ranks = [sum(part[name].A.shape[0] for part in (user, reinforce) if name in part) for name in {**user, **reinforce}]
    if config.rank is not None and config.rank >= max(ranks):
        raise ConfigurationError(
            f"rank = {config.rank}: the merged adapter has rank {max(ranks)}, so nothing would be cut; use less, or remove it"
        )


def _same_base(folder: AdapterFolder, record: AdapterRecord, setting: str) -> str:
    """Compare the models that the two adapters were trained on, as far as that can be done without a network."""
    if (folder.path / RECORD).is_file():
        return record.check_record(AdapterRecord.read(folder.path), setting, f"the user's {folder.config.base_model_name_or_path!r}")
    base = folder.config.base_model_name_or_path
    if base and Path(base).is_dir():
        return record.check_checkpoint(base, setting)
    if base and base == record.base_model:
        return f"{base}, whose name is that of the ReinforceLoRA's own base model"
    return f"{NOT_VERIFIED}: {base or 'no name in the adapter'} is not available here; the ReinforceLoRA was trained on {record.base_model}; shapes match"


def _factors(module: LoraModule) -> Factors:
    return Factors(module.B.detach(), module.A.detach(), module.scaling)
