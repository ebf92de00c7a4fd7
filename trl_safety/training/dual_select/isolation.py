"""Whether the documents of one row are kept apart, found out from the model itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trl_safety.adapters.documents import Stretches
from trl_safety.errors import ConfigurationError

TOLERANCE = 1e-4
"""Of the relative change of a document's hidden states in float32. Kernels that keep documents apart change nothing at all."""


def refuse_mixed_documents(decoder: nn.Module, call: tuple[tuple[Any, ...], dict[str, Any]], documents: Stretches) -> bool:
    """Change every other document of each row, and see that the hidden states of the rest stay as they are.

    What keeps documents apart depends on the attention kernel, on masks that are or are not passed, on patches, and on layers that are no
    attention at all. So it is tried, with three forward passes without gradients and without dropout.

    Args:
        decoder: the model below its head.
        call: the positional and keyword arguments of its forward pass on the batch.
        documents: of the batch.

    Returns:
        Whether it could be tried: not where no row holds two documents, or all tokens are the same.

    Raises:
        ConfigurationError: a document depends on another one.
    """
    args, kwargs = call
    ids = kwargs.get("input_ids", args[0] if args else None)
    if not isinstance(ids, Tensor):
        return False
    vocabulary = torch.unique(ids)
    order = [sum(other.row == place.row for other in documents.places[:number]) for number, place in enumerate(documents.places)]
    if len(vocabulary) < 2 or max(order, default=0) == 0:
        return False
    others = vocabulary.roll(1)[torch.searchsorted(vocabulary, ids)]
    with _evaluated(decoder), torch.no_grad():
        before = _hidden(decoder, args, kwargs, ids)
        tolerance = max(TOLERANCE, 4 * torch.finfo(_precision(before)).eps)
        changes = []
        for parity in (0, 1):
            changed = ids.clone()
            for number, place in enumerate(documents.places):
                if order[number] % 2 == parity:
                    stretch = (place.row, slice(place.start, place.start + place.length))
                    changed[stretch] = others[stretch]
            squares = documents.sums((_hidden(decoder, args, kwargs, changed) - before).float().square().sum(-1))
            size = documents.sums(before.float().square().sum(-1)).clamp(min=torch.finfo(torch.float32).tiny)
            kept = torch.tensor([position % 2 != parity for position in order], device=squares.device)
            changes.append(torch.where(kept, (squares / size).sqrt(), 0).max())
    change = max(float(found) for found in changes)
    if not change <= tolerance:
        raise ConfigurationError(
            f"documents that share a row see each other: changing one changes the hidden states of another by {change:.1g}, so a document has no gradient of "
            "its own, and dual_select cannot choose among them; set attn_implementation to flash_attention_2, flex_attention or sdpa (layers without attention, "
            "such as Mamba's, need kernels that take document boundaries), or put each document into a row of its own (packing=False, padding_free=False; in "
            "Axolotl sample_packing: false)"
        )
    return True


def _hidden(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], ids: Tensor) -> Tensor:
    args, kwargs = (args, {**kwargs, "input_ids": ids}) if "input_ids" in kwargs else ((ids, *args[1:]), kwargs)
    output = decoder(*args, **kwargs)
    states: Tensor = next(states for states in (getattr(output, "last_hidden_state", None), output[0]) if states is not None)
    return states


def _precision(states: Tensor) -> torch.dtype:
    kind = states.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else states.dtype


@contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    """The model without dropout and without checkpointing, and afterwards as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
