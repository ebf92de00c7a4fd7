"""What an adapter is and whose model it was trained on: the provider's buffer and reinforcing LoRAs carry a record of both.

The kind is recorded twice: in `safety_adapter.json` beside the weights, and as a key in the adapter's `alpha_pattern`, which
survives where the file is lost (a checkpoint, a copy, a plain PEFT save).
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trl_safety.adapters.checkpoint import Checkpoint
from trl_safety.adapters.files import other_schema, replacing
from trl_safety.adapters.fingerprint import (
    CASTS,
    FINGERPRINT_ENTRIES,
    FULL_PRECISION_DIFFERENCE,
    NOT_VERIFIED,
    QUANTISED_DIFFERENCE,
    sample,
)
from trl_safety.adapters.folder import CONFIG, WEIGHTS, AdapterFolder
from trl_safety.adapters.lora import full_precision
from trl_safety.adapters.marks import kind_of
from trl_safety.adapters.names import match
from trl_safety.adapters.shards import CHECKED_ELSEWHERE, placeholders
from trl_safety.errors import AdapterError, CheckpointError, reason
from trl_safety.linalg.finite import is_finite
from trl_safety.version import __version__

RECORD = "safety_adapter.json"
SCHEMA_VERSION = 1
LAYERS_COMPARED = 8
"""How many layers of a stored checkpoint, which is read layer by layer; a loaded model is compared in all of them."""


@dataclass(frozen=True)
class AdapterRecord:
    """Kind and origin of an adapter.

    Attributes:
        kind: "buffer", "reinforce" or "user".
        base_model: name of the model that it was trained on.
        quantised: whether that model was loaded quantised, so that the samples are those of rounded weights.
        samples: module → 256 entries of the frozen weight, by which the model is recognised; empty if the adapter was adopted
            without its model, so that nothing can be compared.
    """

    kind: str
    base_model: str | None
    quantised: bool
    samples: dict[str, Tensor]
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    trl_safety: str = __version__
    schema_version: int = SCHEMA_VERSION

    @classmethod
    def of_layers(cls, kind: str, base_model: str | None, layers: Mapping[str, Any]) -> AdapterRecord:
        """The record of a loaded model's linear layers, by module name."""
        samples, quantised = _entries(layers)
        return cls(kind, base_model, quantised, samples)

    def text(self) -> str:
        """The content of `safety_adapter.json`."""
        facts = {**asdict(self), "samples": {name: entries.float().numpy().tobytes().hex() for name, entries in self.samples.items()}}
        return json.dumps(facts, indent=1) + "\n"

    def write(self, folder: Path) -> None:
        """Write the record beside an adapter. Raises `AdapterError` if the folder cannot be written to."""
        with replacing(folder / RECORD, error=AdapterError, setting="output folder") as temporary:
            temporary.write_text(self.text(), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> AdapterRecord:
        """Read the record beside an adapter.

        Raises:
            AdapterError: it is missing, damaged, or of another version.
        """
        path = folder / RECORD
        if not path.is_file():
            raise AdapterError(
                f"{str(folder)!r} has no {RECORD}, which says what model the adapter is for: make buffers with `trl-safety buffer` and "
                "reinforcing LoRAs with `trl-safety reinforce`, and keep their files together; adopt adapters trained elsewhere with `trl-safety adopt`"
            )
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
            if facts.get("schema_version") != SCHEMA_VERSION:
                again = "make the adapter again"
                raise AdapterError(
                    f"{str(path)!r}: {other_schema(facts.get('schema_version'), SCHEMA_VERSION, facts.get('trl_safety'), again)}"
                )
            samples = {name: torch.frombuffer(bytearray.fromhex(text), dtype=torch.float32) for name, text in facts["samples"].items()}
            for name, entries in samples.items():
                if entries.numel() != FINGERPRINT_ENTRIES or not is_finite(entries):
                    raise AdapterError(
                        f"{str(path)!r}: the samples of layer {name!r} are not {FINGERPRINT_ENTRIES} numbers; make the adapter again"
                    )
            return cls(**{**facts, "samples": samples})
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            if isinstance(error, AdapterError):
                raise
            raise AdapterError(f"{str(path)!r}: is damaged ({error}); make the adapter again") from error

    def check_layers(self, layers: Mapping[str, Any], setting: str) -> str:
        """Refuse a loaded model that is not the recorded one.

        Args:
            layers: module name, as recorded → the model's linear layer.
            setting: how the user named the adapter, for messages.

        Returns:
            What was verified, for the report.

        Raises:
            AdapterError: a layer's weights are another model's.
        """
        if placeholders() and self.samples:
            return CHECKED_ELSEWHERE
        entries, quantised = _entries({name: layer for name, layer in layers.items() if name in self.samples})
        return self._check(entries, quantised, setting, "the model")

    def check_record(self, other: AdapterRecord, setting: str, whose: str) -> str:
        """Refuse an adapter that was trained on another model; see `check_layers`."""
        found = match(self.samples, other.samples)
        return self._check({name: other.samples[to] for name, to in found.items() if to is not None}, other.quantised, setting, whose)

    def check_checkpoint(self, folder: str, setting: str) -> str:
        """Refuse a stored model that is not the recorded one; see `check_layers`."""
        if not self.samples:
            return self._check({}, False, setting, folder)
        checkpoint = Checkpoint(folder, quantised=True)
        # At random: every n-th layer would be the same kind of layer again and again.
        names = random.Random(0).sample(list(self.samples), min(LAYERS_COMPARED, len(self.samples)))  # noqa: S311  # no secret here
        found = {name: to for name, to in match(names, checkpoint.modules).items() if to is not None}
        read = {name: checkpoint.weight(to) for name, to in found.items()}
        entries = {name: sample(weight).float() for name, (weight, _) in read.items() if weight is not None}
        if found and not entries:
            raise CheckpointError(f"{folder!r} is stored quantised in a format that cannot be read: name the full-precision checkpoint")
        return self._check(entries, any(quantised for _, quantised in read.values()), setting, folder)

    def _check(self, entries: Mapping[str, Tensor], quantised: bool, setting: str, whose: str) -> str:
        if not self.samples:
            return f"{NOT_VERIFIED}: {setting} was adopted without its model ({self.base_model or 'unnamed'}), so {whose} was not compared with anything"
        if not entries:
            raise AdapterError(f"{setting}: none of its layers is in {whose}: it was trained on {self.base_model!r}, another kind of model")
        rounded = quantised or self.quantised
        limit = QUANTISED_DIFFERENCE if rounded else FULL_PRECISION_DIFFERENCE
        for name, found in entries.items():
            # Not `>`: a NaN must count as a difference, too.
            if not (apart := _distance(found, self.samples[name])) <= limit:
                raise AdapterError(
                    f"{setting}: was trained on {self.base_model!r}, whose layer {name!r} differs from that of {whose} by {apart:.1%}: use the adapter that was "
                    "made for this model"
                )
        certainty = ", up to quantisation, which is too coarse to tell close relatives apart" if rounded else ""
        return f"weights of {whose} match those of {self.base_model} in {len(entries)} layers{certainty}"


def open_kind(source: str | Path, kind: str, setting: str) -> tuple[AdapterFolder, AdapterRecord]:
    """Open a provider's adapter, from a folder or the Hub, and its record.

    Args:
        source: a folder, or a Hub id.
        kind: the kind that it has to be.
        setting: how the user named it.

    Raises:
        AdapterError: it is missing, damaged, of another kind, or holds more than LoRA factors.
    """
    folder = local_folder(source, setting)
    adapter = AdapterFolder.open(folder)
    record = AdapterRecord.read(folder)
    marked = kind_of(adapter.config)
    if record.kind != kind or marked != kind:
        raise AdapterError(f"{setting} = {str(source)!r}: is a {record.kind} adapter (marked {marked}), not a {kind} one: {REMEDY[kind]}")
    refuse_unusable(adapter, f"{setting} = {str(source)!r}")
    if record.samples and (missing := [name for name in adapter.factors if name not in record.samples]):
        raise AdapterError(f"{setting} = {str(source)!r}: its record does not know layer {missing[0]!r}: the files do not belong together")
    return adapter, record


def refuse_unusable(adapter: AdapterFolder, setting: str) -> None:
    """Refuse what cannot be a provider's adapter of any kind.

    Raises:
        AdapterError: it holds more than LoRA factors, or does nothing.
    """
    if adapter.others or adapter.config.lora_bias:
        other = next(iter(adapter.others), "lora_bias")
        raise AdapterError(f"{setting}: holds more than LoRA factors ({other!r}); train it without biases and modules_to_save")
    if adapter.is_zero:
        raise AdapterError(f"{setting}: its update is zero in every layer, so that it would do nothing: it was saved before it was trained")


REMEDY = {
    "buffer": "make one with `trl-safety buffer`, or adopt one with `trl-safety adopt --as buffer`",
    "reinforce": "make one with `trl-safety reinforce`, or adopt one with `trl-safety adopt --as reinforce`",
}


def local_folder(source: str | Path, setting: str) -> Path:
    """A folder as it is, or a Hub repository's adapter files, downloaded.

    Raises:
        AdapterError: there is no such folder or repository.
    """
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(source), allow_patterns=[CONFIG, WEIGHTS, RECORD]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise AdapterError(
            f"{setting} = {str(source)!r}: is neither a folder nor a Hub repository that can be reached ({reason(error)})"
        ) from error


def _entries(layers: Mapping[str, Any]) -> tuple[dict[str, Tensor], bool]:
    """Sampled entries of every layer's weight, dequantised one at a time, and whether any was quantised."""
    samples, quantised = {}, False
    for name, layer in layers.items():
        weight = full_precision(layer)
        if weight is None or weight.is_meta:
            raise AdapterError(
                f"layer {name!r}: its weight is stored in a format that cannot be read, so that the model cannot be recognised"
            )
        quantised |= weight is not layer.weight
        samples[name] = sample(weight).float()
    return samples, quantised


def _distance(one: Tensor, other: Tensor) -> float:
    """Relative distance of sampled entries, each as it is or cast as the other may have been."""
    norm = torch.linalg.vector_norm(other).clamp(min=1e-30)
    casts: Iterable[Tensor] = (torch.linalg.vector_norm(one.to(cast).float() - other.to(cast).float()) for cast in CASTS)
    return float(torch.stack(list(casts)).min() / norm)
