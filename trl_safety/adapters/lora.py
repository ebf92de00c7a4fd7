"""The LoRA factors of a live PEFT model, by module name, with every variant refused whose ΔW is not s·B·A."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftType
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn

from trl_safety.adapters.names import strip_wrappers
from trl_safety.adapters.shards import CHECKED_ELSEWHERE, is_sharded, placeholders
from trl_safety.adapters.subspace import FULL_PRECISION_DIFFERENCE, QUANTISED_DIFFERENCE, LayerSubspace, relative_differences, sample
from trl_safety.errors import AdapterError

PLAIN_INITIALISATIONS = (True, False, "gaussian", "eva", "orthogonal")
"""Initialisations that leave the base weight as it is; all others (PiSSA, OLoRA, CorDA, LoftQ, …) move part of it into B·A."""

MARK_PREFIX = "^trl_safety.corrected_by."
"""Key in the adapter's `alpha_pattern` that says it was corrected. It matches no module, and PEFT carries it through loading,
saving and training; a file beside the adapter would be lost at the first of these."""

KIND_PREFIX = "^trl_safety.is."
"""Likewise, on the adapters of a provider: what kind it is (see `adapters/record.py`)."""
KINDS = {
    "buffer": "a BufferLoRA, which makes the model harmful: it is attached while another adapter trains, and never served, merged or corrected",
    "reinforce": "a ReinforceLoRA, which is merged with a user's adapter (`trl-safety merge-reinforce`) and is none itself",
}


@dataclass(frozen=True)
class LoraModule:
    """One adapted linear layer of a live model: ΔW = scaling · B · A.

    Attributes:
        name: the module's name as the model class knows it.
        layer: PEFT's wrapper.
        adapter: the adapter's name within the wrapper.
    """

    name: str
    layer: Any
    adapter: str

    @property
    def A(self) -> nn.Parameter:
        """(r, in)."""
        weight: nn.Parameter = self.layer.lora_A[self.adapter].weight
        return weight

    @property
    def B(self) -> nn.Parameter:
        """(out, r)."""
        weight: nn.Parameter = self.layer.lora_B[self.adapter].weight
        return weight

    @property
    def scaling(self) -> float:
        """PEFT's s: alpha / r, or alpha / √r with rsLoRA."""
        return float(self.layer.scaling[self.adapter])

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.B.shape[0], self.A.shape[1]

    def replace(self, B: Tensor, A: Tensor) -> None:
        """Put factors of another rank in place, keeping the scaling. The layer's own dtype and device are kept."""
        for side, factor in (("lora_A", A), ("lora_B", B)):
            linear = getattr(self.layer, side)[self.adapter]
            old = linear.weight
            linear.weight = nn.Parameter(factor.to(old.device, old.dtype).contiguous(), requires_grad=old.requires_grad)
            linear.out_features, linear.in_features = factor.shape
        self.layer.r[self.adapter] = A.shape[0]


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, DataParallel and torch.compile."""
    while True:
        inner = getattr(model, "_orig_mod", None) or (
            model.module if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel) else None
        )
        if inner is None:
            return model
        model = inner


def lora_modules(model: nn.Module, adapter: str | None = None) -> list[LoraModule]:
    """The adapted layers of a model's active adapter.

    Args:
        model: a `PeftModel`, or a Transformers model with an adapter added; wrappers around it are looked through.
        adapter: the adapter's name; by default the active one.

    Raises:
        AdapterError: there is no LoRA adapter, several are active, it is merged into the base, or it is of a variant whose
            update is not s·B·A. The message names the setting and the remedy.
    """
    model = unwrap(model)
    name = adapter_name(model, adapter)
    config = adapter_config(model, name)
    check_config(config)
    modules = []
    for path, layer in model.named_modules():
        if not isinstance(layer, LoraLayer) or name not in _adapters_of(layer):
            continue
        _check_layer(path, layer, name)
        modules.append(LoraModule(strip_wrappers(path), layer, name))
    if not modules:
        raise AdapterError(f"adapter {name!r} wraps no linear layer: check target_modules of its LoraConfig")
    if stray := strays(config, [module.name for module in modules]):
        raise AdapterError(
            f"layer {stray[0]!r} holds factors of adapter {name!r}, whose target_modules do not name it: they are left from another adapter that was put on "
            "the same model object; load the model anew"
        )
    return modules


def strays(config: Any, names: Iterable[str]) -> list[str]:
    """The modules that an adapter has factors for though its configuration does not target them."""
    if config.target_modules is None or (isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear"):
        return []
    return [name for name in names if not check_target_module_exists(config, name)]


def linear_layers(model: nn.Module) -> dict[str, Any]:
    """Every linear layer of a model by name: PEFT's wrapper where there is one, never what is inside it."""
    return {strip_wrappers(path): module for path, module in unwrap(model).named_modules() if _is_linear(path, module)}


