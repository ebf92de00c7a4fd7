"""What every correction of a trained adapter shares: on a live model, on a saved folder, and as a Trainer callback."""

from __future__ import annotations

import copy
import logging
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import TrainerCallback

from trl_safety.adapters.checkpoint import Checkpoint
from trl_safety.adapters.folder import AdapterFolder
from trl_safety.adapters.lora import (
    MARK_PREFIX,
    NOT_VERIFIED,
    LoraModule,
    Recognition,
    adapter_config,
    adapter_name,
    check_shape,
    extend_adapter,
    full_precision,
    linear_layers,
    linear_shape,
    lora_modules,
    not_covered,
    refuse_corrected,
    refuse_provider,
    target,
    unwrap,
    verify_base,
)
from trl_safety.adapters.names import is_named, match
from trl_safety.adapters.shards import put, settle, sharded, whole
from trl_safety.adapters.subspace import FULL_PRECISION_DIFFERENCE, QUANTISED_DIFFERENCE, AlignmentSubspace, LayerSubspace
from trl_safety.config import CorrectionConfig
from trl_safety.errors import AdapterError, ConfigurationError, SubspaceError
from trl_safety.training.engines import check_engine
from trl_safety.training.report import (
    REPORT,
    SOURCES,
    LayerReport,
    MethodReport,
    SafetyReport,
    describe_subspace,
    describes,
    fingerprints,
    read_report,
    with_section,
)
from trl_safety.training.report_source import adapter_folder, report_source

logger = logging.getLogger(__name__)

CORRECTED_COPY = Path("safety") / "corrected"
"""Two levels down: Transformers takes a folder with an adapter directly inside a checkpoint for a second adapter of the model."""
RUN_CORRECTION = "trl_safety_correction"
"""Attribute of a run's `TrainerState`: its correction callback."""
BASE_LAYERS_SAMPLED = 8
QUANTISED_LAYERS_SAMPLED = 64
"""Each tells little through the rounding."""


