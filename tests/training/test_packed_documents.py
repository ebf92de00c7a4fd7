"""DualSelect on packed and padding-free rows in the real trainer: it chooses documents, as it chooses rows that hold one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import DataCollatorWithFlattening
from trl import SFTConfig, SFTTrainer
from typer.testing import CliRunner

from tests import tiny
from tests.training.test_dual_select import Oracle, assert_poison_is_found, block, pool, tokenised, trained
from trl_safety.cli.app import app
from trl_safety.errors import ConfigurationError
from trl_safety.reports.selection import SELECTION, read_choices, read_selection
from trl_safety.training.documents import LENGTHS, PART, PLACES, ROW, RowCollator

PACKED = {"packing": True, "max_length": 24, "per_device_train_batch_size": 2}
SEQUENTIAL = {"train_sampling_strategy": "sequential"}


def test_padding_free_rows_train_as_rows_of_their_own(tmp_path: Path) -> None:
    """The choices, the adapter, and the references' part are those of the padded batches."""
    options = {"gradient_accumulation_steps": 2, "data": tiny.rows(48), **tiny.WELL_CONDITIONED}
    padded = trained(tmp_path / "padded", **options)
    flat = trained(tmp_path / "flat", padding_free=True, max_length=None, **options)
    assert tiny.largest_difference(tiny.factors(flat.model), tiny.factors(padded.model)) < 1e-4
    ours, theirs = (read_choices(tmp_path / name / SELECTION) for name in ("flat", "padded"))
    assert [(line.step, line.kind, line.indices, line.weights) for line in ours] == [
        (line.step, line.kind, line.indices, line.weights) for line in theirs
    ]
    assert flat.safety_report.methods[0].summary == padded.safety_report.methods[0].summary
    assert [read.text for read in read_selection(tmp_path / "flat")] == [read.text for read in read_selection(tmp_path / "padded")]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_packed_rows_equal_the_step_written_out(tmp_path: Path, accumulation: int) -> None:
    """`keep` counts the documents of a batch, whatever rows they lie in; each gradient is from a pass over the document alone."""
    data, lr, steps, keep = tiny.rows(48), 0.5, 3, 3
    rows = tokenised(data)
    trainer = tiny.trainer(
        tmp_path,
        data=data,
        safety=block(keep=keep, rho=0.7, nu=2.0, refresh_steps=9),
        reference_dataset=pool(),
        gradient_accumulation_steps=accumulation,
        max_steps=steps,
        learning_rate=lr,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        shuffle_dataset=True,
        **SEQUENTIAL,
        **PACKED,
    )
    oracle = Oracle(tiny.trainer(tmp_path / "other", cls=None).model, tokenised(pool()))
    packs = [[int(row) for row in found] for found in trainer.train_dataset[ROW]]
    assert sorted(row for found in packs for row in found) == list(range(48))
    batches = [[row for found in packs[start : start + 2] for row in found] for start in range(0, 2 * accumulation * steps, 2)]
    assert len({len(batch) for batch in batches}) > 1, "batches of different numbers of documents"
    trainer.train()
    chosen, task = [], torch.zeros(())
    for step in range(steps):
        if step == 1:
            losses, gradients = oracle.many(oracle.references)
            scores = losses - 2.0 * torch.nn.functional.cosine_similarity(gradients, task[None], dim=1)
            reference = gradients[scores.argsort(descending=True)[:5]].mean(0)
        update = torch.zeros_like(oracle.one(rows[0])[1])
        for batch in batches[step * accumulation : (step + 1) * accumulation]:
            losses, gradients = oracle.many([rows[row] for row in batch])
            kept = list(range(len(batch)))
            if step:
                scores = losses - 2.0 * torch.nn.functional.cosine_similarity(gradients, reference[None], dim=1)
                kept = scores.argsort()[:keep].tolist()
                chosen.append([batch[place] for place in kept])
            update += gradients[kept].mean(0) / accumulation
        task = task + update
        oracle.step(update + 0.7 * reference if step else update, lr)
    assert [line.indices[:keep] for line in read_choices(tmp_path / SELECTION) if line.kind == "task"] == chosen
    assert tiny.largest_difference(tiny.factors(trainer.model), tiny.factors(oracle.model)) < 1e-4


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split"])
def test_the_packed_data_is_the_parents(tmp_path: Path, strategy: str) -> None:
    """With the numbers of the user's rows, and the parts into which packing cuts them."""
    data = tiny.rows(32)
    options = {"packing": True, "max_length": 6, "packing_strategy": strategy, "shuffle_dataset": True}
    ours = tiny.trainer(tmp_path, data=data, safety=block(keep=1), reference_dataset=pool(), **options).train_dataset
    arguments = tiny.arguments(tmp_path, cls=SFTConfig, **options)
    theirs = SFTTrainer(
        tiny.model(), arguments, train_dataset=data, processing_class=tiny.tokenizer(), peft_config=tiny.lora()
    ).train_dataset
    for column in ("input_ids", "labels", LENGTHS):
        assert list(ours[column]) == list(theirs[column])
    whole = [row["input_ids"] for row in tokenised(data)]
    found = set()
    for example in ours:
        start = 0
        for row, part, length in zip(example[ROW], example[PART], example[LENGTHS], strict=True):
            assert example["input_ids"][start : start + length] == whole[row][6 * part : 6 * part + length]
            start += length
            found.add((row, part))
    assert {row for row, _ in found} == set(range(32))
    assert {part for _, part in found} == ({0, 1} if strategy == "bfd_split" else {0})


