"""A model's adapter, checked and matched with its subspaces before training or correction."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, cast

from torch import nn

from trl_safety.adapters.fingerprint import NOT_VERIFIED
from trl_safety.adapters.lora import (
    LoraModule,
    adapter_config,
    adapter_name,
    check_finite,
    lora_modules,
    no_numbers,
    not_covered,
    not_finite,
    unwrap,
)
from trl_safety.adapters.marks import refuse_corrected, refuse_provider
from trl_safety.adapters.names import is_named
from trl_safety.reports.report import MethodReport, SafetyReport, describe_subspace, not_acted
from trl_safety.subspace.artifact import AlignmentSubspace
from trl_safety.subspace.layer import LayerSubspace
from trl_safety.subspace.recognition import verify_base


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
    switched_off: list[str] = field(default_factory=list)

    @property
    def covered(self) -> list[LoraModule]:
        """The modules that the methods act on."""
        return [module for module in self.modules if module.name not in self.skipped]

    def report(self, subspace: AlignmentSubspace | None, methods: list[MethodReport], *, final: bool) -> SafetyReport:
        """The adapter's safety report; not marked as protected if the adapter holds NaN or infinity."""
        report = SafetyReport(
            stage="final" if final else "training",
            protected=any(method.acted for method in methods),
            base_model=self.base_model,
            base_check=self.base_check,
            subspace=describe_subspace(subspace),
            methods=methods,
            skipped=self.skipped,
            not_covered=self.outside,
            switched_off=self.switched_off,
        )
        name = not_finite(self.modules) if report.protected else None
        return report if name is None else not_acted(report, no_numbers(name))


def prepare(
    model: nn.Module,
    subspace: AlignmentSubspace | None,
    skip_modules: Iterable[str] = (),
    adapter: str | None = None,
    *,
    accept: Callable[[Any, str], None] = refuse_corrected,
    trained: bool = False,
) -> Prepared:
    """Check that the methods will be able to act on a model's adapter.

    Without a subspace there is nothing to compare the base model with, and every adapted layer is covered. `accept` takes the adapter's
    configuration and name, and raises if the adapter must not be changed. An adapter that was `trained` in this run is not refused for
    values that are not finite: it is reported as not protected.

    Raises:
        AdapterError: there is no adapter, it is of an unsupported kind or was corrected before, or its base is not the aligned model.
        SubspaceError: an adapted layer is not in the subspace, or an entry of `skip_modules` matches nothing.
    """
    skip_modules = list(skip_modules)
    adapter = adapter_name(model, adapter)
    modules = lora_modules(model, adapter)
    if not trained:
        check_finite(modules)
    config = adapter_config(model, adapter)
    for name, other in cast(Any, unwrap(model)).peft_config.items():
        # PEFT saves every loaded adapter, not only the active one.
        refuse_provider(other, f"adapter {name!r} of the model")
    accept(config, f"adapter {adapter!r}")
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
