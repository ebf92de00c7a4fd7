"""Weights that are no numbers by the end of training: everything is kept and can be read, and nothing is called protected."""

import itertools
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from tests import tiny
from tests.training import providers
from trl_safety import AlignmentSubspace, SafeLoRACallback, apply_safe_lora
from trl_safety.adapters.folder import WEIGHTS
from trl_safety.corrections.buffer_reinforce import USER_ADAPTER
from trl_safety.errors import AdapterError, ConfigurationError, ReportError
from trl_safety.reports.report import read_report, verify
from trl_safety.reports.selection import SELECTION, TEXTS, read_choices, read_selection
from trl_safety.training.dual_select.method import STATE

NAME = "self_attn.q_proj.lora_B"


class Diverges(TrainerCallback):
    """Puts a value that is no number into the adapter after an optimizer step."""

    def __init__(self, value: float = math.nan, step: int = 3) -> None:
        self.value, self.step = value, step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            with torch.no_grad():
                next(value for name, value in kwargs["model"].named_parameters() if f"{NAME}.default" in name)[0, 0] = self.value


POOL = Dataset.from_list([{"prompt": f"w{i} w{i + 1} ", "completion": "w50 w51"} for i in range(8)])
BLOCKS: dict[str, dict[str, Any]] = {
    "asft": {"asft": {"weight": 0.1}},
    "safe_lora": {"safe_lora": {"threshold": 1.0}},
    "csulora": {"csulora": {}},
    "alignment_vector": {"alignment_vector": {"gamma": 1.0}},
    "dual_select": {"dual_select": {"warmup_steps": 1, "refresh_steps": 2, "keep": 4, "references": 5}},
    "sbr": {"sbr": {"weight": 1.0, "prompts": "PROMPTS"}},
    "alignment_buffer": {"alignment_buffer": {"gamma": 1.0, "base": str(tiny.DATA / "gqa-base")}},
    "buffer_reinforce": {"buffer_reinforce": {"buffer": "BUFFER", "reinforce": "REINFORCE"}},
    "two": {"asft": {"weight": 0.1}, "safe_lora": {"threshold": 1.0}},
}
READS_SUBSPACE = ("asft", "safe_lora", "csulora", "alignment_vector", "two")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return providers.make(tmp_path_factory.mktemp("adapters"))


@pytest.mark.parametrize(("name", "value"), zip(BLOCKS, itertools.cycle([math.nan, -math.inf])))
def test_what_was_trained_is_kept_and_not_called_protected(
    name: str, value: float, tmp_path: Path, gqa_subspace: AlignmentSubspace, adapters: Path
) -> None:
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "w{i} w4"}}\n' for i in range(8)))
    places = {"PROMPTS": tmp_path / "prompts.jsonl", "BUFFER": adapters / "buffer", "REINFORCE": adapters / "reinforce"}
    block = {
        method: {key: str(places.get(option, option)) if isinstance(option, str) else option for key, option in options.items()}
        for method, options in BLOCKS[name].items()
    }
    options: dict[str, Any] = {"subspace": gqa_subspace} if name in READS_SUBSPACE else {}
    options |= {"reference_dataset": POOL} if name == "dual_select" else {}
    out = tmp_path / "out"
    trainer = tiny.trainer(out, safety=block, callbacks=[Diverges(value)], max_steps=3, **options)
    trainer.train()
    assert not trainer.safety_report.protected
    trainer.save_model()
    assert not torch.isfinite(next(v for k, v in load_file(out / WEIGHTS).items() if NAME in k)).all()
    report = read_report(out)
    assert report.stage == "final"
    assert not report.protected
    assert not any(method.acted for method in report.methods)
    assert all(f"{NAME}' of the model's adapter holds NaN or infinity" in m.summary for m in report.methods[-1:])
    assert not any("changed afterwards" in m.summary or "still to come" in m.summary for m in report.methods)
    assert "NOT protected" in (out / "README.md").read_text()
    with pytest.raises(ReportError, match=r"NOT protected.*holds NaN or infinity"):
        verify(out)
    # No correction's mark stands on it: what is mended can be corrected.
    assert not json.loads((out / "adapter_config.json").read_text())["alpha_pattern"]
    if name == "buffer_reinforce":
        assert (out / USER_ADAPTER / WEIGHTS).is_file()


def test_a_callback_on_any_trainer(tmp_path: Path, gqa_subspace: AlignmentSubspace) -> None:
    callback = SafeLoRACallback(gqa_subspace, threshold=1.0)
    trainer = tiny.trainer(tmp_path, callbacks=[Diverges(), callback], max_steps=3)
    trainer.train()
    assert callback.result is not None
    assert not callback.result.protected
    trainer.save_model()
    with pytest.raises(ReportError, match="holds NaN or infinity"):
        verify(tmp_path)
    with pytest.raises(AdapterError, match=f"{NAME}' of the model's adapter holds NaN or infinity"):
        apply_safe_lora(trainer.model, gqa_subspace, threshold=1.0)


