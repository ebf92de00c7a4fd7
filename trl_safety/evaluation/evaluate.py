"""Is my model still safe, and what did safety cost? One model, or before and after, under one judge or several."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftModel
from pydantic import BaseModel, Field

from trl_safety.adapters.files import replacing, sha256
from trl_safety.adapters.folder import WEIGHTS, AdapterFolder
from trl_safety.adapters.marks import refuse_provider
from trl_safety.errors import AdapterError, ConfigurationError, SafetyError, reason
from trl_safety.evaluation.judges import Agreement, agreements
from trl_safety.evaluation.loading import COMMIT, check_loaded
from trl_safety.evaluation.unfinished import BenchmarkError, UnfinishedError
from trl_safety.jsonl import to_lines
from trl_safety.scoring import Judge, Kind, Prompt, Scores, check_prompts, complete, judged, paired_p_value
from trl_safety.version import __version__

ROWS, RATES = "completions.jsonl", "evaluation.json"

ALIGNED = "aligned"
"""The baseline without any adapter."""
NOT_RUN = "the benchmarks did not come to an end"


class Evaluated(BaseModel):
    """One model: its name, its scores under every judge, and what benchmarks gave."""

    name: str
    scores: list[Scores]
    benchmarks: dict[str, dict[str, float]] = Field(default_factory=dict)
    """Task → metric → value, of other people's benchmarks."""
    failed: list[str] = Field(default_factory=list)
    """What went wrong with other benchmarks that were asked for."""
    commit: str | None = None
    """Of the model's weights on the Hub; None where they came from a folder."""


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
        grader: the model that graded other people's benchmarks, with its revision after an @ where one was asked for.
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
    grader: str | None = None

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
    grader: str | None = None,
    new_tokens: int = 64,
    batch_size: int = 32,
    output: Path | None = None,
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
        grader: the model that grades in them, for the record.
        new_tokens: length of completions.
        batch_size: prompts at a time.
        output: the folder of `completions.jsonl`, which is written before anything is judged and after every judge, and of
            `evaluation.json`, which is written before the benchmarks and after each: no failure loses what was computed.

    Returns:
        The evaluation, and a row per prompt and model with its completion and every judge's verdict.

    Raises:
        ConfigurationError: there is nothing to ask, or no adapter that the baseline would be without.
        AdapterError: the baseline's adapter cannot be read or is a provider's.
        UnfinishedError: a judge gave no verdict at all, a benchmark failed, or a file could not be written; it holds what was computed.
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
    found: list[Evaluated] = []
    rows: list[dict[str, Any]] = []
    options: dict[str, Any] = {"new_tokens": new_tokens, "batch_size": batch_size, "output": output}
    within: list[Callable[[], AbstractContextManager[Any]]] = [nullcontext]
    if isinstance(baseline, str):
        within.insert(0, partial(_as_baseline, model, baseline))
        with within[0]():
            baseline = evaluate_one(model, tokenizer, sets, judges, name=baseline, **options)
    if baseline is not None:
        found.append(baseline[0])
        rows += baseline[1]
    one, completed = evaluate_one(model, tokenizer, sets, judges, name=adapter or name, earlier=rows, **options)
    found.append(one)
    rows += completed
    pairs = found[0].scores[0].flags, found[-1].scores[0].flags
    both = {
        scores.judge: [flag for each in found for s in each.scores if s.judge == scores.judge for flag in s.flags.get("harmful", [])]
        for scores in one.scores
    }
    evaluation = Evaluation(
        model=name,
        adapter=adapter,
        adapter_sha256=sha256(Path(adapter) / WEIGHTS) if adapter else None,
        baseline=found[0].name if baseline is not None else None,
        models=found,
        p_values={kind: paired_p_value(pairs[0][kind], pairs[1][kind]) for kind in sets} if baseline is not None else {},
        agreement=agreements(both) if "harmful" in sets else [],
        counts={kind: len(prompts) for kind, prompts in sets.items()},
        seconds=time.perf_counter() - started,
        grader=grader,
    )
    # After all prompts: other people's code may fail in ways of its own.
    asked = list(zip(evaluation.models[-len(within) :], within, strict=True)) if benchmarks is not None else []
    for each, _ in asked:
        each.failed = [NOT_RUN]
    _keep(evaluation, rows, output)
    for each, context in asked:
        assert benchmarks is not None  # noqa: S101  # else nothing is asked
        with context():
            _run(benchmarks, model, tokenizer, each)
        evaluation.seconds = time.perf_counter() - started
        _keep(evaluation, rows, output)
    if failed := [f"{each.name}: {text}" for each in evaluation.models for text in each.failed]:
        kept = f"kept in {str(output)!r}" if output is not None else "this error's `found` and `rows`"
        raise UnfinishedError(f"{'; '.join(failed)}; all else was computed: it is {kept}", found=evaluation, rows=rows)
    return evaluation, rows


