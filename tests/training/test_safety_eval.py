"""A loss of safety is detected during training, in real trainers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from tests import tiny
from trl_safety import AlignmentSubspace, SafetyEvalCallback
from trl_safety.errors import ConfigurationError
from trl_safety.scoring import KeywordJudge, Prompt, score

JUDGE = KeywordJudge(refusals=["w1", "w2"])
PROMPTS = [Prompt(f"w{i} w{i + 1}") for i in range(3, 20)]


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    for name in ("harmful", "benign"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"prompt": prompt.text}) for prompt in PROMPTS))
    return {name: str(tmp_path / f"{name}.jsonl") for name in ("harmful", "benign")}


def test_in_any_trainer(tmp_path: Path) -> None:
    (tmp_path / "benign.jsonl").write_text("\n".join(json.dumps({"prompt": prompt.text}) for prompt in PROMPTS[:5]))
    callback = SafetyEvalCallback(
        {"harmful": PROMPTS, "benign": tmp_path / "benign.jsonl"}, tiny.tokenizer(), steps=2, judge=JUDGE, new_tokens=5, most_prompts=9
    )
    args = tiny.arguments(tmp_path, SFTConfig, max_steps=5, logging_steps=100)
    trainer = tiny.trainer(tmp_path, cls=SFTTrainer, args=args, callbacks=[callback])
    trainer.train()
    assert [step for step, _ in callback.history] == [2, 4, 5]
    scores, _ = score(trainer.model, tiny.tokenizer(), {"harmful": PROMPTS[:9]}, JUDGE, new_tokens=5)
    assert callback.history[-1][1].flags["harmful"] == scores.flags["harmful"]
    logged = {entry["step"]: entry for entry in trainer.state.log_history if "safety/attack" in entry}
    assert logged.keys() == {2, 4, 5}
    assert logged[5]["safety/attack"] == scores.attack.share
    assert logged[5].keys() >= {"safety/over_refusal", "safety/eval_seconds"}


def test_it_changes_nothing_in_training(tmp_path: Path, files: dict[str, str], gqa_subspace: AlignmentSubspace) -> None:
    safety = {"asft": {"weight": 0.1}}
    plain = tiny.trainer(tmp_path / "a", safety=safety, subspace=gqa_subspace)
    plain.train()
    watched = tiny.trainer(tmp_path / "b", safety={**safety, "eval": {**files, "steps": 1, "new_tokens": 4}}, subspace=gqa_subspace)
    watched.train()
    assert tiny.identical(tiny.factors(plain.model), tiny.factors(watched.model))


def test_training_stops(tmp_path: Path, files: dict[str, str], gqa_subspace: AlignmentSubspace) -> None:
    block: dict[str, Any] = {
        "asft": {"weight": 0.1},
        "eval": {"harmful": files["harmful"], "steps": 2, "new_tokens": 4, "stop_above": 0.5},
    }
    trainer = tiny.trainer(tmp_path, safety=block, subspace=gqa_subspace)
    trainer.train()
    assert trainer.state.global_step == 2
    assert trainer.safety_report.methods[0].name == "asft"
    with pytest.raises(ConfigurationError, match="before safe_lora acts"):
        tiny.trainer(tmp_path, safety={**block, "safe_lora": {"layers": 2}}, subspace=gqa_subspace)


def test_every_other_callback_sees_the_rates(tmp_path: Path, files: dict[str, str], gqa_subspace: AlignmentSubspace) -> None:
    seen: list[set[str]] = []

    class Notes(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            seen.append(set(logs))

    block = {"asft": {"weight": 0.1}, "eval": {**files, "steps": 2, "new_tokens": 4}}
    tiny.trainer(tmp_path, safety=block, subspace=gqa_subspace, callbacks=[Notes()], logging_steps=100).train()
    assert sum("safety/attack" in keys for keys in seen) == 2


def test_an_alignment_buffer_is_out_of_the_way(tmp_path: Path, files: dict[str, str]) -> None:
    pair = {"base": str(tiny.DATA / "gqa-base"), "aligned": str(tiny.DATA / "gqa-aligned")}
    trainer = tiny.trainer(tmp_path, safety={"alignment_buffer": pair, "eval": {"harmful": files["harmful"], "steps": 4, "new_tokens": 5}})
    seen: list[torch.Tensor] = []
    callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, SafetyEvalCallback))
    generate = trainer.model.generate

    def noting(*args: Any, **kwargs: Any) -> Any:
        seen.append(trainer.model.base_model.model.model.embed_tokens.weight.detach().clone())
        return generate(*args, **kwargs)

    trainer.model.generate = noting
    trainer.train()
    assert callback.history
    assert seen
    assert all(torch.equal(weight, tiny.model().model.embed_tokens.weight) for weight in seen)


def test_refused(tmp_path: Path, files: dict[str, str], gqa_subspace: AlignmentSubspace) -> None:
    with pytest.raises(ConfigurationError, match=r"eval.harmful is missing"):
        SafetyEvalCallback({"benign": PROMPTS}, tiny.tokenizer())
    with pytest.raises(ConfigurationError, match="is not a Prompt; give the path"):
        SafetyEvalCallback({"harmful": [{"prompt": "w3"}]}, tiny.tokenizer())  # type: ignore[list-item]
    with pytest.raises(ConfigurationError, match="no tokenizer"):
        SafetyEvalCallback({"harmful": PROMPTS}, None)
    with pytest.raises(ConfigurationError, match="names no method"):
        tiny.trainer(tmp_path, safety={"eval": {"harmful": files["harmful"]}})
    with pytest.raises(ConfigurationError, match="cannot be read"):
        tiny.trainer(tmp_path, safety={"asft": {}, "eval": {"harmful": "missing.jsonl"}}, subspace=gqa_subspace)
