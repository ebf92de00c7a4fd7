"""DualSelect in the real trainer: the authors' choices, per-sample gradients by a loop, invariance, what is written, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from typer.testing import CliRunner

from tests import tiny
from trl_safety.cli.app import app
from trl_safety.errors import AdapterError, ConfigurationError
from trl_safety.reports.selection import SELECTION, read_choices, read_selection

AUTHORS = tiny.DATA / "dual_select"


def authors_rows(kind: str) -> Dataset:
    rows = json.loads((AUTHORS / "examples.json").read_text())[kind]
    # The key with which each TRL version marks the supervised tokens.
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


def pool(count: int = 12) -> Dataset:
    return tiny.rows(count, seed=9)


def block(**options: Any) -> dict[str, Any]:
    return {"dual_select": {"warmup_steps": 1, "refresh_steps": 2, "keep": 4, "references": 5, **options}}


def trained(output: Path, safety: Any = "default", **kwargs: Any) -> Any:
    kwargs.setdefault("train_sampling_strategy", "sequential")
    if safety is not None:
        kwargs.setdefault("reference_dataset", pool())
    trainer = tiny.trainer(output, safety=block() if safety == "default" else safety, **kwargs)
    trainer.train()
    return trainer


class Oracle:
    """The step written out: a pass per sample, every gradient kept, without the trainer's optimizer and clipping."""

    def __init__(self, model: Any, references: list[dict[str, Any]]) -> None:
        self.model = model
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.references = references

    def one(self, row: dict[str, Any]) -> tuple[float, torch.Tensor]:
        loss = self.model(input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]])).loss
        return loss.item(), torch.cat([g.flatten() for g in torch.autograd.grad(loss, self.parameters)]).double()

    def many(self, rows: list[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
        results = [self.one(row) for row in rows]
        return torch.tensor([loss for loss, _ in results]).double(), torch.stack([gradient for _, gradient in results])

    def step(self, gradient: torch.Tensor, lr: float) -> None:
        start = 0
        for parameter in self.parameters:
            parameter.data -= lr * gradient[start : start + parameter.numel()].view_as(parameter).float()
            start += parameter.numel()


def tokenised(dataset: Dataset) -> list[dict[str, Any]]:
    tokenizer = tiny.tokenizer()
    rows = []
    for row in dataset:
        prompt, answer = tokenizer(row["prompt"])["input_ids"], tokenizer(row["prompt"] + row["completion"] + " </s>")["input_ids"]
        rows.append({"input_ids": answer, "labels": [-100] * len(prompt) + answer[len(prompt) :]})
    return rows


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("reference_gradient", ["cached", "fresh"])
@pytest.mark.parametrize("choice", [{"keep": 3}, {"keep": None, "keep_tokens": 0.6}], ids=["keep", "tokens"])
def test_equals_the_step_written_out(tmp_path: Path, accumulation: int, reference_gradient: str, choice: dict[str, Any]) -> None:
    data, lr, steps = tiny.rows(32), 0.5, 3
    options = {**block(reference_gradient=reference_gradient, rho=0.7, nu=2.0)["dual_select"], **choice}
    trainer = tiny.trainer(
        tmp_path,
        data=data,
        safety={"dual_select": options},
        reference_dataset=pool(),
        gradient_accumulation_steps=accumulation,
        max_steps=steps,
        learning_rate=lr,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        train_sampling_strategy="sequential",
    )
    oracle = Oracle(tiny.trainer(tmp_path / "other", cls=None).model, tokenised(pool()))
    rows = tokenised(data)
    trainer.train()
    batches = [rows[start : start + 8] for start in range(0, 32, 8)] * 2
    task, reference, chosen, position = 0, None, [], 0
    for step in range(steps):
        if step >= 1 and (step - 1) % 2 == 0:
            losses, gradients = oracle.many(oracle.references)
            scores = losses - 2.0 * torch.nn.functional.cosine_similarity(gradients, task[None], dim=1)
            chosen = scores.argsort(descending=True)[:5].tolist()
            reference, task = gradients[chosen].mean(0), 0
        update = torch.zeros_like(oracle.one(rows[0])[1])
        # A run starts a new epoch, and a new accumulation, every four batches.
        for batch in batches[step * accumulation : (step + 1) * accumulation]:
            losses, gradients = oracle.many(batch)
            if step < 1:
                update += gradients.mean(0) / accumulation
                continue
            scores = losses - 2.0 * torch.nn.functional.cosine_similarity(gradients, reference[None], dim=1)
            order = scores.argsort()
            if "keep_tokens" in choice:
                tokens = torch.tensor([sum(label != -100 for label in row["labels"][1:]) for row in batch])
                count = max(1, int((tokens[order].cumsum(0) <= 0.6 * tokens.sum()).sum()))
            else:
                count = 3
            update += gradients[order[:count]].mean(0) / accumulation
        task = task + update
        if step >= 1:
            if reference_gradient == "fresh":
                places = [(position + i) % 5 for i in range(5)]
                update = update + 0.7 * oracle.many([oracle.references[chosen[i]] for i in places])[1].mean(0)
            else:
                update = update + 0.7 * reference
        oracle.step(update, lr)
    assert tiny.largest_difference(tiny.factors(trainer.model), tiny.factors(oracle.model)) < 1e-4


def test_it_is_off_without_the_block_and_changes_training_with_it(tmp_path: Path) -> None:
    plain, protected = trained(tmp_path / "plain", safety=None), trained(tmp_path / "on")
    assert not tiny.identical(tiny.factors(plain.model), tiny.factors(protected.model))
    assert not (tmp_path / "plain" / SELECTION).exists()
    assert "safety_row" not in plain.train_dataset.column_names


@pytest.mark.parametrize(
    "kwargs",
    [
        {"gradient_checkpointing": True},
        {"bf16": True},
        {"loss_type": "dft"},
        {"loss_type": "nll"},
        {"peft_config": tiny.lora(lora_dropout=0.3, use_rslora=True)},
        {"shuffle_dataset": True, "train_sampling_strategy": "random"},
        {"dataloader_num_workers": 1},
    ],
    ids=lambda kwargs: next(iter(kwargs)),
)
def test_runs_as_users_run_it(tmp_path: Path, kwargs: dict[str, Any]) -> None:
    trainer = trained(tmp_path, **kwargs)
    report = trainer.safety_report
    assert report.protected
    assert "kept 12 of 24 samples in optimizer steps 2 to 4" in report.methods[0].summary
    logged = [entry for entry in trainer.state.log_history if "safety/kept_share" in entry]
    assert len(logged) == 3
    assert all(entry["safety/kept_share"] == 0.5 and abs(entry["safety/mean_cosine"]) <= 1 for entry in logged)


def test_rows_are_those_of_the_users_data_set_whatever_the_order(tmp_path: Path) -> None:
    data = tiny.rows(32)
    trained(tmp_path, data=data, shuffle_dataset=True, train_sampling_strategy="random", max_steps=4)
    table = read_selection(tmp_path)
    assert sum(entry.seen for entry in table) == 24
    assert sum(entry.dropped for entry in table) == 12
    for entry in table:
        if entry.dropped:
            assert entry.text is not None
            assert entry.text.split()[:4] == (data[entry.row]["prompt"] + data[entry.row]["completion"]).split()[:4]


def test_a_poisoned_row_is_found(tmp_path: Path) -> None:
    assert_poison_is_found(tmp_path, {"keep": 7})


def assert_poison_is_found(tmp_path: Path, kept: dict[str, Any], **options: Any) -> None:
    """References answer every prompt with one word; rows that answer with another word and conflict are dropped first."""
    good = [{"prompt": f"w{i} w{i + 1} ", "completion": "w50 w50 w50"} for i in range(28)]
    bad = [{"prompt": f"w{i} w{i + 1} ", "completion": "w60 w60 w60"} for i in (3, 9, 15, 21)]
    data = Dataset.from_list([row for index in range(4) for row in [*good[index * 7 : index * 7 + 7], bad[index]]])
    trained(
        tmp_path,
        data=data,
        reference_dataset=Dataset.from_list(good),
        peft_config=tiny.lora(r=8, target_modules="all-linear", init_lora_weights=True),
        safety=block(**kept, warmup_steps=12, refresh_steps=4, references=8),
        max_steps=32,
        **options,
    )
    assert {entry.row for entry in read_selection(tmp_path)[:4]} == {7, 15, 23, 31}


def test_prompts_alone_are_held_to_the_starting_model(tmp_path: Path) -> None:
    prompts = pool().remove_columns("completion")
    trainer = trained(tmp_path, reference_dataset=prompts, peft_config=tiny.lora(init_lora_weights=True), max_steps=4)
    assert "by KL to the starting model" in trainer.safety_report.methods[0].summary
    references = [choice for choice in read_choices(tmp_path / SELECTION) if choice.kind == "reference"]
    assert all(loss > 0 for choice in references for loss in choice.losses)
    # The loss of the last refresh's best reference, written out, cannot be had afterwards; that of the model now can.
    hook = trainer._safety.methods[0]
    with torch.no_grad():
        ours = hook._pool.losses([0, 3])
    for value, index in zip(ours, (0, 3), strict=True):
        ids = torch.tensor([tiny.tokenizer()(prompts[index]["prompt"])["input_ids"]])
        with torch.no_grad():
            current = trainer.model(input_ids=ids).logits.double().log_softmax(-1)
            with trainer.model.disable_adapter():
                aligned = trainer.model(input_ids=ids).logits.double().log_softmax(-1)
        assert value.item() == pytest.approx((aligned.exp() * (aligned - current)).sum(-1).mean().item(), rel=1e-2)


@pytest.mark.parametrize("reference_gradient", ["cached", "fresh"])
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path: Path, reference_gradient: str) -> None:
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    peft_config = tiny.lora(lora_dropout=0.2)
    safety = block(reference_gradient=reference_gradient, references=3)
    whole = trained(tmp_path / "run", safety=safety, peft_config=peft_config, **options)
    before = read_choices(tmp_path / "run" / SELECTION)
    resumed = tiny.trainer(
        tmp_path / "run", safety=safety, peft_config=peft_config, reference_dataset=pool(), train_sampling_strategy="sequential", **options
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    # Not bit for bit: float32 sums depend on the memory layout of their operands.
    assert tiny.largest_difference(tiny.factors(resumed.model), tiny.factors(whole.model)) < 1e-5
    after = read_choices(tmp_path / "run" / SELECTION)
    assert [(c.step, c.kind, c.indices, c.weights) for c in after] == [(c.step, c.kind, c.indices, c.weights) for c in before]
    assert resumed.safety_report.methods[0].summary == whole.safety_report.methods[0].summary
    assert resumed.safety_report.protected


def test_composes_with_asft_and_a_correction(tmp_path: Path, gqa_subspace: Any) -> None:
    trainer = trained(tmp_path, safety={**block(), "asft": {"weight": 0.5}, "safe_lora": {"threshold": 1.0}}, subspace=gqa_subspace)
    assert [(method.name, method.acted) for method in trainer.safety_report.methods] == [
        ("dual_select", True),
        ("asft", True),
        ("safe_lora", True),
    ]
    off = trained(tmp_path / "off", safety={**block(), "asft": {"weight": 0.0}}, subspace=gqa_subspace)
    alone = trained(tmp_path / "alone")
    assert tiny.identical(tiny.factors(off.model), tiny.factors(alone.model))
    on = trained(tmp_path / "on", safety={**block(), "asft": {"weight": 0.5}}, subspace=gqa_subspace)
    assert not tiny.identical(tiny.factors(on.model), tiny.factors(alone.model))


@pytest.mark.parametrize(
    ("safety", "kwargs", "message"),
    [
        (block(keep=8), {}, "every sample of 8 would be kept"),
        (block(keep=None, keep_tokens=0.9), {"per_device_train_batch_size": 1}, "selects within a batch"),
        (block(references=13), {}, "the pool has 12"),
        (block(), {"label_smoothing_factor": 0.1}, "label_smoothing_factor = 0.1"),
        (block(), {"peft_config": tiny.lora(modules_to_save=["lm_head"])}, "are not LoRA factors"),
        (block(), {"peft_config": tiny.lora(lora_bias=True, init_lora_weights=True)}, "are not LoRA factors"),
        (block(), {"reference_dataset": None}, "reference_dataset is missing"),
        (block(reference_dataset="nowhere.jsonl"), {"reference_dataset": None}, "cannot be read"),
        (block(reference_dataset="x.jsonl"), {}, "keep one of them"),
        ({"asft": {}}, {}, "no method of the safety block reads one"),
        ({**block(), "skip_modules": ["q_proj"]}, {}, "dual_select steers the whole update and cannot leave layers alone"),
        (block(), {"data": tiny.rows(32).to_iterable_dataset()}, "IterableDataset"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_refused_before_training(tmp_path: Path, safety: Any, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigurationError, AdapterError, ValueError), match=message):
        tiny.trainer(tmp_path, safety=safety, **{"reference_dataset": pool(), **kwargs})


def test_a_run_that_ends_in_its_warm_up_is_refused(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, safety=block(warmup_steps=4), reference_dataset=pool())
    with pytest.raises(ConfigurationError, match="nothing would ever be selected"):
        trainer.train()


def test_a_loss_that_is_no_mean_of_the_samples_is_refused(tmp_path: Path) -> None:
    def twice(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        return 2 * torch.nn.functional.cross_entropy(outputs.logits[:, :-1].mT, labels[:, 1:])

    trainer = tiny.trainer(tmp_path, safety=block(), reference_dataset=pool(), compute_loss_func=twice, loss_type="nll")
    with pytest.raises(ConfigurationError, match="holds something else"):
        trainer.train()


def test_a_replaced_collator_is_noticed(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, safety=block(), reference_dataset=pool())
    trainer.data_collator = trainer.data_collator.collator
    with pytest.raises(ConfigurationError, match="collator or data loader was replaced"):
        trainer.train()


def test_evaluation_during_training_is_the_plain_one(tmp_path: Path) -> None:
    trainer = trained(tmp_path, eval_dataset=tiny.rows(8, seed=4), eval_strategy="steps", eval_steps=2)
    assert [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert sum(entry.seen for entry in read_selection(tmp_path)) == 24


def test_the_command_lists_the_most_dropped(tmp_path: Path) -> None:
    trained(tmp_path)
    result = CliRunner().invoke(app, ["inspect", str(tmp_path), "--selection", "--top", "3", "--json", str(tmp_path / "table.json")])
    assert result.exit_code == 0, result.output
    assert "12 of 24 samples dropped" in result.output
    assert len(json.loads((tmp_path / "table.json").read_text())) == 24
    missing = CliRunner().invoke(app, ["inspect", str(tmp_path / "nothing"), "--selection"])
    assert missing.exit_code == 1
    assert "not a readable selection log" in missing.output


def test_an_answer_under_another_name(tmp_path: Path) -> None:
    """Its refusals would be silently dropped, and the prompts held to the starting model instead."""
    with pytest.raises(ConfigurationError, match="response, which nothing reads: rename the answers' column to completion"):
        tiny.trainer(tmp_path, safety=block(), reference_dataset=pool().rename_column("completion", "response"))


def test_batches_in_which_all_would_be_kept(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="auto_find_batch_size = True"):
        tiny.trainer(tmp_path, safety=block(), reference_dataset=pool(), auto_find_batch_size=True)
    trainer = tiny.trainer(tmp_path, safety=block(keep=6, warmup_steps=1), reference_dataset=pool(), data=tiny.rows(3))
    with pytest.raises(ConfigurationError, match="the training data has 3 rows, of which all would be kept"):
        trainer.train()


def test_batches_of_one_sample_choose_within_the_step(tmp_path: Path) -> None:
    """As one batch of all that is accumulated; the last step of an epoch has fewer samples, and keeps the same share."""
    data, options = tiny.rows(20), {"max_steps": 6, **tiny.WELL_CONDITIONED}
    whole = trained(tmp_path / "whole", data=data, **options)
    single = trained(tmp_path / "single", data=data, per_device_train_batch_size=1, gradient_accumulation_steps=8, **options)
    assert tiny.largest_difference(tiny.factors(single.model), tiny.factors(whole.model)) < 1e-4
    ours, theirs = (read_choices(tmp_path / name / SELECTION) for name in ("single", "whole"))
    assert [(line.step, line.indices, line.weights) for line in ours] == [(line.step, line.indices, line.weights) for line in theirs]
    assert [len(line.indices) for line in ours if line.kind == "task"] == [8, 4, 8, 8, 4]
    losses = [[entry["loss"] for entry in trainer.state.log_history if "loss" in entry] for trainer in (single, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_training_again_begins_anew(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, safety=block(), reference_dataset=pool(), max_steps=6, learning_rate=1e-3)
    summaries, refreshes = [], []
    for _ in range(2):
        trainer.train()
        summaries.append(trainer.safety_report.methods[0].summary)
        refreshes.append([choice.step for choice in read_choices(tmp_path / SELECTION) if choice.kind == "reference"])
    assert summaries[0] == summaries[1]
    assert len(refreshes[0]) > 1
    assert refreshes[0] == refreshes[1]


def test_resuming_with_other_settings_or_another_pool(tmp_path: Path) -> None:
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    trained(tmp_path, safety=block(), **options)
    for safety, references, message in (
        (block(rho=0.7), pool(), r"dual_select\.rho = 0\.7: the checkpoint .* was trained with"),
        (block(), tiny.rows(len(pool()), seed=77), "resume with the same adapter and the same dual_select.reference_dataset"),
    ):
        trainer = tiny.trainer(tmp_path, safety=safety, reference_dataset=references, **options)
        with pytest.raises(ConfigurationError, match=message):
            trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
