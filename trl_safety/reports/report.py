"""`safety_report.json`: what protected an adapter, what was measured and done in every layer, and what was left alone."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trl_safety.adapters.files import other_schema, replacing, sha256
from trl_safety.adapters.folder import CONFIG, WEIGHTS, AdapterFolder, read_config
from trl_safety.adapters.marks import KINDS, kind_of
from trl_safety.errors import AdapterError, ReportError, reason
from trl_safety.subspace.artifact import AlignmentSubspace
from trl_safety.subspace.layer import subspace_origin
from trl_safety.version import __version__

REPORT = "safety_report.json"

SCHEMA_VERSION = 1

MEANINGLESS = {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type"}
"""Keys of `adapter_config.json` that users and tools rewrite without changing what the adapter does."""

NO_UPDATE = "its update is zero in every layer, so no method had anything to act on: train the adapter"

AS_IT_IS = "surrogateescape"
"""How bytes that are not UTF-8 are read and written."""

CARD_START, CARD_END = "<!-- trl-safety -->", "<!-- /trl-safety -->"


STRICT = ConfigDict(extra="forbid", ser_json_inf_nan="strings")
"""JSON has no NaN or infinity: such measurements, of an adapter that diverged, are written as strings and read back as numbers."""


class LayerReport(BaseModel):
    """One adapted layer under one method."""

    model_config = STRICT

    action: str
    """"steered", "penalised", "held", "corrected", "buffered", "merged", or another method's own word; "left_alone" if nothing was done."""
    reason: str | None = None
    measured: dict[str, float] = Field(default_factory=dict)


class MethodReport(BaseModel):
    """One method: its settings and what it did."""

    model_config = STRICT

    name: str
    source: str
    reconstruction: bool
    settings: dict[str, Any]
    acted: bool
    summary: str
    steps: tuple[int, int] | None = None
    """First and last optimizer step in which the method acted, if it acts during training."""
    layers: dict[str, LayerReport]


class SafetyReport(BaseModel):
    """Everything that a user, or a pipeline, needs to know about the protection of one adapter."""

    model_config = STRICT

    schema_version: int = SCHEMA_VERSION
    trl_safety: str = __version__
    created: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    stage: Literal["training", "final"]
    """"training": a checkpoint saved during training, before any correction."""
    protected: bool
    base_model: str | None
    base_check: str
    subspace: dict[str, Any] | None
    """None if no method reads an alignment subspace."""
    methods: list[MethodReport]
    skipped: dict[str, str] = Field(default_factory=dict)
    not_covered: list[str] = Field(default_factory=list)
    """Trainable parameters other than the covered layers' LoRA factors: trained, but protected by no method."""
    switched_off: list[str] = Field(default_factory=list)
    """Options of the trainer that were switched off because they would keep a method from acting."""
    adapter_sha256: str | None = None
    config_sha256: str | None = None
    """Hash of the options in `adapter_config.json` that decide what the weights mean."""

    def text(self) -> str:
        """The content of `safety_report.json`."""
        # An older version refuses to read a field that it does not know.
        return self.model_dump_json(indent=2, exclude=None if self.switched_off else {"switched_off"}) + "\n"

    def card_section(self) -> str:
        """The section for the adapter's model card, in Markdown."""
        state = "A safety method acted on this adapter" if self.protected else "This adapter is NOT protected"
        lines = [
            "## Safety",
            "",
            f"**{state}** (trl-safety {self.trl_safety}, stage: {self.stage}). This is not proof of safety: evaluate it.",
        ]
        lines += [f"- {method.source}: {method.summary}" for method in self.methods]
        if self.subspace is not None:
            lines.append(f"- Alignment subspace: {subspace_origin(self.subspace, '`{}`'.format)}, {self.subspace['cut']}")
        lines.append(f"- Base model: {self.base_check}")
        lines += [f"- {text}" for text in self.switched_off]
        if self.skipped:
            lines.append(f"- Left alone on request: {', '.join(self.skipped)}")
        if self.not_covered:
            lines.append(f"- Trained, but covered by no method: {len(self.not_covered)} parameters (see the report)")
        lines += ["", f"`trl-safety verify` checks this folder against `{REPORT}`."]
        return "\n".join(lines)


