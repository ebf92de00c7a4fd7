"""Utility benchmarks by lm-evaluation-harness, on the model that is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trl_safety.answers import THINKING
from trl_safety.errors import ConfigurationError
from trl_safety.rendering import chat_template, text_tokenizer


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
    found = simple_evaluate(
        model=wrapped,
        tasks=list(tasks),
        limit=limit,
        task_manager=manager,
        apply_chat_template=template is not None,
        log_samples=False,
        bootstrap_iters=0,
    )
    return {
        task: {
            key.removesuffix(",none"): float(value)
            for key, value in metrics.items()
            if isinstance(value, int | float) and "stderr" not in key
        }
        for task, metrics in found["results"].items()
    }
