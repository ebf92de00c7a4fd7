"""`safety_report.json`: what protected an adapter, what was measured and done in every layer, and what was left alone."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from types import MethodType
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trl_safety import __version__
from trl_safety.adapters.files import replacing, sha256
from trl_safety.adapters.folder import WEIGHTS
from trl_safety.adapters.subspace import AlignmentSubspace
from trl_safety.errors import ReportError

REPORT = "safety_report.json"
SCHEMA_VERSION = 1
CARD_START, CARD_END = "<!-- trl-safety -->", "<!-- /trl-safety -->"

SOURCES = {
    "asft": "AsFT, arXiv 2506.08473",
    "safe_lora": "Safe LoRA, arXiv 2405.16833",
    "csulora": "CSULoRA, arXiv 2605.30640 (reconstruction: its formula is not public)",
}


class LayerReport(BaseModel):
    """One adapted layer under one method."""

    model_config = ConfigDict(extra="forbid")

    action: Literal["penalised", "corrected", "left_alone"]
    reason: str | None = None
    measured: dict[str, float] = Field(default_factory=dict)


class MethodReport(BaseModel):
    """One method: its settings and what it did."""

    model_config = ConfigDict(extra="forbid")

    name: str
    source: str
    reconstruction: bool
    settings: dict[str, Any]
    acted: bool
    summary: str
    layers: dict[str, LayerReport]


class SafetyReport(BaseModel):
    """Everything that a user, or a pipeline, needs to know about the protection of one adapter."""

    model_config = ConfigDict(extra="forbid")

    schema_version: int = SCHEMA_VERSION
    trl_safety: str = __version__
    created: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    stage: Literal["training", "final"]
    """"training": a checkpoint on the way, which no correction has touched."""
    protected: bool
    base_model: str | None
    base_check: str
    subspace: dict[str, Any]
    methods: list[MethodReport]
    skipped: dict[str, str] = Field(default_factory=dict)
    not_covered: list[str] = Field(default_factory=list)
    """Trainable parameters that are no LoRA factor of a covered layer: trained, and protected by no method."""
    adapter_sha256: str | None = None

    def card_section(self) -> str:
        """The section for the adapter's model card, in Markdown."""
        state = "A safety method acted on this adapter" if self.protected else "This adapter is NOT protected"
        lines = [
            CARD_START,
            "## Safety",
            "",
            f"**{state}** (trl-safety {self.trl_safety}, stage: {self.stage}). That is no proof of safety: evaluate it.",
        ]
        lines += [f"- {method.source}: {method.summary}" for method in self.methods]
        lines.append(f"- Alignment subspace: `{self.subspace['base']}` → `{self.subspace['aligned']}`, {self.subspace['cut']}")
        lines.append(f"- Base model: {self.base_check}")
        if self.skipped:
            lines.append(f"- Left alone on request: {', '.join(self.skipped)}")
        if self.not_covered:
            lines.append(f"- Trained, but covered by no method: {len(self.not_covered)} parameters (see the report)")
        lines += ["", f"`trl-safety verify` checks this folder against `{REPORT}`.", CARD_END]
        return "\n".join(lines)


def describe_subspace(subspace: AlignmentSubspace) -> dict[str, Any]:
    """A subspace's provenance as the report carries it."""
    return {**asdict(subspace.provenance), "identity": subspace.identity, "layers": len(subspace.layers)}


def write_report(folder: Path, report: SafetyReport) -> None:
    """Write the report beside the adapter in `folder`, with the adapter's hash, and its section into the model card.

    Raises:
        ReportError: the adapter was not saved as safetensors, or the folder cannot be written to.
    """
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise ReportError(f"{str(folder)!r} holds no {WEIGHTS}: save the adapter with safe_serialization=True, pickles are not supported")
    report = report.model_copy(update={"adapter_sha256": sha256(weights)})
    with replacing(folder / REPORT, error=ReportError, setting="output folder") as temporary:
        temporary.write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
    add_to_card(folder / "README.md", report)