def linear_shape(layer: Any) -> tuple[int, int]:
    """(out, in) of a linear layer, quantised or not, or of GPT-2's Conv1D; (0, 0) of anything else."""
    if isinstance(layer, nn.Linear) or (hasattr(layer, "in_features") and hasattr(layer, "out_features")):
        return int(layer.out_features), int(layer.in_features)
    if type(layer).__name__ == "Conv1D" and hasattr(layer, "nf"):
        return int(layer.nf), int(layer.weight.shape[0])
    return 0, 0


def _is_linear(path: str, module: nn.Module) -> bool:
    inner = {"base_layer", "lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"} & set(path.split("."))
    return not inner and (isinstance(module, LoraLayer) or linear_shape(module) != (0, 0))


def target(config: LoraConfig, modules: Iterable[str]) -> None:
    """Have a LoraConfig name exactly these modules."""
    config.target_modules = set(modules)
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None


def extend_adapter(model: Any, adapter: str, extra: Iterable[str]) -> None:
    """Add layers to a live `PeftModel`'s adapter, which keeps its name and its other layers' factors.

    Whatever was trained besides LoRA factors (`modules_to_save`) would start anew; callers refuse it.
    """
    modules = lora_modules(model, adapter)
    dtype = modules[0].A.dtype
    kept = {module.name: (module.B.detach().clone(), module.A.detach().clone(), module.scaling) for module in modules}
    config = adapter_config(model, adapter)
    target(config, [*kept, *extra])
    model.base_model.inject_adapter(model.base_model.model, adapter)
    for module in lora_modules(model, adapter):
        # PEFT makes new factors of the base model's dtype, which may be narrower than what was trained.
        module.A.data, module.B.data = module.A.data.to(dtype), module.B.data.to(dtype)
        if module.name in kept:
            B, A, scaling = kept[module.name]
            module.replace(B, A)
            module.layer.scaling[adapter] = scaling


def adapter_name(model: nn.Module, adapter: str | None = None) -> str:
    """The name of the adapter that is meant: the given one, else the only active one.

    Raises:
        AdapterError: the model has no adapter, no adapter of that name, or several active ones.
    """
    model = unwrap(model)
    configs = getattr(model, "peft_config", None)
    if not configs:
        raise AdapterError(
            f"{type(model).__name__} has no adapter: the methods act on LoRA. Pass peft_config=LoraConfig(...) to the trainer or a "
            "PeftModel as the model"
        )
    if adapter is not None:
        if adapter not in configs:
            raise AdapterError(f"adapter = {adapter!r}: the model has {', '.join(map(repr, configs))}")
        return adapter
    active: Any = getattr(model, "active_adapters", None)
    active = active() if callable(active) else active
    active = [active] if isinstance(active, str) else list(active or [])
    if len(active) != 1:
        raise AdapterError(
            f"{len(active)} adapters are active ({', '.join(map(repr, active)) or 'none'}): activate the one to protect with "
            "model.set_adapter(name)"
        )
    return str(active[0])


def adapter_config(model: nn.Module, adapter: str) -> Any:
    """The adapter's PEFT configuration."""
    configs: Any = unwrap(model).peft_config
    return configs[adapter]


def check_config(config: Any) -> None:
    """Refuse adapters whose ΔW is not s·B·A on the linear layers of the model as it was aligned.

    Raises:
        AdapterError: naming the option of the LoraConfig, its value and what to use instead.
    """
    if config.peft_type != PeftType.LORA:
        raise AdapterError(
            f"peft_type = {getattr(config.peft_type, 'value', config.peft_type)}: only LoRA has an update ΔW = s·B·A; use a LoraConfig"
        )
    variants = [field.name for field in dataclasses.fields(LoraConfig) if field.metadata.get("is_lora_variant")]
    for option in dict.fromkeys(["use_dora", "use_qalora", *variants]):
        if value := getattr(config, option, None):
            raise AdapterError(
                f"{option} = {value!r}: the update of this LoRA variant is not s·B·A, so that it cannot be protected; unset it"
            )
    if config.init_lora_weights not in PLAIN_INITIALISATIONS:
        raise AdapterError(
            f"init_lora_weights = {config.init_lora_weights!r}: moves part of the aligned weight into the adapter, so that B·A is not what "
            "training changed; use True, or convert the adapter to plain LoRA when saving (path_initial_model_for_weight_conversion)"
        )
    if config.target_parameters:
        raise AdapterError(
            f"target_parameters = {config.target_parameters!r}: fused expert weights have no alignment subspace here; adapt linear layers by target_modules"
        )
    if config.layer_replication:
        raise AdapterError(
            f"layer_replication = {config.layer_replication!r}: replicated layers are in no checkpoint of the pair; unset it"
        )


