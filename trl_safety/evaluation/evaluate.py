"""Is my model still safe, and what did safety cost? One model, or before and after, under one judge or several."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from peft import PeftModel
from pydantic import BaseModel, Field

from trl_safety.adapters.files import replacing, sha256
from trl_safety.adapters.folder import WEIGHTS, AdapterFolder
from trl_safety.adapters.marks import refuse_provider
from trl_safety.errors import AdapterError, ConfigurationError, SafetyError
from trl_safety.evaluation.judges import Agreement, agreements
from trl_safety.evaluation.loading import check_loaded
from trl_safety.scoring import Judge, Kind, Prompt, Scores, complete, judged, paired_p_value
from trl_safety.version import __version__

ALIGNED = "aligned"
"""The baseline without any adapter."""


class Evaluated(BaseModel):
    """One model: its name, its scores under every judge, and what benchmarks gave."""

    name: str
    scores: list[Scores]
    benchmarks: dict[str, dict[str, float]] = Field(default_factory=dict)
    """Task → metric → value, of other people's benchmarks."""


Completed = tuple[Evaluated, list[dict[str, Any]]]
"""A model's scores, and a row per prompt with its completion and every judge's verdict."""
Benchmarks = Callable[[Any, Any], dict[str, dict[str, float]]]


class Evaluation(BaseModel):
    """One model, or two on the same prompts, with the judges' agreement.

    Attributes:
        models: the model; before it its baseline, where there is one.
        p_values: set → the exact McNemar test of after against before, under the first judge.
        agreement: of the judges, on the harmful prompts of all models together.
        counts: prompts of each set.
    """

    trl_safety: str = __version__
    model: str
    adapter: str | None
    adapter_sha256: str | None = None
    baseline: str | None
    models: list[Evaluated]
    p_values: dict[str, float]
    agreement: list[Agreement]
    counts: dict[str, int]
    seconds: float

    @property
    def after(self) -> Scores:
        """The model's scores under the first judge."""
        return self.models[-1].scores[0]

    @property
    def before(self) -> Scores | None:
        """The baseline's."""
        return self.models[0].scores[0] if len(self.models) > 1 else None


def evaluate(
    model: Any,
    tokenizer: Any,
    sets: Mapping[Kind, Sequence[Prompt]],
    judges: Sequence[Judge],
    *,
    name: str,
    adapter: str | None = None,
    baseline: str | Completed | None = None,
    benchmarks: Benchmarks | None = None,
    new_tokens: int = 64,
    batch_size: int = 32,
) -> tuple[Evaluation, list[dict[str, Any]]]:
    """Complete all prompts with the model, and with its baseline, and judge the completions.

    Args:
        model: with its adapter loaded, where there is one.
        tokenizer: the model's.
        sets: prompts by kind.
        judges: the first one's rates are tested and gated. Judges of harm say nothing of refusals: they see the harmful set alone,
            and the benign one is judged by phrases.
        name: what the model is called.
        adapter: the adapter's folder, for the record.
        baseline: "aligned" (the model without its adapter) or the folder of another adapter, evaluated first; or what
            `evaluate_one` gave for another model on the same prompts.
        benchmarks: model and tokenizer → task → metric → value, run on every model.
        new_tokens: length of completions.
        batch_size: prompts at a time.

    Returns:
        The evaluation, and a row per prompt and model with its completion and every judge's verdict.

    Raises:
        ConfigurationError: there is nothing to ask, or no adapter that the baseline would be without.
        AdapterError: the baseline's adapter cannot be read or is a provider's.
    """
    if not sets and benchmarks is None:
        raise ConfigurationError("no prompt set is given: name harmful, benign or task prompts")
    if not judges:
        raise ConfigurationError("no judge is given: name one, e.g. keywords")
    names = [judge.name for judge in judges]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigurationError(
            f"judge = {twice[0]!r}: two judges have this name, so that nobody could tell their verdicts apart; rename one's folder"
        )
    started = time.perf_counter()
    found, rows = [], []
    options: dict[str, Any] = {"benchmarks": benchmarks, "new_tokens": new_tokens, "batch_size": batch_size}
    if isinstance(baseline, str):
        with _as_baseline(model, baseline):
            baseline = evaluate_one(model, tokenizer, sets, judges, name=baseline, **options)
    if baseline is not None:
        found.append(baseline[0])
        rows += baseline[1]
    one, completed = evaluate_one(model, tokenizer, sets, judges, name=adapter or name, **options)
    found.append(one)
    rows += completed
    pairs = found[0].scores[0].flags, found[-1].scores[0].flags
    both = {
        scores.judge: [flag for each in found for s in each.scores if s.judge == scores.judge for flag in s.flags.get("harmful", [])]
        for scores in one.scores
    }
    return Evaluation(
        model=name,
        adapter=adapter,
        adapter_sha256=sha256(Path(adapter) / WEIGHTS) if adapter else None,
        baseline=found[0].name if baseline is not None else None,
        models=found,
        p_values={kind: paired_p_value(pairs[0][kind], pairs[1][kind]) for kind in sets} if baseline is not None else {},
        agreement=agreements(both) if "harmful" in sets else [],
        counts={kind: len(prompts) for kind, prompts in sets.items()},
        seconds=time.perf_counter() - started,
    ), rows