def add_to_card(card: Path, report: SafetyReport) -> None:
    """Put the report's section into a model card, in place of an earlier one."""
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    with replacing(card, error=ReportError, setting="model card") as temporary:
        temporary.write_text(with_section(text, report), encoding="utf-8")


def with_section(text: str, report: SafetyReport) -> str:
    """A model card's text with the report's section, in place of an earlier one."""
    text = re.sub(rf"\n*{re.escape(CARD_START)}.*?{re.escape(CARD_END)}\n*", "\n", text, flags=re.DOTALL).rstrip()
    return f"{text}\n\n{report.card_section()}\n".lstrip()


def read_report(folder: str | Path) -> SafetyReport:
    """Read the report beside an adapter.

    Raises:
        ReportError: there is none (nothing of ours protected the adapter), or it is damaged or of another version.
    """
    path = Path(folder) / REPORT
    if not path.is_file():
        raise ReportError(
            f"adapter = {str(folder)!r}: has no {REPORT}, so that no method of trl-safety protected it: train it with SafeSFTTrainer or the "
            "plugin, or correct it with `trl-safety correct`"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content.get("schema_version") if isinstance(content, dict) else None
        if version != SCHEMA_VERSION:
            raise ReportError(f"{str(path)!r}: has schema version {version!r}, this trl-safety reads {SCHEMA_VERSION}")
        return SafetyReport.model_validate(content)
    except (OSError, ValidationError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ReportError(
            f"{str(path)!r}: is damaged ({str(error).splitlines()[0]}); the adapter cannot be trusted, correct or train it again"
        ) from error


def verify(folder: str | Path) -> SafetyReport:
    """Check that an adapter folder is protected and is what its report describes.

    Raises:
        ReportError: no report, a file changed since, a checkpoint that is not corrected yet, or no method acted.
    """
    report = read_report(folder)
    weights = Path(folder) / WEIGHTS
    if not weights.is_file():
        raise ReportError(f"adapter = {str(folder)!r}: has a report but no {WEIGHTS}")
    if sha256(weights) != report.adapter_sha256:
        raise ReportError(f"{str(weights)!r}: has changed since {REPORT} was written; correct or train the adapter again")
    if not report.protected:
        why = "; ".join(f"{method.name}: {method.summary}" for method in report.methods)
        stage = " It is a checkpoint on the way: corrections act when training ends." if report.stage == "training" else ""
        raise ReportError(f"adapter = {str(folder)!r}: is NOT protected ({why}).{stage}")
    return report


def attach_report(model: Any, adapter: str, provider: Callable[[], SafetyReport]) -> None:
    """Make `model.save_pretrained` write the report beside the adapter from now on, whoever calls it.

    A Trainer's callbacks are not told of `save_model()`, and a report that only one way of saving writes would be missing
    where it is needed. The wrapper is a bound method on the instance, so that a deep copy of the model gets its own.
    """
    model._trl_safety_report = (adapter, provider)
    model.save_pretrained = MethodType(save_pretrained, model)


def detach_report(model: Any) -> None:
    """Undo `attach_report`."""
    vars(model).pop("save_pretrained", None)
    vars(model).pop("_trl_safety_report", None)


def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
    """The model's own `save_pretrained`, followed by the safety report in the adapter's folder."""
    original = type(self).save_pretrained
    call = inspect.signature(original).bind(self, *args, **kwargs)
    result = original(self, *args, **kwargs)
    call.apply_defaults()
    adapter, provider = self._trl_safety_report
    selected = call.arguments.get("selected_adapters")
    if call.arguments.get("is_main_process", True) and (selected is None or adapter in selected):
        folder = Path(call.arguments["save_directory"])
        # PEFT puts every adapter but the default one into a folder of its own.
        nested = folder / adapter
        write_report(nested if (nested / WEIGHTS).is_file() else folder, provider())
    return result
