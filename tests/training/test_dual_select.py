"""DualSelect in the real trainer: the authors' choices, per-sample gradients by a loop, invariance, what is written, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file

from tests import tiny
from trl_safety.training.selection import SELECTION, read_choices

AUTHORS = tiny.DATA / "dual_select"


def authors_rows(kind: str) -> Dataset:
    rows = json.loads((AUTHORS / "examples.json").read_text())[kind]
    # The key by which each TRL version knows what is supervised.
    return Dataset.from_list([{**row, "completion_mask": [int(label != -100) for label in row["labels"]]} for row in rows])


@pytest.mark.parametrize("mode", ["hard", "soft"])
def test_equals_the_authors_trainer(mode: str, tmp_path: Path) -> None:
    settings = json.loads((AUTHORS / f"{mode}-settings.json").read_text())
    task = authors_rows("task")
    # The authors' warm-up takes the first batches, and their epochs then start again at the first.
    data = task.select([*range(16), *range(32), *range(32)])
    trainer = tiny.trainer(
        tmp_path,
        base=PeftModel.from_pretrained(tiny.model("mha-aligned"), str(tiny.DATA / "mha-adapter"), is_trainable=True),
        peft_config=None,
        data=data,
        reference_dataset=authors_rows("reference"),
        safety={
            "dual_select": {
                "warmup_steps": settings["warmup_steps"],
                "refresh_steps": 4,
                "selection": mode,
                "keep": settings["task_top_k"],
                "references": settings["reference_top_k"],
                "rho": settings["correction_eta"],
            }
        },
        learning_rate=settings["learning_rate"],
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        max_steps=10,
        max_length=64,
    )
    trainer.train()
    expected = [json.loads(line) for line in (AUTHORS / f"{mode}-selection.jsonl").read_text().splitlines()]
    ours = read_choices(tmp_path / SELECTION)
    assert len(ours) == len(expected) == 10
    for line, theirs in zip(ours, expected, strict=True):
        count = len(theirs["indices"])
        rows = [data[index]["input_ids"] for index in line.indices] if line.kind == "task" else line.indices
        assert rows[:count] == ([task[index]["input_ids"] for index in theirs["indices"]] if line.kind == "task" else theirs["indices"])
        for key in ("weights", "scores", "losses", "cosines"):
            torch.testing.assert_close(torch.tensor(getattr(line, key)[:count]), torch.tensor(theirs[key]), rtol=1e-5, atol=1e-5)
        assert line.kind == "reference" or line.weights[count:] == [0.0] * 4
    final = load_file(AUTHORS / f"{mode}.safetensors")
    mine = {key.replace(".default", ""): value for key, value in tiny.factors(trainer.model).items()}
    assert tiny.largest_difference(mine, final) < 1e-5
