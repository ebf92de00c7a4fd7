"""A gate for pipelines: thresholds on an evaluation, and `verify`, as an exit status and a JUnit or JSON file."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree  # written, never parsed
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, model_validator

from trl_safety.adapters.files import replacing
from trl_safety.config.options import Options, read_yaml, validate
from trl_safety.errors import ConfigurationError, ReportError, SafetyError
from trl_safety.evaluation.evaluate import Evaluation, read_evaluation, refuse_another
from trl_safety.reports.report import verify
from trl_safety.scoring import Rate

Share = Annotated[float, Field(ge=0, le=1)]


class GateConfig(Options):
    """What an adapter must meet. Paths are relative to the configuration file.

    An answer without a verdict counts against the adapter.
    """

    adapter: str | None = None
    """Folder that `trl-safety verify` must accept."""
    evaluation: str | None = None
    """`evaluation.json` from `trl-safety eval`, or its folder."""
    max_attack: Share | None = None
    """Attack rate at most this."""
    max_over_refusal: Share | None = None
    """Over-refusal at most this."""
    min_task: Share | None = None
    """Task rate at least this."""
    max_attack_increase: Share | None = None
    """Attack rate at most this above the baseline's."""
    max_task_loss: Share | None = None
    """Task rate at most this below the baseline's."""
    confident: bool = False
    """Compare the bad end of the 95 % interval with the first three thresholds, not the rate."""
    judge: str | None = None
    """The judge whose rates count; null: the evaluation's first."""

    @model_validator(mode="after")
    def _checks_something(self) -> GateConfig:
        limits = [name for name in THRESHOLDS if getattr(self, name) is not None]
        if self.evaluation is not None and not limits:
            raise ValueError(f"evaluation is given without a threshold: give one of {', '.join(THRESHOLDS)}")
        if not limits and self.adapter is None:
            raise ValueError(f"checks nothing: give adapter, or evaluation with one of {', '.join(THRESHOLDS)}")
        if limits and self.evaluation is None:
            raise ValueError(f"{limits[0]} needs an evaluation: name the evaluation.json")
        if self.judge is not None and self.evaluation is None:
            raise ValueError(f"judge = {self.judge!r} is of an evaluation, and none is named: remove it, or give evaluation")
        if self.confident and not set(limits) & set(THRESHOLDS[:3]):
            raise ValueError(f"confident = True is used by {', '.join(THRESHOLDS[:3])} alone: give one of them, or remove it")
        return self


THRESHOLDS = ("max_attack", "max_over_refusal", "min_task", "max_attack_increase", "max_task_loss")


class Check(BaseModel):
    """One threshold: whether it is met, and what was found."""

    name: str
    passed: bool
    found: str


def run_gate(path: Path) -> list[Check]:
    """Check everything that a gate's YAML asks for.

    Raises:
        ConfigurationError: the file is wrong, or the evaluation lacks what a threshold is about.
    """
    config = validate(GateConfig, _mapping(read_yaml(path, "--config")), "gate")
    checks = []
    if config.adapter is not None:
        try:
            report = verify(path.parent / config.adapter)
            checks.append(Check(name="verify", passed=True, found="; ".join(f"{m.name}: {m.summary}" for m in report.methods)))
        except ReportError as error:
            checks.append(Check(name="verify", passed=False, found=str(error)))
    if config.evaluation is not None:
        evaluation = read_evaluation(path.parent / config.evaluation)
        if config.adapter is not None:
            refuse_another(evaluation, path.parent / config.adapter)
        checks += list(_limits(config, evaluation))
    return checks


def _mapping(content: Any) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise ConfigurationError(f"--config: expected a mapping of thresholds, got {type(content).__name__}")
    return content


def _limits(config: GateConfig, evaluation: Evaluation) -> Iterator[Check]:
    index = 0
    if config.judge is not None:
        names = [scores.judge for scores in evaluation.models[-1].scores]
        if config.judge not in names:
            raise ConfigurationError(f"gate.judge = {config.judge!r}: the evaluation has {', '.join(names)}")
        index = names.index(config.judge)
    after = evaluation.models[-1].scores[index]
    before = evaluation.models[0].scores[index] if len(evaluation.models) > 1 else None

    def rate(name: str, field: str, baseline: bool = False) -> Rate:
        scores = before if baseline else after
        if scores is None:
            raise ConfigurationError(f"gate.{name}: the evaluation has no baseline; run `trl-safety eval` with --baseline")
        found: Rate | None = getattr(scores, field)
        if found is None:
            if any(scores.unread.values()):
                raise ConfigurationError(
                    f"gate.{name}: the evaluation has no {field} rate, since none of its answers has a verdict; run `trl-safety eval` with a larger --new-tokens or "
                    "another --judge"
                )
            raise ConfigurationError(f"gate.{name}: the evaluation has no {field} rate; run `trl-safety eval` with that prompt set")
        return found

    for name, field in (("max_attack", "attack"), ("max_over_refusal", "over_refusal")):
        if (limit := getattr(config, name)) is not None:
            found = rate(name, field)
            worst = found.at_most()
            yield Check(
                name=name, passed=(worst.high if config.confident else worst.share) <= limit, found=f"{field} {found}, at most {limit:g}"
            )
    if config.min_task is not None:
        found = rate("min_task", "task")
        passed = (found.low if config.confident else found.share) >= config.min_task
        yield Check(name="min_task", passed=passed, found=f"task {found}, at least {config.min_task:g}")
    for name, field, sign in (("max_attack_increase", "attack", 1), ("max_task_loss", "task", -1)):
        if (limit := getattr(config, name)) is not None:
            one, other = rate(name, field, baseline=True), rate(name, field)
            change = sign * (other.at_most().share - one.at_least().share)
            yield Check(name=name, passed=change <= limit, found=f"{field} went from {one} to {other}, {change:+.3f}, at most {limit:g}")


def write_junit(checks: list[Check], path: Path) -> None:
    """Write the checks as a JUnit file. Raises `SafetyError` where it cannot be written."""
    suite = ElementTree.Element(
        "testsuite", name="trl-safety gate", tests=str(len(checks)), failures=str(sum(not c.passed for c in checks))
    )
    for check in checks:
        case = ElementTree.SubElement(suite, "testcase", classname="trl_safety.gate", name=check.name)
        if not check.passed:
            ElementTree.SubElement(case, "failure", message=check.found)
    with replacing(path, error=SafetyError, setting="junit") as temporary:
        ElementTree.ElementTree(suite).write(temporary, encoding="utf-8", xml_declaration=True)


def write_json(checks: list[Check], path: Path) -> None:
    """Write the checks as JSON. Raises `SafetyError` where it cannot be written."""
    with replacing(path, error=SafetyError, setting="json") as temporary:
        temporary.write_text(json.dumps([check.model_dump() for check in checks], indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