def came_with(norm: float, *, covered: bool = False) -> str:
    """A note on an adapter that was trained before the run; `covered` if the method acts on the whole update."""
    return f"the adapter came with an update of norm {norm:.3g}" + ("" if covered else ", which was trained without it")


def describe_subspace(subspace: AlignmentSubspace | None) -> dict[str, Any] | None:
    """A subspace's provenance, as recorded in the report."""
    if subspace is None:
        return None
    return {**asdict(subspace.provenance), "identity": subspace.identity, "layers": len(subspace.layers)}


def write_report(folder: Path, report: SafetyReport) -> None:
    """Write the report, with the adapter's hashes, beside the adapter in `folder`, and add its section to the model card.

    Raises:
        ReportError: the adapter was not saved as safetensors, or the folder cannot be written to.
    """
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise ReportError(f"{str(folder)!r} holds no {WEIGHTS}: save the adapter with safe_serialization=True, pickles are not supported")
    report = settled(report, folder)
    with replacing(folder / REPORT, error=ReportError, setting="output folder") as temporary:
        temporary.write_text(report.text(), encoding="utf-8")
    add_to_card(folder / "README.md", report)


def settled(report: SafetyReport, folder: Path) -> SafetyReport:
    """The report of the adapter in a folder: with its hashes, and not as protected if the adapter has no update at all or cannot be read.

    Raises:
        ReportError: the adapter's configuration cannot be read.
    """
    # Every adapter keeps its report, even one that cannot be read.
    try:
        why = NO_UPDATE if AdapterFolder.open(folder).is_zero else None
    except AdapterError as error:
        why = str(error)
    if why is not None and report.protected:
        report = not_acted(report, why)
    return report.model_copy(update=fingerprints(folder))


def fingerprints(folder: Path) -> dict[str, str]:
    """The hashes by which a report identifies its adapter: of the weights, and of the options that decide what they mean.

    Raises:
        ReportError: the adapter's configuration cannot be read.
    """
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ReportError(f"{str(folder / CONFIG)!r} is not valid JSON ({reason(error)}): save the adapter again") from error
    if not isinstance(config, dict):
        raise ReportError(f"{str(folder / CONFIG)!r} holds a {type(config).__name__} where an object is expected: save the adapter again")
    return {"adapter_sha256": sha256(folder / WEIGHTS), "config_sha256": hashlib.sha256(meaning(config).encode()).hexdigest()}


def meaning(config: Mapping[str, Any]) -> str:
    """The options of an adapter's configuration that decide what its weights mean, as text."""
    options = {
        key: sorted(value, key=str) if isinstance(value, list | set | tuple) else value
        for key, value in config.items()
        if key not in MEANINGLESS and value
    }
    return json.dumps(options, sort_keys=True, default=str)


def describes(report: SafetyReport, folder: Path) -> bool:
    """Whether the adapter in the folder is the one that the report was written for."""
    return fingerprints(folder) == {"adapter_sha256": report.adapter_sha256, "config_sha256": report.config_sha256}


def changed_since(report: SafetyReport) -> SafetyReport:
    """The report of an adapter that was changed after the methods had acted, for example by further training."""
    return not_acted(report, "the adapter was changed afterwards, without protection")


def not_acted(report: SafetyReport, why: str) -> SafetyReport:
    """The report changed to not protected, with the reason."""
    note = f"; BUT {why}"
    methods = [
        method.model_copy(update={"acted": False, "summary": method.summary if why in method.summary else method.summary + note})
        for method in report.methods
    ]
    return report.model_copy(update={"protected": False, "methods": methods})


def add_to_card(card: Path, report: SafetyReport) -> None:
    """Add the report's section to a model card, replacing an earlier one."""
    add_section(card, report.card_section())


