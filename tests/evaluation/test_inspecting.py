"""inspect_ai's own runner on the tiny model, offline. It cannot be installed beside Axolotl; the newest stack has it."""

from pathlib import Path

import pytest

from tests import tiny
from trl_safety.errors import ConfigurationError
from trl_safety.evaluation.inspecting import run_inspect
from trl_safety.scoring import Prompt, complete

pytest.importorskip("inspect_ai")


def test_a_task_through_inspects_own_runner(tmp_path: Path) -> None:
    from inspect_ai import Task
    from inspect_ai.dataset import MemoryDataset, Sample
    from inspect_ai.scorer import match
    from inspect_ai.solver import generate

    model, tokenizer = tiny.model(), tiny.tokenizer()
    prompts = [f"w{i} w{i + 1}" for i in range(3, 11)]
    answers = complete(model, tokenizer, [Prompt(text) for text in prompts], new_tokens=4, batch_size=1)
    samples = [
        Sample(input=text, target=answer if i % 2 else "never") for i, (text, answer) in enumerate(zip(prompts, answers, strict=True))
    ]
    task = Task(dataset=MemoryDataset(samples), solver=generate(), scorer=match(location="exact"), name="tiny_task")
    found = run_inspect(model, tokenizer, [task], log_dir=tmp_path, new_tokens=4)
    assert found["tiny_task"]["match/accuracy"] == 0.5
    assert list(tmp_path.iterdir())
    found = run_inspect(model, tokenizer, [task], log_dir=tmp_path, new_tokens=4, limit=2)
    assert found["tiny_task"]["match/accuracy"] == 0.5


def test_a_task_that_fails_is_an_error(tmp_path: Path) -> None:
    from inspect_ai import Task
    from inspect_ai.dataset import MemoryDataset, Sample
    from inspect_ai.scorer import match
    from inspect_ai.solver import generate, use_tools
    from inspect_ai.tool import tool

    @tool
    def nothing():  # type: ignore[no-untyped-def]
        async def execute(word: str) -> str:
            """Does nothing.

            Args:
                word: any.
            """
            return word

        return execute

    task = Task(
        dataset=MemoryDataset([Sample(input="w3", target="w4")]), solver=[use_tools(nothing()), generate()], scorer=match(), name="tools"
    )
    with pytest.raises(ConfigurationError, match="failed"):
        run_inspect(tiny.model(), tiny.tokenizer(), [task], log_dir=tmp_path, new_tokens=4)