@dataclass(frozen=True)
class LayerInput:
    """One trained layer: ΔW = scaling · B · A with B (out, r) and A (r, in), as they are stored, and its alignment subspace."""

    name: str
    stored: tuple[Tensor, Tensor]
    scaling: float
    subspace: LayerSubspace
    device: torch.device

    def factors(self) -> tuple[Tensor, Tensor]:
        """B and A to compute with; made anew at every call, so that no two layers' are held."""
        B, A = self.stored
        return working_factors(B.to(self.device), A.to(self.device))

    def cast(self, B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
        """New factors in the dtype and on the device of those that they replace."""
        return B.to(self.stored[0]), A.to(self.stored[1])


@dataclass(frozen=True)
class LayerResult:
    """What a correction did to one layer; `factors` is None where it left the layer alone."""

    report: LayerReport
    factors: tuple[Tensor, Tensor] | None


class Correction(ABC):
    """A correction of a trained adapter: all layers in, all layers out, without model or trainer."""

    name: str
    reconstruction = False
    all_layers = False
    """Whether it also acts on layers of the subspace that the adapter does not have."""

    def __init__(self, config: CorrectionConfig) -> None:
        self.config = config

    @abstractmethod
    def check(self, layers: Mapping[str, LayerSubspace]) -> None:
        """Raise where the correction could not act on these subspaces."""

    def check_ranks(self, ranks: Mapping[str, int], layers: Mapping[str, LayerSubspace]) -> None:  # noqa: B027  # most accept any
        """Raise where the correction could not act on an adapter of these ranks; `layers` are all that it acts on, by module."""

    def keeps_ranks(self, ranks: Mapping[str, int]) -> bool:
        """Whether an adapter of these ranks has the same ones afterwards."""
        return True

    @abstractmethod
    def run(self, layers: Sequence[LayerInput]) -> dict[str, LayerResult]:
        """Correct every layer."""

    @abstractmethod
    def summary(self, results: Mapping[str, LayerReport]) -> str:
        """One sentence on what was done."""

    def report(self, results: Mapping[str, LayerResult], summary: str | None = None) -> MethodReport:
        """The method's part of the safety report."""
        layers = {name: result.report for name, result in results.items()}
        return MethodReport(
            name=self.name,
            source=SOURCES[self.name],
            reconstruction=self.reconstruction,
            settings=self.config.model_dump(),
            acted=any(layer.action == "corrected" for layer in layers.values()),
            summary=summary or self.summary(layers),
            layers=layers,
        )


def working_factors(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """Factors in float64, on their device: a trained adapter is small, and the Grams square the condition number."""
    return B.detach().double(), A.detach().double()


def on_host(rows: Sequence[Tensor]) -> Tensor:
    """Every layer's measurements as one table, in one transfer."""
    return torch.stack([row.to(rows[0].device) for row in rows]).cpu()


@dataclass
class Prepared:
    """A model's adapter, checked and matched with its subspaces before training or correction."""

    adapter: str
    modules: list[LoraModule]
    subspaces: dict[str, LayerSubspace]
    skipped: dict[str, str]
    base_check: str
    base_model: str | None
    outside: list[str]

    @property
    def covered(self) -> list[LoraModule]:
        """The modules that the methods act on."""
        return [module for module in self.modules if module.name not in self.skipped]

    def report(self, subspace: AlignmentSubspace | None, methods: list[MethodReport], *, final: bool) -> SafetyReport:
        """The adapter's safety report."""
        return SafetyReport(
            stage="final" if final else "training",
            protected=any(method.acted for method in methods),
            base_model=self.base_model,
            base_check=self.base_check,
            subspace=describe_subspace(subspace),
            methods=methods,
            skipped=self.skipped,
            not_covered=self.outside,
        )


def prepare(model: nn.Module, subspace: AlignmentSubspace | None, skip_modules: Iterable[str] = (), adapter: str | None = None) -> Prepared:
    """Check that the methods will be able to act on a model's adapter.

    Without a subspace there is nothing to compare the base model with, and every adapted layer is covered.

    Raises:
        AdapterError: no adapter, an unsupported kind, one that was corrected before, or a base that is not the aligned model.
        SubspaceError: an adapted layer is not in the subspace, or an entry of `skip_modules` matches nothing.
    """
    skip_modules = list(skip_modules)
    adapter = adapter_name(model, adapter)
    modules = lora_modules(model, adapter)
    config = adapter_config(model, adapter)
    for name, other in cast(Any, unwrap(model)).peft_config.items():
        # PEFT saves every adapter that is loaded, not the active one alone.
        refuse_provider(other, f"adapter {name!r} of the model")
    refuse_corrected(config, f"adapter {adapter!r}")
    subspaces = subspace.for_modules([module.name for module in modules], skip_modules) if subspace else {}
    base_check = verify_base(modules, subspaces) if subspace else f"{NOT_VERIFIED}: no method of the run needs the aligned model's weights"
    covered = [module for module in modules if subspace is None or module.name in subspaces]
    return Prepared(
        adapter=adapter,
        modules=modules,
        subspaces=subspaces,
        skipped={module.name: f"skip_modules: {is_named(module.name, skip_modules)}" for module in modules if module not in covered},
        base_check=base_check,
        base_model=config.base_model_name_or_path or getattr(getattr(unwrap(model), "config", None), "name_or_path", None),
        outside=not_covered(model, covered),
    )


@torch.no_grad()
def correct_model(
    model: nn.Module,
    subspace: AlignmentSubspace,
    correction: Correction,
    prepared: Prepared,
    others: Sequence[MethodReport] = (),
    skip_modules: Iterable[str] = (),
) -> SafetyReport:
    """Correct a model's adapter in place, mark it, and make every later save write the report, with that of other methods."""
    model = unwrap(model)
    settle(model)
    # The user's own LoraConfig object, which may serve another run, stays as it is.
    config = copy.deepcopy(adapter_config(model, prepared.adapter))
    cast(Any, model).peft_config[prepared.adapter] = config
    further = _further_layers(model, subspace, correction, prepared, skip_modules)
    if further:
        extend_adapter(model, prepared.adapter, further)
        prepared.modules = lora_modules(model, prepared.adapter)
        prepared.subspaces = {**prepared.subspaces, **further}
    results = correction.run(
        [LayerInput(m.name, _trained(m, further), m.scaling, prepared.subspaces[m.name], m.B.device) for m in prepared.covered]
    )
    if sharded(model):
        # GPUs may round a cosine at the threshold, or a singular vector's sign, one way and the other: the first process decides.
        acted = [[name for name, result in results.items() if result.factors is not None]]
        torch.distributed.broadcast_object_list(acted, src=0)
        results = {
            module.name: LayerResult(
                results[module.name].report,
                (results[module.name].factors or _trained(module, further)) if module.name in acted[0] else None,
            )
            for module in prepared.covered
        }
    reshaped = bool(further)
    for module in prepared.modules:
        factors = results[module.name].factors if module.name in results else None
        if factors is None:
            continue
        B, A = factors
        if A.shape == module.A.shape:
            put(module.B, B, source=0)
            put(module.A, A, source=0)
        else:
            module.replace(B, A)
            reshaped = True
    scalings = {module.name: (int(module.A.shape[0]), module.scaling) for module in prepared.modules}
    update_config(config, correction.name if _acted(results) else None, scalings if reshaped else {})
    report = prepared.report(subspace, [*others, correction.report(results)], final=True)
    report_source(model, prepared.adapter).freeze(model, report)
    return report


def _trained(module: LoraModule, further: Mapping[str, object]) -> tuple[Tensor, Tensor]:
    """What training made of a layer: factors of rank 0 where it was not the adapter's."""
    B, A = whole(module.B).detach(), whole(module.A).detach()
    return (B[:, :0], A[:0]) if module.name in further else (B, A)


def apply_correction(
    model: nn.Module, subspace: AlignmentSubspace, correction: Correction, skip_modules: Iterable[str], adapter: str | None
) -> SafetyReport:
    """Check a model's adapter and correct it in place; what `apply_safe_lora` and its like do after reading their options."""
    prepared = prepare(model, subspace, skip_modules, adapter)
    check_correction(model, subspace, correction, prepared, skip_modules)
    return correct_model(model, subspace, correction, prepared, skip_modules=skip_modules)


def check_correction(
    model: nn.Module, subspace: AlignmentSubspace, correction: Correction, prepared: Prepared, skip_modules: Iterable[str]
) -> None:
    """Raise where a correction will not be able to act on a live model; see `prepare`."""
    layers = {**prepared.subspaces, **_further_layers(model, subspace, correction, prepared, skip_modules)}
    correction.check(layers)
    ranks = {module.name: int(module.A.shape[0]) for module in prepared.covered}
    correction.check_ranks(ranks, layers)
    if sharded(model) and not correction.keeps_ranks(ranks):
        remedy = f"cut it back to the adapter's own rank, or correct the saved adapter with `trl-safety correct --method {correction.name}`"
        raise ConfigurationError(f"{correction.name}: changes the adapter's rank, which FSDP's shards do not allow; {remedy}")


def _further_layers(
    model: nn.Module, subspace: AlignmentSubspace, correction: Correction, prepared: Prepared, skip_modules: Iterable[str]
) -> dict[str, LayerSubspace]:
    """The layers besides the adapter's that a correction acts on, by the model's names, checked to be the aligned model's."""
    if not correction.all_layers:
        return {}
    config, skip_modules = adapter_config(model, prepared.adapter), list(skip_modules)
    if config.modules_to_save or config.lora_bias or not isinstance(unwrap(model), PeftModel):
        raise AdapterError(
            f"{correction.name}.all_layers = True: layers cannot be added to an adapter with modules_to_save = {config.modules_to_save!r} and lora_bias = "
            f"{config.lora_bias} on a {type(unwrap(model)).__name__}; adapt those layers (target_modules), or correct the saved adapter with `trl-safety correct`"
        )
    layers = linear_layers(model)
    adapted = {id(layer) for layer in prepared.subspaces.values()}
    further = {}
    wanted = {name: layer for name, layer in subspace.layers.items() if id(layer) not in adapted and not is_named(name, skip_modules)}
    for name, found in match(wanted, layers).items():
        if found is None:
            raise SubspaceError(
                f"the subspace's layer {name!r} is not in the model; list it in skip_modules, or build the subspace for this model"
            )
        layer = layers[found]
        if any(module.name == found for module in prepared.modules):
            continue
        check_shape(found, linear_shape(layer), wanted[name])
        weight = full_precision(layer)
        limit = FULL_PRECISION_DIFFERENCE if weight is layer.weight else QUANTISED_DIFFERENCE
        if weight is None or (apart := wanted[name].difference(weight)[0]) > limit:
            raise AdapterError(
                f"layer {found!r} of the model differs from the aligned model of the subspace"
                + (f" by {apart:.1%}" if weight is not None else ", as far as can be told: its format cannot be read")
            )
        further[found] = wanted[name]
    return further


def correct_folder(
    adapter: str | Path,
    output: str | Path,
    subspace: AlignmentSubspace,
    correction: Correction,
    *,
    skip_modules: Iterable[str] = (),
    device: str | torch.device | None = None,
    replace: bool = False,
) -> SafetyReport:
    """Correct a saved adapter into a new folder without loading any model.

    Args:
        adapter: a folder that PEFT wrote. It is never changed.
        output: a new or empty folder.
        subspace: of the model that the adapter was trained on.
        correction: what to do.
        skip_modules: modules to leave alone.
        device: where to compute; a GPU when there is one.
        replace: remove what is at `output` once the new folder is complete.

    Raises:
        AdapterError: the adapter is of an unsupported kind, was corrected before, belongs to another model, or the output
            cannot be written.
        SubspaceError: an adapted layer is not in the subspace.
    """
    folder = AdapterFolder.open(adapter)
    refuse_corrected(folder.config, f"adapter = {str(adapter)!r}")
    skip_modules = list(skip_modules)
    subspaces = subspace.for_modules(folder.factors, skip_modules)
    for name, layer in subspaces.items():
        check_shape(name, folder.factors[name].shape, layer)
        if bool(folder.config.fan_in_fan_out) != layer.transposed:
            raise AdapterError(
                f"adapter = {str(adapter)!r}: fan_in_fan_out = {folder.config.fan_in_fan_out} does not fit the subspace's layer {name!r}: they belong "
                "to different model classes"
            )
    further = {}
    if correction.all_layers:
        if folder.config.lora_bias:
            raise AdapterError(
                f"adapter = {str(adapter)!r}: lora_bias = True: {correction.name}.all_layers cannot add layers to it; leave all_layers out"
            )
        used = {layer.name for layer in subspaces.values()}
        further = {name: layer for name, layer in subspace.layers.items() if layer.name not in used and not is_named(name, skip_modules)}
        if further and (other := [name for name, layer in subspaces.items() if name != layer.name]):
            raise AdapterError(
                f"adapter = {str(adapter)!r}: names its layer {other[0]!r} otherwise than the subspace ({subspaces[other[0]].name!r}), so that the names of further "
                "layers in its model are not known; build the subspace for this model, or leave all_layers out"
            )
    correction.check({**subspaces, **further})
    correction.check_ranks({name: folder.factors[name].A.shape[0] for name in subspaces}, {**subspaces, **further})
    base_check = check_base(folder, subspace, subspaces)
    loose = [name for name, layer in subspaces.items() if name != layer.name]
    if loose and base_check.startswith(NOT_VERIFIED):
        raise AdapterError(
            f"adapter = {str(adapter)!r}: its layer {loose[0]!r} is {subspaces[loose[0]].name!r} in the subspace, and its base model is not at hand to tell "
            "whether they are the same: put the base model where base_model_name_or_path says, or build the subspace for this model"
        )
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    inputs = []
    for name, layer in subspaces.items():
        factors = folder.factors[name]
        inputs.append(LayerInput(name, (factors.B, factors.A), factors.scaling, layer, where))
    stored = next(iter(folder.factors.values())).B.dtype
    for name, layer in further.items():
        empty = (torch.zeros(layer.shape[0], 0, dtype=stored), torch.zeros(0, layer.shape[1], dtype=stored))
        inputs.append(LayerInput(name, empty, 1.0, layer, where))
    results = correction.run(inputs)
    changed = {name: r.factors for name, r in results.items() if r.factors is not None}
    config = copy.deepcopy(folder.config)
    if added := [name for name in further if name in changed]:
        target(config, [*folder.factors, *added])
    scalings = {
        name: (changed[name][1].shape[0] if name in changed else factors.A.shape[0], factors.scaling)
        for name, factors in folder.factors.items()
    }
    scalings |= {name: (changed[name][1].shape[0], 1.0) for name in added}
    reshaped = bool(added) or any(changed[name][1].shape != folder.factors[name].A.shape for name in changed)
    update_config(config, correction.name if _acted(results) else None, scalings if reshaped else {})
    methods = [method for method in carried_methods(Path(adapter)) if method.acted] + [correction.report(results)]
    report = SafetyReport(
        stage="final",
        protected=any(method.acted for method in methods),
        base_model=config.base_model_name_or_path,
        base_check=base_check,
        subspace=describe_subspace(subspace),
        methods=methods,
        skipped={name: f"skip_modules: {is_named(name, skip_modules)}" for name in folder.factors if name not in subspaces},
        not_covered=sorted(folder.others),
    )
    card = folder.path / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    folder.write(
        Path(output),
        changed,
        config,
        setting="output",
        replace=replace,
        report=lambda written: {
            REPORT: report.model_copy(update=fingerprints(written)).text(),
            "README.md": with_section(text, report),
        },
    )
    return report


def _acted(results: Mapping[str, LayerResult]) -> bool:
    return any(result.factors is not None for result in results.values())


def carried_methods(folder: Path) -> list[MethodReport]:
    """The methods that an adapter's own report names; none where the report is not of this adapter as it is now."""
    earlier = read_report(folder) if (folder / REPORT).is_file() else None
    return earlier.methods if earlier and describes(earlier, folder) else []


def update_config(config: Any, method: str | None, scalings: Mapping[str, tuple[int, float]]) -> None:
    """Mark an adapter with the method that rewrote it, and write every module's rank and alpha in full where ranks changed.

    PEFT takes the first pattern that matches and sorts them when saving, so that patterns of the user's that a changed rank
    contradicts cannot stay.

    Args:
        config: the LoraConfig, changed in place.
        method: None where nothing was rewritten.
        scalings: module → (rank, scaling); empty where no rank changed.
    """
    if scalings:
        kept = {key: value for key, value in (config.alpha_pattern or {}).items() if key.startswith(MARK_PREFIX)}
        config.rank_pattern = {f"^{name}": rank for name, (rank, _) in scalings.items()}
        alphas = {name: scaling * (rank**0.5 if config.use_rslora else rank) for name, (rank, scaling) in scalings.items()}
        # Tools that read adapters expect whole numbers where they are whole.
        config.alpha_pattern = {f"^{name}": int(alpha) if alpha.is_integer() else alpha for name, alpha in alphas.items()} | kept
    if method is not None:
        config.alpha_pattern = {**(config.alpha_pattern or {}), f"{MARK_PREFIX}{method}": 1}


def check_base(folder: AdapterFolder, subspace: AlignmentSubspace, layers: Mapping[str, LayerSubspace]) -> str:
    """Compare the adapter's base model with the subspace's, as far as it can be had without a network.

    Returns:
        What was verified, for the report.

    Raises:
        AdapterError: it is another model.
    """
    base = folder.config.base_model_name_or_path
    if base and Path(base).is_dir():
        checkpoint = Checkpoint(base, quantised=True)
        # At random: every so many layers would be the same kind of layer again and again.
        compared = QUANTISED_LAYERS_SAMPLED if checkpoint.config.get("quantization_config") else BASE_LAYERS_SAMPLED
        names = random.Random(0).sample(list(layers), min(compared, len(layers)))  # noqa: S311  # no secret here
        stored = {name: found for name, found in match(names, checkpoint.modules).items() if found is not None}
        recognition = Recognition()
        for name, found in stored.items():
            weight, quantised = checkpoint.weight(found)
            if weight is None:
                return f"{NOT_VERIFIED}: {base} is stored quantised in a format that is not read, the subspace is of {subspace.provenance.aligned}; shapes match"
            if apart := recognition.add(weight, layers[name].samples, quantised=quantised):
                raise AdapterError(_wrong_base(base, subspace, f"layer {name!r}", apart))
        if apart := recognition.unaligned:
            raise AdapterError(_wrong_base(base, subspace, "all layers together", apart))
        if stored:
            return f"weights of {base} match the subspace's aligned model in all {len(stored)} layers that were compared{recognition.qualifier}"
    if base and base == subspace.provenance.aligned:
        return f"{base}, by name the subspace's aligned model"
    return (
        f"{NOT_VERIFIED}: {base or 'no name in the adapter'} is not at hand, the subspace is of {subspace.provenance.aligned}; shapes match"
    )


def _wrong_base(base: str, subspace: AlignmentSubspace, where: str, difference: float) -> str:
    return (
        f"base_model_name_or_path = {base!r} of the adapter differs from the subspace's aligned model {subspace.provenance.aligned!r} in {where} by "
        f"{difference:.1%}: use the subspace of the model that the adapter was trained on"
    )


class CorrectionCallback(TrainerCallback):
    """Correct the adapter when training ends, so that the next `save_model()` writes the corrected one.

    Works with any Transformers `Trainer` on a PEFT model. It acts after `load_best_model_at_end`. Checkpoints on the way stay
    resumable and therefore uncorrected; their `safety_report.json` says so.
    """

    def __init__(self, subspace: AlignmentSubspace | str | Path, correction: Correction, skip_modules: Iterable[str] = ()) -> None:
        self.subspace = subspace if isinstance(subspace, AlignmentSubspace) else AlignmentSubspace.from_pretrained(subspace)
        self.correction = correction
        self.skip_modules = tuple(skip_modules)
        self._others: Callable[[], list[MethodReport]] = list
        self._run: object = None
        self._adapter = ""
        self.result: SafetyReport | None = None

    def prepare(self, model: nn.Module) -> Prepared:
        """Check that the correction will be able to act. Raises `AdapterError` or `SubspaceError` where it will not."""
        prepared = prepare(model, self.subspace, self.skip_modules)
        check_correction(model, self.subspace, self.correction, prepared, self.skip_modules)
        return prepared

    def join(self, run: object, others: Callable[[], list[MethodReport]]) -> None:
        """Report other methods, which act while training, in the run of this `TrainerState`."""
        self._run, self._others = run, others

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        """Check, and have checkpoints say that they are uncorrected."""
        check_engine()
        if self._run is not state:
            # Of a run that was interrupted.
            self._others = list
        # The state lives as long as one run, and all of the run's callbacks see it.
        other = vars(state).setdefault(RUN_CORRECTION, self)
        if other is not self:
            raise ConfigurationError(
                f"callbacks: {other.correction.name} and {self.correction.name} would both rewrite the trained adapter: keep one of them"
            )
        if self.correction.config.corrected_checkpoints and args.save_strategy == "no":
            raise ConfigurationError(
                f"{self.correction.name}.corrected_checkpoints = True: save_strategy = 'no' writes no checkpoint that a corrected copy could lie in; set "
                "save_strategy, or leave corrected_checkpoints out"
            )
        prepared = self.prepare(model)
        self._adapter, self.result = prepared.adapter, None
        pending = self.correction.report({}, "acts when training ends; this checkpoint is uncorrected and can be resumed")
        report_source(model, prepared.adapter).live(
            lambda: prepared.report(self.subspace, [*self._others(), pending], final=False).model_copy(update={"protected": False})
        )

    def on_save(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        """Write the corrected copy of a checkpoint where that is asked for."""
        if not self.correction.config.corrected_checkpoints or not state.is_world_process_zero:
            return
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        saved = adapter_folder(unwrap(model), checkpoint, self._adapter)
        # A resumed run comes by the same checkpoint again.
        correct_folder(saved, checkpoint / CORRECTED_COPY, self.subspace, self.correction, skip_modules=self.skip_modules, replace=True)

    def on_train_end(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        """Correct in memory the adapter that was checked at the start."""
        prepared = prepare(model, self.subspace, self.skip_modules, self._adapter)
        self.result = correct_model(model, self.subspace, self.correction, prepared, self._others(), self.skip_modules)
        self._others = list
        if state.is_world_process_zero:
            own = self.result.methods[-1]
            # At a level that is shown: a correction that erased most of an update is as worth knowing as one that did nothing.
            logger.warning("%s: %s", own.source, own.summary)
