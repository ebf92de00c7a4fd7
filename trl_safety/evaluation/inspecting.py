"""Safety and utility benchmarks by inspect_ai (inspect_evals' StrongREJECT, XSTest, IFEval, …), on the model that is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trl_safety.answers import answer_of
from trl_safety.errors import ConfigurationError
from trl_safety.evaluation.unfinished import BenchmarkError
from trl_safety.scoring import Prompt, complete


def run_inspect(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[Any],
    *,
    log_dir: Path,
    limit: int | None = None,
    new_tokens: int = 512,
    batch_size: int = 8,
    grader: Any = None,
) -> dict[str, dict[str, float]]:
    """Task → metric → value, as inspect_ai's scorers give them. Its logs, with every sample, are kept in `log_dir`.

    Args:
        model: a causal model, with its adapter.
        tokenizer: the model's.
        tasks: names (`inspect_evals/xstest`), or inspect_ai tasks.
        log_dir: where inspect_ai writes.
        limit: the first so many samples of each task; all by default.
        new_tokens: the longest completion, where a task does not say.
        batch_size: samples in flight at a time.
        grader: (model, tokenizer) of a local model for tasks that are graded by one (their `grader` role).

    Raises:
        ConfigurationError: inspect_ai is not installed, or cannot begin.
        BenchmarkError: a task failed; it holds what the others gave.
    """
    try:
        from inspect_ai import eval as inspect_eval
        from inspect_ai._util.error import PrerequisiteError  # it has no public name
    except ImportError as error:
        raise ConfigurationError(
            f"inspect = {', '.join(map(str, tasks))}: inspect_ai is not installed ({error}); pip install 'trl-safety[eval]' in an environment without Axolotl"
        ) from error
    roles = {"grader": _wrapped(grader[0], grader[1], new_tokens)} if grader is not None else None
    try:
        logs = inspect_eval(
            list(tasks),
            model=_wrapped(model, tokenizer, new_tokens),
            model_roles=roles,
            log_dir=str(log_dir),
            limit=limit,
            max_connections=batch_size,
            display="none",
        )
    except (PrerequisiteError, ImportError, LookupError, OSError, RuntimeError, ValueError) as error:
        # Tasks that fail while they run are in the logs; this is a name it does not know, or data that cannot be had.
        reason = str(getattr(error, "message", error)).splitlines() or [type(error).__name__]
        raise ConfigurationError(f"inspect = {', '.join(map(str, tasks))}: cannot begin ({reason[0]})") from error
    found: dict[str, dict[str, float]] = {}
    failed = []
    for log in logs:
        if log.status != "success" or log.results is None:
            reason = log.error.message if log.error else log.status
            failed.append(f"inspect = {log.eval.task!r}: failed ({reason}); its log is {log.location}")
            continue
        found[log.eval.task] = {
            f"{score.name}/{name}": float(metric.value) for score in log.results.scores for name, metric in score.metrics.items()
        }
    if failed:
        raise BenchmarkError("; ".join(failed), found)
    return found


def _wrapped(model: Any, tokenizer: Any, new_tokens: int) -> Any:
    """A loaded model as inspect_ai's `Model`: greedy, one request at a time, the chat template the tokenizer's own."""
    from inspect_ai.model import GenerateConfig, Model, ModelAPI, ModelOutput, modelapi

    @modelapi(name="trl_safety")
    class Loaded(ModelAPI):  # type: ignore[misc]  # inspect_ai is no dependency of the type check
        """Asks the model that is in memory."""

        async def generate(self, input: list[Any], tools: Any, tool_choice: Any, config: Any) -> Any:  # noqa: A002  # the parent's name
            if tools:
                raise ConfigurationError(
                    "inspect: the task gives the model tools, which a plain local model cannot call; choose another task"
                )
            if any(not isinstance(m.content, str) and any(part.type not in ("text", "reasoning") for part in m.content) for m in input):
                raise ConfigurationError("inspect: the task shows the model more than text, which is not asked here; choose another task")
            messages = tuple({"role": message.role, "content": message.text} for message in input)
            text = complete(model, tokenizer, [Prompt(messages)], new_tokens=config.max_tokens or new_tokens, batch_size=1)[0]
            answer = answer_of(text)
            # The scorers read the answer, not the thinking before it; one that was cut off is empty.
            return ModelOutput.from_content(
                model=self.model_name, content=answer or "", stop_reason="max_tokens" if answer is None else "stop"
            )

        def max_connections(self) -> int:
            return 1

    return Model(Loaded("loaded"), GenerateConfig())
