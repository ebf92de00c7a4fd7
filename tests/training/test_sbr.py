"""SBR in real trainers: the term, its invariances, what it refuses, and what is reported."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from tests import tiny
from tests.training.test_two_processes import launch
from trl_safety import SafetyMixin
from trl_safety.errors import ConfigurationError
from trl_safety.reports.report import read_report, verify

PROMPTS = ["w41", "w42 w43 w44 w45", "w46 w47", "w48 w49 w50"]
BLOCK = {"sbr": {"prompts": PROMPTS, "number": 4, "ask_first": False}}


def block(**options: Any) -> dict[str, Any]:
    return {"sbr": {**BLOCK["sbr"], **options}}


def trained(output: Path, safety: Any = None, **kwargs: Any) -> Any:
    trainer = tiny.trainer(output, safety=safety, **kwargs)
    trainer.train()
    return trainer


@torch.no_grad()
def states(model: Any) -> torch.Tensor:
    """One prompt at a time, in float64."""
    tokenizer = tiny.tokenizer()
    model = model.eval()
    found = []
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        found.append(model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0, -1].double())
    return torch.stack(found)


def moved(trainer: Any) -> float:
    """How far the prompts' states moved from those of the model without the adapter."""
    model = trainer.model
    with model.disable_adapter():
        before = states(model)
    return float((states(model) - before).square().mean())


def test_the_term_is_that_of_single_prompts(tmp_path: Path) -> None:
    trainer = trained(tmp_path, block(weight=3.0), max_steps=1)
    method = trainer._safety.methods[0]
    trainer.model.eval()
    assert float(method.term()) == pytest.approx(moved(trainer), rel=1e-4)


def test_weight_zero_is_plain_training_bit_for_bit(tmp_path: Path) -> None:
    options = {"peft_config": tiny.lora(lora_dropout=0.3)}
    plain = trained(tmp_path / "plain", **options)
    measured = trained(tmp_path / "measured", block(weight=0.0), **options)
    assert tiny.identical(tiny.factors(plain.model), tiny.factors(measured.model))
    measured.save_model()
    report = read_report(tmp_path / "measured")
    assert not report.protected
    assert "nothing was protected" in report.methods[0].summary


def test_without_the_term_the_states_move_ten_times_as_far(tmp_path: Path) -> None:
    start = {"peft_config": tiny.lora(init_lora_weights=True), "max_steps": 20}
    plain, held = trained(tmp_path / "plain", **start), trained(tmp_path / "held", block(weight=1000.0), **start)
    assert moved(plain) > 10 * moved(held)
    assert tiny.largest_difference(tiny.factors(plain.model), tiny.factors(held.model)) > 1e-3


def same(one: Any, other: Any, within: float = 2e-5) -> bool:
    return tiny.largest_difference(tiny.factors(one.model), tiny.factors(other.model)) < within


def test_the_tokenizers_padding_side_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = trained(tmp_path / "right", block())
    original = tiny.tokenizer

    def left() -> Any:
        tokenizer = original()
        tokenizer.padding_side = "left"
        return tokenizer

    monkeypatch.setattr(tiny, "tokenizer", left)
    assert same(right, trained(tmp_path / "left", block()))


