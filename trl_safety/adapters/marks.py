"""What an adapter's own configuration says about it: which correction rewrote it, and what kind of adapter it is."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from peft.utils.other import get_pattern_key

from trl_safety.errors import AdapterError

CORRECTED, KIND = "trl_safety.corrected_by.", "trl_safety.is."
"""A mark is a key of the adapter's `alpha_pattern`: a regular-expression comment before the name of one of its modules, as in
`(?#trl_safety.corrected_by.NAME)model.layers.0.self_attn.q_proj`, with that module's own alpha. It changes nothing, and PEFT carries
it through loading, saving and training without a warning; a file beside the adapter would be lost at the first of these.
"""
_MARK = re.compile(r"\(\?#(?P<text>trl_safety\.[^)]*)\)|\^(?P<older>trl_safety\..*)")
"""Version 0.1 wrote `^trl_safety.corrected_by.NAME`, which matches no module, so that PEFT 0.21.2 warns about it."""

KINDS = {
    "buffer": "a BufferLoRA, which makes the model harmful: it is attached while another adapter trains, and never served, merged or corrected",
    "reinforce": "a ReinforceLoRA, which is merged with a user's adapter (`trl-safety merge-reinforce`) and is not one itself",
}


def marks(config: Any) -> list[str]:
    """The corrections that an adapter's configuration says it went through."""
    return [text.removeprefix(CORRECTED) for text in _texts(config) if text.startswith(CORRECTED)]


def kind_of(config: Any) -> str:
    """What the adapter's configuration says it is: "buffer", "reinforce", or "user" where it says nothing."""
    return next((text.removeprefix(KIND) for text in _texts(config) if text.startswith(KIND)), "user")


def mark(config: Any, kind: str, modules: Iterable[str]) -> None:
    """Mark a LoraConfig as a provider's adapter of this kind, which adapts these modules."""
    _add(config, f"{KIND}{kind}", modules)


def _texts(config: Any) -> list[str]:
    found = (_MARK.match(key) for key in config.alpha_pattern or {})
    return [match["text"] or match["older"] for match in found if match]


def _add(config: Any, text: str, modules: Iterable[str]) -> None:
    name = min(modules)
    patterns = dict(config.alpha_pattern or {})
    config.alpha_pattern = {**patterns, f"(?#{text}){name}": patterns.get(get_pattern_key(patterns, name), config.lora_alpha)}


def refuse_provider(config: Any, where: str) -> None:
    """Refuse a provider's buffer or reinforcing LoRA that was given in place of a user's adapter.

    Raises:
        AdapterError: naming what it is.
    """
    if (kind := kind_of(config)) != "user":
        raise AdapterError(f"{where} is {KINDS.get(kind, f'an adapter of kind {kind!r}')}; give the user's adapter")


def refuse_corrected(config: Any, where: str) -> None:
    """Refuse an adapter that was corrected before: C is not idempotent, so a second pass would be a different correction.

    Raises:
        AdapterError: it was corrected (the message names the method), or it is not a user's adapter at all.
    """
    refuse_provider(config, where)
    if found := marks(config):
        raise AdapterError(
            f"{where} was already corrected by {', '.join(found)}, and a second correction would act on the corrected one: start from the adapter as it "
            "was trained (a checkpoint of the run, or the input of `trl-safety correct`)"
        )


def update_config(config: Any, method: str | None, modules: Iterable[str], scalings: Mapping[str, tuple[int, float]]) -> None:
    """Mark an adapter with the method that rewrote it, and write every module's rank and alpha in full where ranks changed.

    PEFT takes the first pattern that matches and sorts them when saving, so the user's patterns that a changed rank
    contradicts cannot stay.

    Args:
        config: the LoraConfig, changed in place.
        method: None where nothing was rewritten.
        modules: the names of the adapter's modules.
        scalings: module → (rank, scaling); empty where no rank changed.
    """
    modules = list(modules)
    if scalings:
        kept = _texts(config)
        config.rank_pattern = {f"^{name}": rank for name, (rank, _) in scalings.items()}
        alphas = {name: scaling * (rank**0.5 if config.use_rslora else rank) for name, (rank, scaling) in scalings.items()}
        # Tools that read adapters expect whole numbers to be written as integers.
        config.alpha_pattern = {f"^{name}": int(alpha) if alpha.is_integer() else alpha for name, alpha in alphas.items()}
        for text in kept:
            _add(config, text, modules)
    if method is not None:
        _add(config, f"{CORRECTED}{method}", modules)
