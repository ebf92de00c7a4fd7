"""inspect_ai's own runner on the tiny model, offline. It cannot be installed beside Axolotl; the newest stack has it."""

from pathlib import Path

import pytest

from tests import chain, tiny
from trl_safety.errors import ConfigurationError
from trl_safety.evaluation.inspecting import run_inspect
from trl_safety.evaluation.unfinished import BenchmarkError
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


def test_the_answer_is_scored_and_not_the_thinking_before_it(tmp_path: Path) -> None:
    from inspect_ai import Task
    from inspect_ai.dataset import MemoryDataset, Sample
    from inspect_ai.model import ChatMessageUser, ContentImage, ContentText
    from inspect_ai.scorer import match
    from inspect_ai.solver import generate

    tokenizer = chain.tokenizer()
    model = chain.model("<think> w7 w8 </think> w5 <end>", tokenizer, eos_token_id=3)
    task = Task(dataset=MemoryDataset([Sample(input="w1", target="w5")]), solver=generate(), scorer=match(location="exact"), name="thinks")
    assert run_inspect(model, tokenizer, [task], log_dir=tmp_path / "a", new_tokens=9)["thinks"]["match/accuracy"] == 1
    assert run_inspect(model, tokenizer, [task], log_dir=tmp_path / "b", new_tokens=3)["thinks"]["match/accuracy"] == 0
    image = "data:image/png;base64,iVBORw0KGgo="
    seen = Sample(input=[ChatMessageUser(content=[ContentText(text="w1"), ContentImage(image=image)])], target="w5")
    task = Task(dataset=MemoryDataset([seen]), solver=generate(), scorer=match(), name="pictures")
    with pytest.raises(ConfigurationError, match="shows the model more than text"):
        run_inspect(model, tokenizer, [task], log_dir=tmp_path / "c", new_tokens=9)


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
    good = Task(dataset=MemoryDataset([Sample(input="w3", target="w4")]), solver=generate(), scorer=match(), name="good")
    with pytest.raises(BenchmarkError, match="inspect = 'tools': failed") as raised:
        run_inspect(tiny.model(), tiny.tokenizer(), [task, good], log_dir=tmp_path, new_tokens=4)
    assert list(raised.value.found) == ["good"]


def test_a_task_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    for name in ("no_such_task", "inspect_evals/no_such_task"):
        with pytest.raises(ConfigurationError, match=f"inspect = {name}: cannot begin"):
            run_inspect(tiny.model(), tiny.tokenizer(), [name], log_dir=tmp_path, new_tokens=4)
