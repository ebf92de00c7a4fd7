"""What the corrections that read an alignment subspace share: matching an adapter's layers with the subspace's."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch
from peft import PeftModel
from torch import nn

from trl_safety.adapters.fingerprint import FULL_PRECISION_DIFFERENCE, NOT_VERIFIED, QUANTISED_DIFFERENCE
from trl_safety.adapters.folder import AdapterFolder, Factors
from trl_safety.adapters.lora import adapter_config, full_precision, linear_layers, linear_shape, unwrap
from trl_safety.adapters.names import is_named, match
from trl_safety.corrections.base import Bound, Correction
from trl_safety.corrections.prepared import Prepared
from trl_safety.errors import AdapterError, SubspaceError
from trl_safety.subspace.artifact import AlignmentSubspace
from trl_safety.subspace.layer import LayerSubspace
from trl_safety.subspace.recognition import check_base, check_shape


class SubspaceCorrection(Correction):
    """A correction that reads the alignment subspace of every layer."""

    @property
    def all_layers(self) -> bool:
        """Whether it also acts on layers of the subspace that the adapter does not have."""
        return self.config.every_linear_layer

    @abstractmethod
    def check(self, layers: Mapping[str, LayerSubspace]) -> None:
        """Raise if the correction cannot act on these subspaces."""

    def check_ranks(self, ranks: Mapping[str, int], layers: Mapping[str, LayerSubspace]) -> None:  # most accept any
        """Raise if the correction cannot act on an adapter with these ranks; `layers` are all that it acts on, by module."""

    def bind(self, folder: AdapterFolder, subspace: AlignmentSubspace | None, skip_modules: Sequence[str], setting: str) -> Bound:
        """See `Correction.bind`.

        Raises:
            AdapterError: the adapter belongs to another model, or the names of further layers are not known.
            SubspaceError: an adapted layer is not in the subspace.
        """
        subspace = self._given(subspace)
        subspaces = subspace.for_modules(folder.factors, skip_modules)
        for name, layer in subspaces.items():
            if folder.config.task_type == "CAUSAL_LM" and layer.name.endswith(f".{name}"):
                raise AdapterError(
                    f"{setting}: its layer {name!r} is named as in the model without its head, and is {layer.name!r} in one that answers, so that PEFT would put "
                    "nothing of it there and only warn: save the adapter again from the model that it was trained on"
                )
            check_shape(name, folder.factors[name].shape, layer)
            if bool(folder.config.fan_in_fan_out) != layer.transposed:
                raise AdapterError(
                    f"{setting}: fan_in_fan_out = {folder.config.fan_in_fan_out} does not match the subspace's layer {name!r}: they belong "
                    "to different model classes"
                )
        further = self._further_of(folder, subspace, subspaces, skip_modules, setting) if self.all_layers else {}
        self.check({**subspaces, **further})
        self.check_ranks({name: folder.factors[name].A.shape[0] for name in subspaces}, {**subspaces, **further})
        base_check = check_base(folder, subspace, subspaces)
        loose = [name for name, layer in subspaces.items() if name != layer.name]
        if loose and base_check.startswith(NOT_VERIFIED):
            raise AdapterError(
                f"{setting}: its layer {loose[0]!r} is {subspaces[loose[0]].name!r} in the subspace, and its base model is not available to tell "
                "whether they are the same: put the base model at its base_model_name_or_path, or build the subspace for this model"
            )
        stored = next(iter(folder.factors.values())).B.dtype
        return Bound(
            layers={**subspaces, **further},
            further={
                name: Factors(torch.zeros(layer.shape[0], 0, dtype=stored), torch.zeros(0, layer.shape[1], dtype=stored), 1.0)
                for name, layer in further.items()
            },
            base_check=base_check,
            skipped={name: f"skip_modules: {is_named(name, skip_modules)}" for name in folder.factors if name not in subspaces},
        )

    def _further_of(
        self,
        folder: AdapterFolder,
        subspace: AlignmentSubspace,
        subspaces: Mapping[str, LayerSubspace],
        skip_modules: Sequence[str],
        setting: str,
    ) -> dict[str, LayerSubspace]:
        if folder.config.lora_bias:
            raise AdapterError(f"{setting}: lora_bias = True: {self.name}.all_layers cannot add layers to it; remove all_layers")
        used = {layer.name for layer in subspaces.values()}
        further = {name: layer for name, layer in subspace.layers.items() if layer.name not in used and not is_named(name, skip_modules)}
        if further and (other := [name for name, layer in subspaces.items() if name != layer.name]):
            raise AdapterError(
                f"{setting}: its layer {other[0]!r} has another name in the subspace ({subspaces[other[0]].name!r}), so the names of further "
                "layers in its model are not known; build the subspace for this model, or remove all_layers"
            )
        return further

    def check_live(self, model: nn.Module, prepared: Prepared, subspace: AlignmentSubspace | None, skip_modules: Sequence[str]) -> None:
        """See `Correction.check_live`."""
        further = self._further_live(model, prepared, self._given(subspace), skip_modules)
        layers = {**prepared.subspaces, **further}
        self.check(layers)
        self.check_ranks({module.name: int(module.A.shape[0]) for module in prepared.covered}, layers)

    def further_layers(
        self, model: nn.Module, prepared: Prepared, subspace: AlignmentSubspace | None, skip_modules: Sequence[str]
    ) -> dict[str, LayerSubspace | None]:
        """See `Correction.further_layers`; the layers are checked to be the aligned model's."""
        return dict(self._further_live(model, prepared, self._given(subspace), skip_modules))

    def _given(self, subspace: AlignmentSubspace | None) -> AlignmentSubspace:
        if subspace is None:
            raise SubspaceError(
                f"subspace is missing: {self.name} needs an alignment subspace; give the file made by `trl-safety subspace`"
            )
        return subspace

    def _further_live(
        self, model: nn.Module, prepared: Prepared, subspace: AlignmentSubspace, skip_modules: Sequence[str]
    ) -> dict[str, LayerSubspace]:
        if not self.all_layers:
            return {}
        config = adapter_config(model, prepared.adapter)
        if config.modules_to_save or config.lora_bias or not isinstance(unwrap(model), PeftModel):
            raise AdapterError(
                f"{self.name}.all_layers = True: layers cannot be added to an adapter with modules_to_save = {config.modules_to_save!r} and lora_bias = "
                f"{config.lora_bias} on a {type(unwrap(model)).__name__}; adapt those layers (target_modules), or correct the saved adapter with "
                "`trl-safety correct`"
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
                    + (f" by {apart:.1%}" if weight is not None else ", or cannot be compared: its format cannot be read")
                )
            further[found] = wanted[name]
        return further
