"""What was computed is not lost by what fails after it: errors that carry it, and benchmarks that fail each for itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trl_safety.errors import ConfigurationError, SafetyError


class UnfinishedError(ConfigurationError):
    """A judge or a benchmark failed after other things had been computed.

    Attributes:
        found: the `Evaluation` or `Sweep` of what was computed; None where there are no rates of the whole yet.
        rows: the completions, as in completions.jsonl, with the verdicts that there are.
    """

    def __init__(self, text: str, *, found: Any = None, rows: Sequence[Mapping[str, Any]] = ()) -> None:
        super().__init__(text)
        self.found = found
        self.rows = list(rows)


class BenchmarkError(ConfigurationError):
    """A task of a benchmark failed.

    Attributes:
        found: task → metric → value, of those that did not.
    """

    def __init__(self, text: str, found: Mapping[str, Mapping[str, float]]) -> None:
        super().__init__(text)
        self.found = {task: dict(metrics) for task, metrics in found.items()}


def run_all(runs: Sequence[Callable[[], Mapping[str, Mapping[str, float]]]]) -> dict[str, dict[str, float]]:
    """Task → metric → value of several benchmarks, each of which runs whatever became of the others.

    Raises:
        BenchmarkError: one failed; it holds what the others gave.
    """
    found: dict[str, dict[str, float]] = {}
    failed = []
    for run in runs:
        given: Mapping[str, Mapping[str, float]] = {}
        try:
            given = run()
        except BenchmarkError as error:
            given = error.found
            failed.append(str(error))
        except SafetyError as error:
            failed.append(str(error))
        found |= {task: dict(metrics) for task, metrics in given.items()}
    if failed:
        raise BenchmarkError("; ".join(failed), found)
    return found
