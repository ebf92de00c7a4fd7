"""Exchange the frozen weights of a live model, tensor by tensor, for weights computed from a pair of checkpoints, and back."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trl_safety.adapters.checkpoint import Checkpoint
from trl_safety.adapters.fingerprint import FULL_PRECISION_DIFFERENCE, QUANTISED_DIFFERENCE, Recognition, same_up_to_rounding, sample
from trl_safety.adapters.lora import full_precision, unwrap
from trl_safety.adapters.names import match, strip_wrappers
from trl_safety.adapters.shards import CHECKED_ELSEWHERE, is_sharded, placeholders, put, settle, whole
from trl_safety.errors import AdapterError, CheckpointError

LAYERS_COMPARED = 8
UNTOUCHED = {"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector", "modules_to_save"}


@dataclass(frozen=True)
class Place:
    """One frozen parameter: where it is in the model, and which tensors of the pair belong to it."""

    module: nn.Module
    attribute: str
    base: str
    aligned: str
    rows: int
    """How many rows (the first dimension) all three have; further rows of an embedding are left alone."""

    @property
    def parameter(self) -> Any:
        """The parameter as it is now; exchanging a quantised one replaces the object."""
        return getattr(self.module, self.attribute)


class WeightExchange:
    """Puts weights computed from W_aligned and W_base into a model's frozen parameters, and W_aligned back.

    Reads one tensor of each checkpoint at a time and writes in place, in the parameter's dtype and on its device; 4-bit
    parameters are quantised again as they were. Parameters that are trained (LoRA factors, whole modules) are not touched.

    Args:
        model: loaded from the aligned checkpoint, with or without an adapter.
        base: the unaligned model.
        aligned: the aligned model.
        embeddings: whether to exchange the embeddings and the output head, too.
        setting: how the user named the pair, for messages.

    Raises:
        CheckpointError: a frozen parameter is missing from one of the checkpoints, or has another shape there.
        AdapterError: the model is not the aligned one, is quantised in a way that cannot be repeated, or the two checkpoints are equal.
    """

    def __init__(self, model: nn.Module, base: Checkpoint, aligned: Checkpoint, *, embeddings: bool, setting: str) -> None:
        self._model = model
        self._base, self._aligned = base, aligned
        self._setting = setting
        self._verified = False
        self._written: list[Place] = []
        self.identity: str | None = None
        """A digest of entries of both checkpoints; None in a process that has none of the model's weights."""
        self.places = list(self._find(unwrap(model), embeddings))
        if not self.places:
            raise AdapterError(f"{setting}: the model has no frozen weight to exchange: nothing would be exchanged")
        self.check = self._compare()

    def _find(self, model: nn.Module, embeddings: bool) -> Iterator[Place]:
        inner: Any = model
        ends = (layer for layer in (inner.get_input_embeddings(), inner.get_output_embeddings()) if layer is not None)
        heads = {id(parameter) for layer in ends for parameter in layer.parameters()}
        seen: set[int] = set()
        found: dict[str, tuple[nn.Module, str, Any]] = {}
        parameters, weights = set(), set()
        for path, module in model.named_modules():
            if UNTOUCHED & set(path.split(".")):
                continue
            weights.add(_stored_name(f"{path}.weight"))
            for attribute, parameter in module.named_parameters(recurse=False):
                name = _stored_name(f"{path}.{attribute}")
                parameters.add(name)
                if id(parameter) in seen or parameter.requires_grad or (id(parameter) in heads and not embeddings):
                    continue
                seen.add(id(parameter))
                found[name] = module, attribute, parameter
        stored_as = [checkpoint.parameters for checkpoint in (self._base, self._aligned)]
        hidden = match(sorted(weights - parameters), stored_as[1])
        if packed := [name for name, there in hidden.items() if there is not None and len(self._aligned.shape(stored_as[1][there])) > 1]:
            raise AdapterError(
                f"{self._setting}: the model keeps {packed[0]!r} in a form that is not a parameter (GPTQ, AWQ, EETQ) and cannot be exchanged: load the model "
                "in 4 bits (bitsandbytes) or full precision, or use how: low_rank"
            )
        places = [{name: known.get(to or "") for name, to in match(found, known).items()} for known in stored_as]
        for name, (module, attribute, parameter) in found.items():
            stored = [place[name] for place in places]
            if stored[0] is None or stored[1] is None:
                source = self._base.source if stored[0] is None else self._aligned.source
                raise CheckpointError(f"{self._setting}: the model's {name!r} is not in {source!r}: name this model's pair")
            kind = type(parameter).__name__
            if not parameter.is_floating_point() and kind != "Params4bit":
                raise AdapterError(
                    f"{name!r} is stored as {kind} {parameter.dtype}, which cannot be quantised again: load the model in 4 bits (bitsandbytes) or full "
                    "precision, or use how: low_rank"
                )
            shape = tuple(parameter.quant_state.shape if kind == "Params4bit" else parameter.shape)
            shapes = [self._base.shape(stored[0]), self._aligned.shape(stored[1])]
            rows = min(shape[0], shapes[0][0], shapes[1][0])
            if any(other[1:] != shape[1:] or (other[0] != shape[0] and id(parameter) not in heads) for other in shapes):
                raise CheckpointError(
                    f"{self._setting}: the model's {name!r} is {list(shape)}, but {list(shapes[0])} in the base and {list(shapes[1])} in the aligned checkpoint: "
                    "name this model's pair"
                )
            yield Place(module, attribute, stored[0], stored[1], rows)

    def _compare(self) -> str:
        """Check some of the places before training; `put` checks all of them."""
        if placeholders():
            return CHECKED_ELSEWHERE
        places = [i for i, place in enumerate(self.places) if place.parameter.ndim == 2]
        compared = random.Random(0).sample(places, min(LAYERS_COMPARED, len(places)))  # noqa: S311  # no secret here
        recognition, differs, digest = Recognition(), False, hashlib.sha256()
        for i, place in enumerate(self.places):
            base, aligned = self._base.tensor(place.base)[: place.rows], self._aligned.tensor(place.aligned)[: place.rows]
            differs = differs or not same_up_to_rounding(base, aligned)
            entries = torch.stack([sample(base), sample(aligned)]).float()
            digest.update(entries.cpu().numpy().tobytes())
            if type(place.parameter).__name__ == "Params4bit":
                weight = full_precision(place.module)
                assert weight is not None  # noqa: S101  # refused when it was found
                if recognition.add(weight[: place.rows], entries, quantised=True):
                    raise self._another(place)
            elif i in compared:
                self._is_aligned(place, aligned)
        if not differs:
            raise AdapterError(
                f"{self._setting}: {self._base.source!r} and {self._aligned.source!r} do not differ by more than rounding: V would be zero"
            )
        if recognition.unaligned:
            raise AdapterError(
                f"{self._setting}: the model looks like {self._base.source!r} rather than {self._aligned.source!r}, as far as its quantisation shows: load "
                "the aligned model of the pair, and check that base and aligned are not swapped"
            )
        self.identity = digest.hexdigest()
        return f"weights match {self._aligned.source}{recognition.qualifier}"

    @property
    def resized(self) -> bool:
        """Whether the model's vocabulary differs from the aligned checkpoint's, so that PEFT saves the embeddings with every adapter."""
        return any(_rows(place.parameter) != self._aligned.shape(place.aligned)[0] for place in self.places)

    def _is_aligned(self, place: Place, aligned: Tensor) -> None:
        """Check that sampled entries of the model's parameter match the aligned checkpoint's, up to a cast or to quantisation."""
        weight = full_precision(place.module) if place.attribute == "weight" else place.parameter
        assert weight is not None  # noqa: S101  # refused when it was found
        ours, theirs = (sample(tensor[: place.rows]).float() for tensor in (whole(weight), aligned.to(weight.dtype)))
        limit = QUANTISED_DIFFERENCE if weight is not place.parameter else FULL_PRECISION_DIFFERENCE
        if not float(torch.linalg.vector_norm(ours - theirs)) <= limit * float(torch.linalg.vector_norm(theirs)):
            raise self._another(place)

    def _another(self, place: Place) -> AdapterError:
        return AdapterError(
            f"{self._setting}: the model's {place.aligned!r} is not that of {self._aligned.source!r}: load the aligned model of the pair, and train that"
        )

    @torch.no_grad()
    def put(self, compute: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Write compute(W_aligned, W_base) into every place.

        Raises:
            AdapterError: a place holds weights other than the aligned checkpoint's, which could not be put back later. It and those
                after it stay as they are.
        """
        settle(self._model)
        for place in self.places:
            aligned = self._aligned.tensor(place.aligned)
            if not self._verified:
                self._is_aligned(place, aligned)
            self._written.append(place)
            _write(place, compute(aligned[: place.rows], self._base.tensor(place.base)[: place.rows]))
        self._verified = True

    @torch.no_grad()
    def put_back(self, *, gather: bool = True) -> None:
        """Write W_aligned into every place that was written to.

        Args:
            gather: whether the other processes take part, to gather a sharded tensor of which only some rows are written.
        """
        settle(self._model)
        while self._written:
            place = self._written[-1]
            if gather or not _partial(place):
                _write(place, self._aligned.tensor(place.aligned)[: place.rows])
            self._written.pop()


def _stored_name(name: str) -> str:
    """The name that a parameter was loaded under, without the wrappers of LoRA, modules_to_save and trainable_token_indices."""
    return strip_wrappers(name.replace(".original_module", "").replace(".token_adapter", ""))


def _rows(parameter: Any) -> int:
    return int(parameter.quant_state.shape[0] if type(parameter).__name__ == "Params4bit" else parameter.shape[0])


def _partial(place: Place) -> bool:
    """Whether a sharded parameter must be gathered, because some of its rows stay as they are."""
    return is_sharded(place.parameter) and place.rows < place.parameter.shape[0]


def _write(place: Place, value: Tensor) -> None:
    parameter = place.parameter
    if type(parameter).__name__ != "Params4bit":
        if _partial(place):
            everything = whole(parameter).clone()
            everything[: place.rows] = value.to(everything)
            put(parameter, everything)
        elif is_sharded(parameter):
            put(parameter, value)
        else:
            parameter.data[: place.rows].copy_(value.to(parameter.dtype))
        return
    from bitsandbytes.nn import Params4bit

    state = parameter.quant_state
    quantised = Params4bit(
        value.to(state.dtype).contiguous(),
        requires_grad=False,
        quant_type=parameter.quant_type,
        blocksize=parameter.blocksize,
        compress_statistics=parameter.compress_statistics,
        quant_storage=parameter.quant_storage,
    ).to(parameter.device)
    parameter.data = quantised.data
    parameter.quant_state = quantised.quant_state
    if hasattr(place.module, "quant_state"):
        place.module.quant_state = quantised.quant_state