def _keep(evaluation: Evaluation, rows: Sequence[Mapping[str, Any]], output: Path | None) -> None:
    if output is None:
        return
    try:
        write_evaluation(evaluation, rows, output)
    except SafetyError as error:
        raise UnfinishedError(str(error), found=evaluation, rows=rows) from error


def _run(benchmarks: Benchmarks, model: Any, tokenizer: Any, one: Evaluated) -> None:
    """Run a model's benchmarks, and note what they gave or what went wrong."""
    one.failed = []
    try:
        one.benchmarks = benchmarks(model, tokenizer)
    except BenchmarkError as error:
        one.benchmarks, one.failed = error.found, [str(error)]
    except SafetyError as error:
        one.failed = [str(error)]


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
    output: Path | None = None,
    earlier: Sequence[Mapping[str, Any]] = (),
) -> Completed:
    """One model's scores, and a row per prompt; arguments as of `evaluate`, and `earlier`: rows that stay in the file before its own.

    Raises:
        ConfigurationError: a prompt cannot be asked.
        UnfinishedError: a judge gave no verdict at all, or a file could not be written; it holds the completions.
    """
    completions: dict[Kind, list[str]] = {}
    scores: list[Scores] = []

    def rows() -> list[dict[str, Any]]:
        return [
            {
                "model": name,
                "set": kind,
                "prompt": prompt.text,
                **({"answer": prompt.answer} if prompt.answer is not None else {}),
                "completion": text,
                "counted": {each.judge: each.flags[kind][i] for each in scores},
            }
            for kind, texts in completions.items()
            for i, (prompt, text) in enumerate(zip(sets[kind], texts, strict=True))
        ]

    def keep() -> None:
        if output is not None and sets:
            write_rows([*earlier, *rows()], output)

    for prompts in sets.values():
        check_prompts(prompts, tokenizer)
    try:
        for kind, prompts in sets.items():
            completions[kind] = complete(model, tokenizer, prompts, new_tokens=new_tokens, batch_size=batch_size)
            keep()
        for judge in judges:
            scores.append(judged(sets, completions, judge))
            keep()
    except SafetyError as error:
        kept = [*earlier, *rows()]
        if not kept:
            raise
        # Any other error is that the file could not be written.
        written = isinstance(error, ConfigurationError) and output is not None and (output / ROWS).is_file()
        where = f"kept in {str(output / ROWS)!r}" if output is not None and written else "this error's `rows`"
        raise UnfinishedError(f"{error}; the completions are {where}", rows=kept) from error
    one = Evaluated(name=name, scores=scores, commit=getattr(model, COMMIT, None))
    if benchmarks is not None:
        _run(benchmarks, model, tokenizer, one)
    return one, rows()


def write_rows(rows: Sequence[Mapping[str, Any]], output: Path) -> None:
    """`completions.jsonl` alone. Raises `SafetyError` where the folder cannot be written to."""
    with replacing(output / ROWS, error=SafetyError, setting="output") as temporary:
        temporary.write_text(to_lines(rows), encoding="utf-8")


def write_evaluation(evaluation: Evaluation, rows: Sequence[Mapping[str, Any]], output: Path) -> None:
    """`evaluation.json`, and `completions.jsonl` for reading. Raises `SafetyError` where the folder cannot be written to."""
    with replacing(output / RATES, error=SafetyError, setting="output") as temporary:
        temporary.write_text(evaluation.model_dump_json(indent=1) + "\n", encoding="utf-8")
    write_rows(rows, output)


def unread_of(evaluation: Evaluation) -> list[str]:
    """What a reader of the rates must know of answers without a verdict, a line for each model, judge and set that has some."""
    return [
        f"{model.name}: {scores.judge}: {count} of {evaluation.counts[kind]} {kind} answers have no verdict (cut off while the model was thinking, or a judge's "
        "words that are none); see completions.jsonl, and raise --new-tokens"
        for model in evaluation.models
        for scores in model.scores
        for kind, count in scores.unread.items()
    ]


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
    file = path / RATES if path.is_dir() else path
    try:
        return Evaluation.model_validate_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"evaluation = {str(file)!r}: cannot be read ({reason(error)}); run `trl-safety eval`") from error
