"""Match module names across the prefixes that wrappers and model classes add.

The same layer is `model.layers.0.self_attn.q_proj` in a checkpoint, `base_model.model.model.layers.0.self_attn.q_proj` under
PEFT, `_orig_mod.model.layers…` when compiled, and `model.language_model.layers…` in a vision-language model.
"""

from __future__ import annotations

from collections.abc import Iterable

from trl_safety.errors import SubspaceError

WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer"})
"""Name parts that torch and PEFT add; they never tell two layers apart."""

CONTAINERS = frozenset({"model", "base_model", "language_model", "text_model", "transformer"})
"""Name parts that differ between classes or library versions that nest the same layers differently."""


def strip_wrappers(name: str) -> str:
    """The module's name as the model class knows it: PEFT's prefix and every wrapper's part removed."""
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    if parts[:2] == ["base_model", "model"]:
        parts = parts[2:]
    return ".".join(parts)


def match(wanted: Iterable[str], available: Iterable[str]) -> dict[str, str | None]:
    """Find each wanted module among the available names.

    An exact match wins; otherwise the name that is equal once the containers' parts are dropped from both. Position never
    matters.

    Returns:
        wanted name → available name, or None if nothing matches.

    Raises:
        SubspaceError: a name matches several available ones, or two wanted names match the same one.
    """
    exact = {strip_wrappers(name): name for name in available}
    loose: dict[str, list[str]] = {}
    for stripped, name in exact.items():
        loose.setdefault(_core(stripped), []).append(name)
    found: dict[str, str | None] = {}
    owner: dict[str, str] = {}
    for name in wanted:
        stripped = strip_wrappers(name)
        candidates = [exact[stripped]] if stripped in exact else loose.get(_core(stripped), [])
        if len(candidates) > 1:
            raise SubspaceError(
                f"module {name!r} matches several names ({', '.join(sorted(candidates))}): name one of them in full in target_modules"
            )
        found[name] = candidates[0] if candidates else None
        if candidates and owner.setdefault(candidates[0], name) != name:
            raise SubspaceError(
                f"modules {owner[candidates[0]]!r} and {name!r} both match {candidates[0]!r}: their names differ only in parts "
                "that wrappers add; rename one or list it in skip_modules"
            )
    return found


def is_named(name: str, entries: Iterable[str]) -> str | None:
    """The first entry that equals the module's name or ends it at a dot, as in PEFT's `target_modules`; None if none does."""
    stripped = strip_wrappers(name)
    return next((entry for entry in entries if stripped == entry or stripped.endswith(f".{entry}")), None)


def _core(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in CONTAINERS)
