"""The LoRA factors of a live PEFT model, by module name. Variants whose ΔW is not s·B·A are refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftType
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn

from trl_safety.adapters.names import strip_wrappers
from trl_safety.adapters.shards import is_sharded, placeholders, whole
from trl_safety.errors import AdapterError

PLAIN_INITIALISATIONS = (True, False, "gaussian", "eva", "orthogonal")
"""Initialisations that leave the base weight as it is; all others (PiSSA, OLoRA, CorDA, LoftQ, …) move part of it into B·A."""


CONVERTIBLE = ("pissa", "corda", "olora", "lora_ga")
"""Of those, the ones that PEFT can turn into plain LoRA when it saves."""

DIVERGED = (
    "the training diverged or overflowed in float16; take an earlier checkpoint, or train again in bfloat16 or with a lower learning rate"
)


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
            f"layer {stray[0]!r} holds factors of adapter {name!r}, whose target_modules do not name it: they are left over from another adapter on "
            "the same model object; load the model again"
        )
    return modules


def check_finite(modules: Iterable[LoraModule]) -> None:
    """Refuse a live adapter whose factors hold NaN or infinity.

    What other processes hold, or have yet to give to this one, is not checked here, but when the saved adapter is read.

    Raises:
        AdapterError: naming the first such tensor.
    """
    if placeholders():
        return
    if (name := not_finite([module for module in modules if not is_sharded(module.A) and not is_sharded(module.B)])) is not None:
        raise AdapterError(f"{no_numbers(name)}: {DIVERGED}")


@torch.no_grad()
def not_finite(modules: Iterable[LoraModule]) -> str | None:
    """The first factor of a live adapter that holds NaN or infinity; None if all are finite. Sharded ones are gathered, one at a time."""
    factors = ((f"{module.name}.{side}", factor) for module in modules for side, factor in (("lora_A", module.A), ("lora_B", module.B)))
    flags = [(name, torch.isfinite(whole(factor)).all()) for name, factor in factors if not factor.is_meta and factor.is_floating_point()]
    # One transfer from the accelerator, not one per layer.
    if not flags or bool(torch.stack([flag.to(flags[0][1].device) for _, flag in flags]).all()):
        return None
    return next(name for name, flag in flags if not flag)


def no_numbers(name: str) -> str:
    """The message for an adapter with a tensor that is not finite."""
    return f"tensor {name!r} of the model's adapter holds NaN or infinity, so that the model answers nonsense"


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
    """Make a LoraConfig target exactly these modules."""
    config.target_modules = set(modules)
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None


def extend_adapter(model: Any, adapter: str, extra: Iterable[str]) -> None:
    """Add layers to a live `PeftModel`'s adapter, which keeps its name and its other layers' factors.

    Whatever was trained besides LoRA factors (`modules_to_save`) would start from scratch; callers refuse it.
    """
    modules = lora_modules(model, adapter)
    dtype = modules[0].A.dtype
    kept = {module.name: (module.B.detach().clone(), module.A.detach().clone(), module.scaling) for module in modules}
    config = adapter_config(model, adapter)
    target(config, [*kept, *extra])
    model.base_model.inject_adapter(model.base_model.model, adapter)
    for module in lora_modules(model, adapter):
        # PEFT makes new factors in the base model's dtype, which may be narrower than what was trained.
        module.A.data, module.B.data = module.A.data.to(dtype), module.B.data.to(dtype)
        if module.name in kept:
            B, A, scaling = kept[module.name]
            module.replace(B, A)
            module.layer.scaling[adapter] = scaling


def adapter_name(model: nn.Module, adapter: str | None = None) -> str:
    """The name of the adapter to use: the given one, or else the only active one.

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
                f"{option} = {value!r}: the update of this LoRA variant is not s·B·A, so that it cannot be protected; train without it"
            )
    if config.init_lora_weights not in PLAIN_INITIALISATIONS:
        known = str(config.init_lora_weights).lower().startswith(CONVERTIBLE)
        convert = ", or convert the adapter to plain LoRA when saving (path_initial_model_for_weight_conversion)" if known else ""
        raise AdapterError(
            f"init_lora_weights = {config.init_lora_weights!r}: moves part of the aligned weight into the adapter, so that B·A is not what "
            f"training changed; train with True{convert}"
        )
    if config.target_parameters:
        raise AdapterError(
            f"target_parameters = {config.target_parameters!r}: fused expert weights have no alignment subspace here; adapt linear layers with target_modules"
        )
    if config.layer_replication:
        raise AdapterError(
            f"layer_replication = {config.layer_replication!r}: replicated layers are in no checkpoint of the pair; train without it"
        )


def not_covered(model: nn.Module, modules: Iterable[LoraModule]) -> list[str]:
    """Names of the trainable parameters that are not LoRA factors of the given modules: trained, but protected by no method."""
    factors = {id(parameter) for module in modules for parameter in (module.A, module.B)}
    return sorted(
        strip_wrappers(name)
        for name, parameter in unwrap(model).named_parameters()
        if parameter.requires_grad and id(parameter) not in factors
    )


def _adapters_of(layer: Any) -> set[str]:
    return {*layer.lora_A, *layer.lora_embedding_A}


def _check_layer(path: str, layer: Any, adapter: str) -> None:
    if adapter in layer.lora_embedding_A:
        raise AdapterError(
            f"layer {path!r} is an embedding: its update is not a linear layer's; leave it out of target_modules (modules_to_save trains it whole)"
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
    """A layer's weight, dequantised where it is stored quantised; None if PEFT cannot dequantise it, or the codes are sharded."""
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