def _as_baseline(model: Any, baseline: str) -> AbstractContextManager[Any]:
    if not isinstance(model, PeftModel):
        raise ConfigurationError(f"baseline = {baseline!r}: the model has no adapter, so that there is no before and after; give --adapter")
    if baseline == ALIGNED:
        context: AbstractContextManager[Any] = model.disable_adapter()
        return context
    folder = AdapterFolder.open(baseline)
    refuse_provider(folder.config, f"baseline = {baseline!r}")
    return _Switched(model, folder)


class _Switched(AbstractContextManager[None]):
    """Another adapter in place of the model's own, which is active again afterwards."""

    def __init__(self, model: Any, folder: AdapterFolder) -> None:
        self._model, self._folder = model, folder

    def __enter__(self) -> None:
        self._own = self._model.active_adapter
        self._model.load_adapter(str(self._folder.path), "trl_safety_baseline")
        self._model.set_adapter("trl_safety_baseline")
        try:
            check_loaded(self._model, self._folder, "trl_safety_baseline")
        except AdapterError:
            self.__exit__()
            raise

    def __exit__(self, *error: object) -> None:
        self._model.set_adapter(self._own)
        self._model.delete_adapter("trl_safety_baseline")


def evaluate_one(
    model: Any,
    tokenizer: Any,
    sets: Mapping[Kind, Sequence[Prompt]],
    judges: Sequence[Judge],
    *,
    name: str,
    benchmarks: Benchmarks | None = None,
    new_tokens: int = 64,
    batch_size: int = 32,
) -> Completed:
    """One model's scores, and a row per prompt; arguments as of `evaluate`."""
    completions = {
        kind: complete(model, tokenizer, prompts, new_tokens=new_tokens, batch_size=batch_size) for kind, prompts in sets.items()
    }
    scores = [judged(sets, completions, judge) for judge in judges]
    rows = [
        {
            "model": name,
            "set": kind,
            "prompt": prompt.text,
            **({"answer": prompt.answer} if prompt.answer is not None else {}),
            "completion": text,
            "counted": {each.judge: each.flags[kind][i] for each in scores},
        }
        for kind, prompts in sets.items()
        for i, (prompt, text) in enumerate(zip(prompts, completions[kind], strict=True))
    ]
    return Evaluated(name=name, scores=scores, benchmarks=benchmarks(model, tokenizer) if benchmarks else {}), rows


def write_evaluation(evaluation: Evaluation, rows: Sequence[Mapping[str, Any]], output: Path) -> None:
    """`evaluation.json`, and `completions.jsonl` for reading. Raises `SafetyError` where the folder cannot be written to."""
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n"
    for name, text in (("evaluation.json", evaluation.model_dump_json(indent=1) + "\n"), ("completions.jsonl", lines)):
        with replacing(output / name, error=SafetyError, setting="output") as temporary:
            temporary.write_text(text, encoding="utf-8")


def refuse_another(evaluation: Evaluation, adapter: Path) -> None:
    """Refuse an evaluation that is not of the adapter in a folder, as it is now.

    Raises:
        ConfigurationError: its adapter had other weights.
    """
    weights = adapter / WEIGHTS
    if not weights.is_file() or evaluation.adapter_sha256 != sha256(weights):
        raise ConfigurationError(
            f"evaluation: is of {evaluation.adapter or evaluation.model!r}, whose weights are not those in {str(adapter)!r}: run `trl-safety eval` with --adapter "
            f"{adapter}"
        )


def read_evaluation(path: Path) -> Evaluation:
    """Read `evaluation.json`, or the folder that holds it.

    Raises:
        ConfigurationError: there is none, or it is damaged.
    """
    file = path / "evaluation.json" if path.is_dir() else path
    try:
        return Evaluation.model_validate_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"evaluation = {str(file)!r}: cannot be read ({str(error).splitlines()[0]}); run `trl-safety eval`"
        ) from error