@pytest.mark.parametrize("loss_type", ["nll"])
def test_accumulation_changes_nothing(tmp_path: Path, loss_type: str) -> None:
    common = {"optim": "sgd", "max_steps": 3, "loss_type": loss_type}
    runs = [
        trained(tmp_path / str(steps), block(), per_device_train_batch_size=16 // steps, gradient_accumulation_steps=steps, **common)
        for steps in (1, 4)
    ]
    assert same(*runs)


def test_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    assert same(trained(tmp_path / "a", block()), trained(tmp_path / "b", block(), gradient_checkpointing=True))


def test_it_holds_beside_packed_rows_and_dropout(tmp_path: Path) -> None:
    common = {"peft_config": tiny.lora(init_lora_weights=True, lora_dropout=0.2), "max_steps": 12, "packing": True, "max_length": 64}
    held, plain = trained(tmp_path / "a", block(weight=1000.0), **common), trained(tmp_path / "b", **common)
    assert moved(plain) > 4 * moved(held)


def test_two_processes_equal_one(tmp_path: Path) -> None:
    launch(1, tmp_path / "one", 8, script="two_processes_sbr")
    launch(2, tmp_path / "two", 4, script="two_processes_sbr")
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert tiny.largest_difference(two, one) < 2e-5


def test_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    options = {"max_steps": 4, "lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 2}
    whole = trained(tmp_path / "whole", block(), **options)
    trained(tmp_path / "part", block(), **{**options, "max_steps": 2})
    resumed = tiny.trainer(tmp_path / "part", safety=block(), **options)
    resumed.train(resume_from_checkpoint=True)
    assert tiny.identical(tiny.factors(whole.model), tiny.factors(resumed.model))
    resumed.save_model()
    assert verify(tmp_path / "part").methods[0].steps == (1, 4)


def test_resumed_with_other_prompts_is_said(tmp_path: Path) -> None:
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    trained(tmp_path, block(), **{**options, "max_steps": 2})
    resumed = tiny.trainer(tmp_path, safety=block(prompts=PROMPTS[::-1]), **options)
    resumed.train(resume_from_checkpoint=True)
    resumed.save_model()
    assert "steps 1 to 2 were trained without it" in read_report(tmp_path).methods[0].summary


def test_the_states_are_the_aligned_models_beside_a_buffer(tmp_path: Path) -> None:
    buffer = {"alignment_buffer": {"base": str(tiny.DATA / "gqa-base"), "aligned": str(tiny.DATA / "gqa-aligned")}}
    trainer = tiny.trainer(tmp_path, safety={**block(), **buffer}, peft_config=tiny.lora(init_lora_weights=True))
    expected = states(tiny.model())
    trainer.train()
    method = next(method for method in trainer._safety.methods if method.name == "sbr")
    assert torch.allclose(method._reference.double(), expected, atol=1e-5)
    assert method.distances[0] == pytest.approx(0, abs=1e-9)


def test_any_trainer_with_the_mixin(tmp_path: Path) -> None:
    class SafeTrainer(SafetyMixin, Trainer):
        pass

    tokenizer = tiny.tokenizer()
    rows = [{"input_ids": [1, 5, 6, 7], "labels": [1, 5, 6, 7]} for _ in range(16)]
    args = TrainingArguments(str(tmp_path), use_cpu=True, max_steps=3, report_to="none", save_strategy="no", disable_tqdm=True)
    model = get_peft_model(tiny.model(), tiny.lora(init_lora_weights=True))
    trainer = SafeTrainer(model, args, train_dataset=rows, processing_class=tokenizer, data_collator=DataCollatorForSeq2Seq(tokenizer))
    trainer.start_safety(block())
    trainer.train()
    trainer.save_model()
    assert verify(tmp_path).methods[0].name == "sbr"


def test_qlora(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    quantised = tiny.model(quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"), device_map="cpu")
    trainer = trained(tmp_path, block(weight=100.0), base=quantised, peft_config=tiny.lora(init_lora_weights=True), max_steps=2)
    trainer.save_model()
    assert verify(tmp_path).methods[0].acted
    assert trainer._safety.methods[0].distances[1] > 0


class TestPrompts:
    def test_columns_messages_and_completions(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        shapes = {
            "prompt": {"prompt": "w41", "completion": "w3"},
            "goal": {"goal": "w41"},
            "messages": {"messages": [{"role": "user", "content": "w41"}, {"role": "assistant", "content": "w3"}]},
            "conversations": {"conversations": [{"from": "human", "value": "w41"}, {"from": "gpt", "value": "w3"}]},
        }
        for name, row in shapes.items():
            path = tmp_path / f"{name}.jsonl"
            path.write_text("\n".join(json.dumps(row) for _ in range(3)))
            options = block(prompts=str(path), number=2, column=name if name == "goal" else None)
            with caplog.at_level(logging.WARNING):
                trainer = tiny.trainer(tmp_path / name, safety=options)
            assert trainer._safety.methods[0]._prompts == [({"role": "user", "content": "w41"},)] * 2
        assert "the column completion is ignored" in caplog.text

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"prompts": []}, "there are only 0 prompts"),
            ({"number": 9}, r"sbr.number = 9: there are only 4 prompts"),
            ({"prompts": ["w1", " "], "number": 2}, "number 2 is empty"),
            ({"prompts": ["w1 " * 5000], "number": 1}, "number 1 has 5000 tokens, but the model takes"),
            ({"prompts": "nowhere.jsonl"}, "sbr.prompts = 'nowhere.jsonl'"),
            ({"weight": -1}, r"sbr.weight = -1"),
            ({"column": "goal"}, "is used only with a file or a data set"),
        ],
    )
    def test_refused_before_training(self, tmp_path: Path, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigurationError, match=message):
            tiny.trainer(tmp_path, safety=block(**options))

    def test_a_compiled_model_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigurationError, match=r"torch_compile = True: sbr cannot act"):
            tiny.trainer(tmp_path, safety=block(), torch_compile=True)

    def test_warnings(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        prompt = str(tiny.rows(32)[5]["prompt"]).strip()
        trainer = tiny.trainer(tmp_path, safety=block(prompts=[prompt], number=1, ask_first=True), max_steps=1)
        with caplog.at_level(logging.WARNING):
            trainer.train()
        assert f"{prompt!r} is also a prompt of the training data" in caplog.text
        assert f"the starting model does not refuse {prompt!r}" in caplog.text


def test_metrics_and_report(tmp_path: Path) -> None:
    trainer = trained(tmp_path, block())
    trainer.save_model()
    logged = [row["safety/sbr"] for row in trainer.state.log_history if "safety/sbr" in row]
    assert len(logged) == 5
    report = verify(tmp_path).methods[0]
    assert report.settings["prompts"] == "4 given"
    assert f"{logged[-1]:.3g} at the end" in report.summary
    assert "the adapter came with an update of norm" in report.summary
    assert {layer.action for layer in report.layers.values()} == {"held"}
    assert all(prompt not in (tmp_path / "safety_report.json").read_text() for prompt in PROMPTS)