def not_covered(model: nn.Module, modules: Iterable[LoraModule]) -> list[str]:
    """Names of the trainable parameters that are no LoRA factor of the given modules: trained, but protected by no method."""
    factors = {id(parameter) for module in modules for parameter in (module.A, module.B)}
    return sorted(
        strip_wrappers(name)
        for name, parameter in unwrap(model).named_parameters()
        if parameter.requires_grad and id(parameter) not in factors
    )


NOT_VERIFIED = "not verified"
"""How a report's sentence on the base model begins where its weights were compared with nothing."""


def verify_base(modules: Iterable[LoraModule], subspaces: Mapping[str, LayerSubspace]) -> str:
    """Check that the model under the adapter is the aligned model that the subspaces were fitted on.

    Compares 256 sampled entries a layer: in full precision each layer must be the aligned one, cast to whatever dtype; a
    quantised layer (dequantised one at a time) must lie within the quantisation's error of it, and all of them together must
    lie closer to the aligned model than to the base.

    Returns:
        What was verified, for the report.

    Raises:
        AdapterError: a weight has another shape or is another model's, naming the layer.
    """
    modules = list(modules)
    if placeholders() and not any(is_sharded(module.A) for module in modules):
        return CHECKED_ELSEWHERE
    unread, layers, recognition = 0, 0, Recognition()
    for module in modules:
        subspace = subspaces.get(module.name)
        if subspace is None:
            continue
        layers += 1
        check_shape(module.name, module.shape, subspace)
        layer = module.layer.get_base_layer()
        if bool(getattr(module.layer, "fan_in_fan_out", False)) != subspace.transposed:
            raise AdapterError(
                f"layer {module.name!r} stores its weight {'in × out' if not subspace.transposed else 'out × in'}, the subspace was fitted on the "
                "other orientation: build it from the checkpoint of this model class, with its config.json"
            )
        weight = full_precision(layer)
        if weight is None or weight.numel() != subspace.shape[0] * subspace.shape[1] or weight.is_meta:
            unread += 1
            continue
        if difference := recognition.add(weight, subspace.samples, quantised=weight is not layer.weight):
            to_base = subspace.difference(weight)[1]
            which = "the unaligned base of the pair" if to_base <= FULL_PRECISION_DIFFERENCE else "another model"
            raise AdapterError(_wrong_model(module.name, difference, which))
    if difference := recognition.unaligned:
        raise AdapterError(_wrong_model("all layers together", difference, "the unaligned base of the pair, quantised"))
    if unread == layers:
        return f"{NOT_VERIFIED}: no layer's weights could be read; shapes match"
    text = f"weights match the subspace's aligned model in {layers - unread} of {layers} layers"
    if unread:
        text += "; the others are stored in a format that could not be read"
    return text + recognition.qualifier


CERTAIN = 3.0
"""Standard errors beyond which quantised weights are said to be one model's and not the other's."""


class Recognition:
    """Tells whether weights are an aligned model's, layer by layer; quantised ones, each too coarse to tell, also all together.

    For quantised weights w = a + e, with a the aligned and b the base model's, Σ (‖w − b‖² − ‖w − a‖²) / Σ ‖a − b‖² is +1 in
    expectation, and −1 for w = b + e; its standard error, from the entries, says whether that tells the two apart.
    """

    def __init__(self) -> None:
        self._closer, self._apart, self._variance = 0.0, 0.0, 0.0

    def add(self, weight: Tensor, samples: Tensor, *, quantised: bool) -> float:
        """Look at one layer.

        Args:
            weight: as it is in the model.
            samples: (2, 256) `sample`d entries of the base and of the aligned model.
            quantised: whether the weight was dequantised.

        Returns:
            The layer's relative distance from the aligned one, if that is more than a cast or the quantisation explains; else 0.
        """
        if not quantised:
            to_aligned = relative_differences(weight, samples)[0]
            return 0.0 if to_aligned <= FULL_PRECISION_DIFFERENCE else to_aligned
        base, aligned = samples.double()
        entries = sample(weight).double()
        scale = torch.linalg.vector_norm(aligned).clamp(min=1e-30)
        change = (aligned - base) / scale
        errors = torch.stack([entries - aligned, entries - base]) / scale
        nearest = errors[errors.square().sum(1).argmin()]
        self._closer += (errors[1].square() - errors[0].square()).sum().item()
        self._apart += change.square().sum().item()
        self._variance += 4 * (change * nearest).square().sum().item()
        to_aligned = torch.linalg.vector_norm(errors[0]).item()
        # A NaN is a difference, too.
        return 0.0 if to_aligned <= QUANTISED_DIFFERENCE else to_aligned

    @property
    def _verdict(self) -> tuple[float, float] | None:
        """The statistic and its standard error."""
        return (self._closer / self._apart, self._variance**0.5 / self._apart) if self._apart else None

    @property
    def unaligned(self) -> float:
        """By how much all quantised layers together are rather the base's than the aligned model's; 0 unless that is certain."""
        if self._verdict is None:
            return 0.0
        value, error = self._verdict
        return -value if value < 0 and 1 - value > CERTAIN * error else 0.0

    @property
    def qualifier(self) -> str:
        """What the report adds to its verdict."""
        if self._verdict is None:
            return ""
        value, error = self._verdict
        if value < 0 or value + 1 <= CERTAIN * error:
            return ", up to quantisation, which is too coarse here to tell the aligned model from the base"
        return ", up to quantisation"


