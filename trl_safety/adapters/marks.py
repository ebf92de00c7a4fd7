"""What an adapter's own configuration says about it: which correction rewrote it, and what kind of adapter it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trl_safety.errors import AdapterError

MARK_PREFIX = "^trl_safety.corrected_by."
"""Key in the adapter's `alpha_pattern` that says it was corrected. It matches no module, and PEFT carries it through loading,
saving and training; a file beside the adapter would be lost at the first of these."""

KIND_PREFIX = "^trl_safety.is."
"""Likewise, on the adapters of a provider: what kind it is (see `adapters/record.py`)."""

KINDS = {
    "buffer": "a BufferLoRA, which makes the model harmful: it is attached while another adapter trains, and never served, merged or corrected",
    "reinforce": "a ReinforceLoRA, which is merged with a user's adapter (`trl-safety merge-reinforce`) and is none itself",
}


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