def test_parts_are_logged_shown_and_taken_up_again(tmp_path: Path) -> None:
    """Resumed equals uninterrupted; the table of what was dropped names the part, with its own text."""
    options = {**PACKED, "max_length": 6, "packing_strategy": "bfd_split", "shuffle_dataset": True, "per_device_train_batch_size": 4}
    options |= {"safety": block(keep=1), "data": tiny.rows(48), "save_strategy": "steps", "save_steps": 3, "max_steps": 6}
    whole = trained(tmp_path, **options)
    before = read_choices(tmp_path / SELECTION)
    resumed = tiny.trainer(tmp_path, reference_dataset=pool(), **options, **SEQUENTIAL)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert tiny.largest_difference(tiny.factors(resumed.model), tiny.factors(whole.model)) < 1e-5
    after = read_choices(tmp_path / SELECTION)
    assert [(c.step, c.indices, c.parts, c.weights) for c in after] == [(c.step, c.indices, c.parts, c.weights) for c in before]
    assert resumed.safety_report.protected
    cut = next(entry for entry in read_selection(tmp_path) if entry.part == 1 and entry.dropped)
    words = tiny.tokenizer().decode(tokenised(tiny.rows(48))[cut.row]["input_ids"][6:12])
    assert cut.text == words
    result = CliRunner().invoke(app, ["inspect", str(tmp_path), "--selection", "--top", "50"], env={"COLUMNS": "200"})
    assert f"{cut.row}.1" in result.output


def test_a_poisoned_document_is_found(tmp_path: Path) -> None:
    assert_poison_is_found(tmp_path, {"keep": None, "keep_tokens": 0.9}, **{**PACKED, "max_length": 32})


def prepared() -> Dataset:
    """Rows that were tokenised and packed beforehand."""
    rows = [{**row, LENGTHS: [len(row["input_ids"])]} for row in tokenised(tiny.rows(32))]
    pairs = [{key: one[key] + other[key] for key in one} for one, other in zip(rows[::2], rows[1::2], strict=True)]
    return Dataset.from_list(pairs)


def test_rows_that_were_packed_beforehand(tmp_path: Path) -> None:
    """A document is named by its row and its place there. Without `padding_free` TRL lets the documents see each other."""
    options = {"data": prepared(), "dataset_kwargs": {"skip_prepare_dataset": True}, "per_device_train_batch_size": 2}
    trained(tmp_path, safety=block(keep=2), padding_free=True, max_length=None, **options)
    first = next(line for line in read_choices(tmp_path / SELECTION) if line.kind == "task")
    assert sorted(zip(first.indices, first.parts or (), strict=True)) == [(2, 0), (2, 1), (3, 0), (3, 1)]
    with pytest.raises(ConfigurationError, match="documents that share a row see each other: changing one"):
        trained(tmp_path / "mixed", safety=block(keep=2), **options)


@pytest.mark.parametrize(
    ("safety", "options", "message"),
    [
        (block(), {"packing_strategy": "wrapped"}, "packing_strategy = 'wrapped': dual_select cannot act: a sample that is cut anywhere"),
        (block(keep=7), {"max_length": 12}, "keep = 7 of a batch of 2: no batch of 2 packed rows holds more than 4 documents"),
    ],
)
def test_refused(tmp_path: Path, safety: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        tiny.trainer(tmp_path, safety=safety, reference_dataset=pool(), **{**PACKED, **options}).train()


def example(row: int, *tokens: int) -> dict[str, Any]:
    return {ROW: row, "input_ids": list(tokens), "labels": list(tokens)}


def test_the_collator_finds_documents_in_every_layout() -> None:
    examples = [example(4, 5, 6, 7), example(9, 8, 9), example(2, 5)]
    flat = RowCollator(DataCollatorWithFlattening(return_tensors="pt"))(examples)
    assert flat[ROW].tolist() == [4, 9, 2]
    assert flat[PLACES].tolist() == [[0, 0, 0, 3], [0, 0, 3, 2], [0, 0, 5, 1]]

    def nested(features: list[list[dict[str, Any]]]) -> dict[str, torch.Tensor]:
        """As Axolotl's, padded on the left."""
        rows = [torch.tensor([token for one in row for token in one["input_ids"]]) for row in features]
        return {"input_ids": torch.stack([torch.nn.functional.pad(row, (7 - len(row), 0)) for row in rows])}

    packed = RowCollator(nested)([[examples[0], examples[1]], [examples[2]]])
    assert packed[ROW].tolist() == [4, 9, 2]
    assert packed[PLACES].tolist() == [[0, 0, 2, 3], [0, 0, 5, 2], [0, 1, 6, 1]]
    with pytest.raises(ConfigurationError, match="moves or changes their tokens"):
        RowCollator(lambda features: {"input_ids": nested(features)["input_ids"].flip(1)})([[examples[0], examples[1]]])


def test_old_logs_and_texts_are_read(tmp_path: Path) -> None:
    line = {"step": 3, "kind": "task", "indices": [5, 6], "weights": [1, 0], "scores": [1, 2], "losses": [1, 2], "cosines": [0, 0]}
    (tmp_path / SELECTION).write_text(json.dumps(line) + "\n" + json.dumps({**line, "parts": [0, 2]}) + "\n")
    assert [(entry.row, entry.part, entry.seen) for entry in read_selection(tmp_path)] == [(6, 0, 1), (6, 2, 1), (5, 0, 2)]