def _wrong_model(layer: str, difference: float, which: str) -> str:
    return (
        f"layer {layer!r} of the model differs from the aligned model of the subspace by {difference:.1%}: this is {which}. Train the aligned model, or "
        "build the subspace from the pair that this model belongs to (base first, then aligned)"
    )


def check_shape(name: str, shape: tuple[int, int], subspace: LayerSubspace) -> None:
    """Refuse an adapter layer whose shape is not the subspace's.

    Raises:
        AdapterError: naming the layer and both shapes.
    """
    if shape != subspace.shape:
        raise AdapterError(
            f"layer {name!r} is {shape[0]} × {shape[1]} in the adapter and {subspace.shape[0]} × {subspace.shape[1]} in the alignment subspace: "
            "the subspace belongs to another model"
        )


def marks(config: Any) -> list[str]:
    """The corrections that an adapter's configuration says it went through."""
    return [key.removeprefix(MARK_PREFIX) for key in config.alpha_pattern or {} if key.startswith(MARK_PREFIX)]


def kind_of(config: Any) -> str:
    """What the adapter's configuration says it is: "buffer", "reinforce", or "user" where it says nothing."""
    return next((key.removeprefix(KIND_PREFIX) for key in config.alpha_pattern or {} if key.startswith(KIND_PREFIX)), "user")


def refuse_provider(config: Any, where: str) -> None:
    """Refuse a provider's buffer or reinforcing LoRA in the place of a user's adapter.

    Raises:
        AdapterError: naming what it is.
    """
    if (kind := kind_of(config)) != "user":
        raise AdapterError(f"{where} is {KINDS.get(kind, f'an adapter of kind {kind!r}')}; give the user's adapter")


def refuse_corrected(config: Any, where: str) -> None:
    """Refuse an adapter that was corrected before: C is not idempotent, so that a second time is another correction.

    Raises:
        AdapterError: naming the method that corrected it, or it is no user's adapter at all.
    """
    refuse_provider(config, where)
    if found := marks(config):
        raise AdapterError(
            f"{where} was corrected by {', '.join(found)} already, and a second correction would act on the corrected one: start from the adapter as it "
            "was trained (a checkpoint of the run, or the input of `trl-safety correct`)"
        )


def _adapters_of(layer: Any) -> set[str]:
    return {*layer.lora_A, *layer.lora_embedding_A}


def _check_layer(path: str, layer: Any, adapter: str) -> None:
    if adapter in layer.lora_embedding_A:
        raise AdapterError(
            f"layer {path!r} is an embedding: its update is no linear layer's; leave it out of target_modules (modules_to_save trains it whole)"
        )
    if variant := getattr(layer, "lora_variant", {}).get(adapter):
        raise AdapterError(f"layer {path!r} uses the LoRA variant {type(variant).__name__}, whose update is not s·B·A: use plain LoRA")
    A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    if A.ndim != 2 or B.ndim != 2:
        raise AdapterError(f"layer {path!r} is a convolution: only linear layers are supported; leave it out of target_modules")
    if type(layer).__name__ == "ParamWrapper":
        raise AdapterError(f"layer {path!r} adapts a bare parameter (fused experts): only linear layers are supported; use target_modules")
    if adapter in layer.merged_adapters:
        raise AdapterError(f"adapter {adapter!r} is merged into layer {path!r}: call model.unmerge_adapter() first")


def full_precision(layer: Any) -> Tensor | None:
    """A layer's weight, dequantised where it is stored quantised; None where PEFT knows no way, or the codes are sharded."""
    from peft.utils.integrations import dequantize_module_weight

    weight = getattr(layer, "weight", None)
    if weight is None:
        return None
    if weight.is_floating_point() and type(weight).__name__ not in ("Params4bit", "Int8Params"):
        return weight if not type(weight).__module__.startswith("torchao") else None
    if is_sharded(weight):
        return None
    with torch.no_grad():
        result: Tensor = dequantize_module_weight(layer)
    return result if result.is_floating_point() else None