def test_a_mended_adapter_is_told_from_the_one_that_was_reported(tmp_path: Path, gqa_subspace: AlignmentSubspace) -> None:
    trainer = tiny.trainer(tmp_path, callbacks=[Diverges()], safety={"asft": {"weight": 0.1}}, subspace=gqa_subspace, max_steps=3)
    trainer.train()
    with torch.no_grad():
        next(value for name, value in trainer.model.named_parameters() if f"{NAME}.default" in name)[0, 0] = 0.0
    assert "changed afterwards" in trainer.safety_report.methods[0].summary
    assert not trainer.safety_report.protected


def test_a_selection_that_diverged(tmp_path: Path) -> None:
    options: dict[str, Any] = {"safety": BLOCKS["dual_select"], "reference_dataset": POOL}
    trainer = tiny.trainer(tmp_path, callbacks=[Diverges(step=2)], max_steps=5, **options)
    # A refresh that can choose nothing ends the run: no step after it would be one.
    with pytest.raises(ConfigurationError, match="not finite"):
        trainer.train()
    lines = read_choices(tmp_path / SELECTION)
    assert [(line.step, line.not_finite) for line in lines if line.kind == "task"] == [(2, None), (3, "scores")]
    assert (tmp_path / TEXTS).is_file()
    with pytest.raises(ReportError, match="scores of optimizer step 3 hold NaN or infinity: the training diverged there"):
        read_selection(tmp_path)
    # As the message says.
    kept = [text for text in (tmp_path / SELECTION).read_text().splitlines(keepends=True) if json.loads(text)["step"] < 3]
    (tmp_path / SELECTION).write_text("".join(kept))
    assert {row.seen for row in read_selection(tmp_path)} == {1}


def test_checkpoints_that_cannot_be_gone_on_from(tmp_path: Path, gqa_subspace: AlignmentSubspace) -> None:
    options: dict[str, Any] = {
        "safety": BLOCKS["asft"],
        "subspace": gqa_subspace,
        "save_strategy": "steps",
        "save_steps": 2,
        "max_steps": 3,
    }

    def resume(checkpoint: Any) -> None:
        tiny.trainer(tmp_path / "out", **options).train(resume_from_checkpoint=checkpoint)

    with pytest.raises(ConfigurationError, match="holds no checkpoint; leave it out"):
        resume(True)
    with pytest.raises(ConfigurationError, match="no such folder"):
        resume(str(tmp_path / "out" / "checkpoint-9"))
    tiny.trainer(tmp_path / "out", **options).train()
    checkpoint = tmp_path / "out" / "checkpoint-2"
    for name, content, message in (
        ("trainer_state.json", b"{", r"its trainer_state.json cannot be read \(Expecting"),
        ("trainer_state.json", b"[]", "its trainer_state.json cannot be read"),
        ("trainer_state.json", b'{"no_such_key": 1}', "its trainer_state.json cannot be read"),
        (WEIGHTS, b"x", "truncated or not a safetensors"),
        ("adapter_config.json", b"[]", "only LoRA adapters"),
    ):
        whole = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(content)
        with pytest.raises((ConfigurationError, AdapterError), match=f"resume_from_checkpoint = .*{message}"):
            resume(str(checkpoint))
        (checkpoint / name).write_bytes(whole)
    tensors = load_file(checkpoint / WEIGHTS)
    save_file({**tensors, next(iter(tensors)): next(iter(tensors.values())) / 0}, checkpoint / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(AdapterError, match="holds NaN or infinity"):
        resume(str(checkpoint))


def test_damaged_states_of_a_checkpoint(tmp_path: Path) -> None:
    options: dict[str, Any] = {"safety": BLOCKS["dual_select"], "reference_dataset": POOL, "save_strategy": "steps", "save_steps": 3}
    tiny.trainer(tmp_path / "out", max_steps=3, **options).train()
    checkpoint = tmp_path / "out" / "checkpoint-3"
    state = checkpoint / STATE
    shutil.copyfile(state, tmp_path / "whole")
    from safetensors import safe_open

    with safe_open(state, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(state)

    def resume(message: str) -> None:
        with pytest.raises(ConfigurationError, match=message):
            tiny.trainer(tmp_path / "out", max_steps=4, **options).train(resume_from_checkpoint=str(checkpoint))

    bad = torch.full_like(tensors["task"], math.nan)
    save_file({**tensors, "task": bad}, state, metadata=metadata)
    resume("the task gradient holds NaN or infinity")
    save_file({"task": tensors["task"]}, state, metadata=metadata)
    resume("is damaged")
    save_file(tensors, state)
    resume("is damaged")
    for facts in ("{", "[]", "3", json.dumps({"pool": "x"})):
        save_file(tensors, state, metadata={"dual_select": facts})
        resume("is damaged")
    state.write_bytes(b"")
    resume("is damaged")
    shutil.copyfile(tmp_path / "whole", state)
    tiny.trainer(tmp_path / "out", max_steps=4, **options).train(resume_from_checkpoint=str(checkpoint))