def add_section(card: Path, section: str) -> None:
    """Add a section of ours to a model card, replacing an earlier one."""
    text = read_card(card)
    with replacing(card, error=ReportError, setting="model card") as temporary:
        temporary.write_text(_replaced(text, section), encoding="utf-8", errors=AS_IT_IS)


def read_card(card: Path) -> str:
    """A model card's text, to be written with the same `errors`; empty if there is no card. Bytes that are not UTF-8 are kept."""
    return card.read_text(encoding="utf-8", errors=AS_IT_IS) if card.is_file() else ""


def with_section(text: str, report: SafetyReport) -> str:
    """A model card's text with the report's section, replacing an earlier one."""
    return _replaced(text, report.card_section())


def _replaced(text: str, section: str) -> str:
    text = re.sub(rf"\n*{re.escape(CARD_START)}.*?{re.escape(CARD_END)}\n*", "\n", text, flags=re.DOTALL).rstrip()
    return f"{text}\n\n{CARD_START}\n{section}\n{CARD_END}\n".lstrip()


def read_report(folder: str | Path) -> SafetyReport:
    """Read the report beside an adapter.

    Raises:
        ReportError: there is none (nothing of ours protected the adapter), or it is damaged or of another version.
        AdapterError: there is none, and the adapter's configuration cannot be read.
    """
    path = Path(folder) / REPORT
    if not Path(folder).is_dir():
        raise ReportError(f"adapter = {str(folder)!r}: no such folder; give the folder of a saved adapter")
    if not path.is_file():
        if (Path(folder) / CONFIG).is_file() and (kind := kind_of(read_config(Path(folder) / CONFIG))) in KINDS:
            raise ReportError(f"adapter = {str(folder)!r}: is {KINDS[kind]}; give the user's adapter")
        raise ReportError(
            f"adapter = {str(folder)!r}: has no {REPORT}, so no method of trl-safety protected it: train it with SafeSFTTrainer or the "
            "plugin, or correct it with `trl-safety correct`"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content.get("schema_version") if isinstance(content, dict) else None
        if version != SCHEMA_VERSION:
            wrote = content.get("trl_safety") if isinstance(content, dict) else None
            raise ReportError(f"{str(path)!r}: {other_schema(version, SCHEMA_VERSION, wrote, 'correct or train the adapter again')}")
        return SafetyReport.model_validate(content)
    except (OSError, ValidationError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ReportError(
            f"{str(path)!r}: is damaged ({reason(error)}); the adapter cannot be trusted, correct or train it again"
        ) from error


def verify(folder: str | Path) -> SafetyReport:
    """Check that a saved adapter is protected and matches its report.

    Raises:
        ReportError: there is no report, a file changed since, the adapter is a checkpoint that is not corrected yet, no method acted, or
            the adapter has no update to act on.
        AdapterError: the adapter cannot be read, has names that PEFT does not load, or holds values that are not finite.
    """
    report = read_report(folder)
    weights = Path(folder) / WEIGHTS
    if not weights.is_file():
        raise ReportError(f"adapter = {str(folder)!r}: has a report but no {WEIGHTS}")
    if not (Path(folder) / CONFIG).is_file():
        raise ReportError(f"adapter = {str(folder)!r}: has a report but no {CONFIG}")
    if not describes(report, Path(folder)):
        raise ReportError(f"{str(weights)!r} or {CONFIG} has changed since {REPORT} was written; correct or train the adapter again")
    if not report.protected:
        why = "; ".join(f"{method.name}: {method.summary}" for method in report.methods)
        stage = " It was saved during training: corrections and merges act when training ends." if report.stage == "training" else ""
        raise ReportError(f"adapter = {str(folder)!r}: is NOT protected ({why}).{stage}")
    if AdapterFolder.open(folder).is_zero:
        raise ReportError(f"adapter = {str(folder)!r}: is NOT protected: {NO_UPDATE}")
    return report
