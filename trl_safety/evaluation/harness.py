"""Utility benchmarks by lm-evaluation-harness, on the model that is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets.exceptions import DatasetsError
from jinja2 import TemplateError

from trl_safety.answers import THINKING
from trl_safety.errors import ConfigurationError, reason
from trl_safety.evaluation.unfinished import BenchmarkError
from trl_safety.rendering import chat_template, text_tokenizer

FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    DatasetsError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    TemplateError,
    TypeError,
    ValueError,
)
"""What a task's own code may raise."""


def run_lm_eval(
    model: Any, tokenizer: Any, tasks: Sequence[str], *, batch_size: int = 8, limit: int | None = None, include: Path | None = None
) -> dict[str, dict[str, float]]:
    """Task → metric → value, as the harness gives them, chat template applied where the tokenizer has one.

    Args:
        model: a causal model, with its adapter.
        tokenizer: the model's.
        tasks: names that the harness knows (gsm8k, ifeval, mmlu, …).
        batch_size: rows at a time.
        limit: the first so many rows of each task; all by default.
        include: a folder with task definitions of one's own.

    Raises:
        ConfigurationError: the harness is not installed, or does not know a task.
        BenchmarkError: a task failed; it holds what the others gave.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigurationError(
            f"lm_eval = {', '.join(tasks)}: lm-evaluation-harness is not installed ({error}); pip install lm-eval"
        ) from error
    manager = TaskManager(include_path=str(include) if include else None)
    known = set(manager.all_tasks)
    if unknown := [task for task in tasks if task not in known]:
        raise ConfigurationError(f"lm_eval = {unknown[0]!r}: lm-evaluation-harness knows no such task; `lm_eval ls tasks` lists them")
    template = chat_template(tokenizer)
    # The harness can cut the thinking off before its end alone, and only where it is told how that looks.
    thinking = next((end for _, end, _ in THINKING if end in str(template)), None)
    wrapped = HFLM(pretrained=model, tokenizer=text_tokenizer(tokenizer), batch_size=batch_size, think_end_token=thinking)
    found: dict[str, dict[str, float]] = {}
    failed = []
    # One by one, so that a task that fails (its data cannot be had, a package of its own is missing) loses none of the others.
    for task in tasks:
        try:
            results = simple_evaluate(
                model=wrapped,
                tasks=[task],
                limit=limit,
                task_manager=manager,
                apply_chat_template=template is not None,
                log_samples=False,
                bootstrap_iters=0,
            )["results"]
        except FAILURES as error:
            failed.append(f"lm_eval = {task!r}: failed ({type(error).__name__}: {reason(error)})")
            continue
        found |= {part: _numbers(metrics) for part, metrics in results.items()}
    if failed:
        raise BenchmarkError("; ".join(failed), found)
    return found


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {
        key.removesuffix(",none"): float(value) for key, value in metrics.items() if isinstance(value, int | float) and "stderr" not in key
    }
