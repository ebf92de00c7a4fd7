"""lm-evaluation-harness on a task of our own, offline. Axolotl's environment has the harness."""

import json
from pathlib import Path

import pytest

from tests import tiny
from trl_safety.errors import ConfigurationError
from trl_safety.evaluation.harness import run_lm_eval
from trl_safety.evaluation.unfinished import BenchmarkError

pytest.importorskip("lm_eval")

TASK = """
task: tiny_words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: ["w5", "w6"]
doc_to_target: 0
metric_list: [{{metric: acc}}]
"""


def test_a_task_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"prompt": f"w{i} w{i + 1}"}) for i in range(3, 15)))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "tiny.yaml").write_text(TASK.format(file=tmp_path / "rows.jsonl"))
    found = run_lm_eval(tiny.model(), tiny.tokenizer(), ["tiny_words"], include=tmp_path / "tasks", limit=10)
    assert 0 <= found["tiny_words"]["acc"] <= 1
    with pytest.raises(ConfigurationError, match="knows no such task"):
        run_lm_eval(tiny.model(), tiny.tokenizer(), ["tiny_word"], include=tmp_path / "tasks")


def test_a_task_that_fails_loses_none_of_the_others(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"prompt": f"w{i} w{i + 1}"}) for i in range(3, 15)))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "tiny.yaml").write_text(TASK.format(file=tmp_path / "rows.jsonl"))
    without = TASK.replace("tiny_words", "no_data").format(file=tmp_path / "missing.jsonl")
    (tmp_path / "tasks" / "without.yaml").write_text(without)
    with pytest.raises(BenchmarkError, match="lm_eval = 'no_data': failed") as raised:
        run_lm_eval(tiny.model(), tiny.tokenizer(), ["no_data", "tiny_words"], include=tmp_path / "tasks", limit=10)
    assert raised.value.found == run_lm_eval(tiny.model(), tiny.tokenizer(), ["tiny_words"], include=tmp_path / "tasks", limit=10)
