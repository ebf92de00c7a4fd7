"""`axolotl train` with `rl:` and a block: what a method adds, what a buffer is trained on, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from axolotl.utils.dict import DictDefault
from safetensors.torch import load_file

from axolotl_plugin.rules import refuse
from tests import tiny
from tests.axolotl.conftest import Axolotl, protect
from tests.axolotl.test_train import loaded, subspace, weights
from trl_safety import asft_penalty
from trl_safety.config.block import SafetyConfig
from trl_safety.errors import ConfigurationError
from trl_safety.reports.report import verify

OWN: dict[str, dict[str, Any]] = {
    "dpo": {"type": {"field_prompt": "prompt"}},
    "kto": {"type": {"field_prompt": "prompt"}, "remove_unused_columns": False},
    "simpo": {"type": {"field_prompt": "prompt"}, "rl_beta": 0.1, "cpo_alpha": 0.1, "simpo_gamma": 0.5},
    "orpo": {"type": "chat_template.argilla", "orpo_alpha": 0.1, "remove_unused_columns": False},
    "grpo": {
        # The rows as they are.
        "type": None,
        "trl": {
            "beta": 0.1,
            "num_generations": 2,
            "max_completion_length": 6,
            "reward_funcs": ["tests.axolotl.rewards.different_words"],
            "use_vllm": False,
        },
    },
}


def objective(rl: str, config: dict[str, Any], world: Path) -> dict[str, Any]:
    """The configuration for another objective, with its data."""
    own = dict(OWN[rl])
    data = {"path": str(world / f"{'dpo' if rl == 'simpo' else rl}.jsonl"), "ds_type": "json", "split": "train", "type": own.pop("type")}
    return {**config, "rl": rl, "datasets": [data], "micro_batch_size": 4, "max_grad_norm": 0.0, **own}


@pytest.mark.parametrize("rl", ["orpo", "grpo"])
def test_asft_adds_the_penaltys_gradient(rl: str, world: Path, config: dict[str, Any], axolotl: Axolotl, tmp_path: Path) -> None:
    """One step of SGD over two micro-batches differs from the plain one by −lr·λ·∇penalty at the start."""
    config = {**objective(rl, config, world), "max_steps": 1}
    axolotl("train", {**config, "output_dir": str(tmp_path / "plain")})
    axolotl("train", protect(config, world, asft={"weight": 0.5}))
    model = loaded(world, world / "start", is_trainable=True)
    asft_penalty(model, subspace(world)).backward()
    gradients = {name.replace(".default", ""): p.grad for name, p in model.named_parameters() if p.requires_grad}
    plain, protected = weights(tmp_path / "plain"), weights(tmp_path / "out")
    for name, gradient in gradients.items():
        expected = -0.5 * 0.5 * gradient
        assert (protected[name] - plain[name] - expected).norm() <= 1e-3 * expected.norm(), name
    assert "in optimizer steps 1 to 1" in verify(tmp_path / "out").methods[0].summary


@pytest.mark.parametrize("rl", ["kto", "simpo"])
def test_what_acts_while_training_and_a_correction(rl: str, world: Path, config: dict[str, Any], axolotl: Axolotl, tmp_path: Path) -> None:
    options = {**objective(rl, config, world), "learning_rate": 0.05}
    axolotl("train", protect(options, world, asft={"weight": 0.5}, safe_lora={"threshold": 1.0}))
    report = verify(tmp_path / "out")
    assert [(method.name, method.acted) for method in report.methods] == [("asft", True), ("safe_lora", True)]
    assert "A safety method acted" in (tmp_path / "out" / "README.md").read_text()


def test_policy_and_reference_see_the_same_buffer(world: Path, config: dict[str, Any], axolotl: Axolotl, tmp_path: Path) -> None:
    """The adapter is the one that DPO trains on the unaligned base against the unaligned base, and is for the aligned model."""
    # Axolotl has TRL make the adapter, whatever lora_model_dir says.
    config = {**objective("dpo", config, world), "peft_init_lora_weights": False, "lora_model_dir": None, "learning_rate": 0.05}
    block = {"plugins": ["axolotl_plugin.SafetyPlugin"], "safety": {"alignment_buffer": {"base": str(world / "base")}}}
    axolotl("train", {**config, **block})
    assert "W_aligned − 1·V" in verify(tmp_path / "out").methods[0].summary
    # Axolotl also writes the whole model, which is the aligned one.
    whole, aligned = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", world / "aligned"))
    assert torch.equal(whole["model.embed_tokens.weight"], aligned["model.embed_tokens.weight"])
    axolotl("train", {**config, "base_model": str(world / "base"), "output_dir": str(tmp_path / "on-base")})
    assert tiny.largest_difference(weights(tmp_path / "out"), weights(tmp_path / "on-base")) < 1e-4
    axolotl("train", {**config, "output_dir": str(tmp_path / "plain")})
    assert tiny.largest_difference(weights(tmp_path / "out"), weights(tmp_path / "plain")) > 1e-3


WEIGHTS, HOOKS = {"alignment_buffer": {"base": "b", "aligned": "a"}}, {"buffer_reinforce": {"buffer": "b"}}


@pytest.mark.parametrize(
    ("keys", "block", "message"),
    [
        *(({"rl": rl}, {"dual_select": {}}, f"rl = '{rl}': dual_select cannot act") for rl in OWN),
        ({"rl": "grpo"}, WEIGHTS, "rl = 'grpo': alignment_buffer cannot act: what the model generates"),
        ({"rl": "gdpo"}, HOOKS, "rl = 'gdpo': buffer_reinforce cannot act"),
        ({"rl": "dpo", "precompute_ref_log_probs": True}, WEIGHTS, "precompute_ref_log_probs = True: alignment_buffer cannot act"),
        ({"rl": "kto", "rl_adapter_ref_model": True}, HOOKS, "rl_adapter_ref_model = True: buffer_reinforce cannot act"),
        ({"rl": "ebft"}, {"asft": {}}, "rl = 'ebft': asft cannot act: it has not been shown to work"),
        ({"rl": "grpo", "trl": {"async_prefetch": True}}, {"asft": {}}, "rl = 'grpo': asft cannot act"),
        ({"reward_model": True}, {"safe_lora": {}}, "reward_model = True: safe_lora cannot act"),
        *(({"rl": rl, "precompute_ref_log_probs": True}, {"asft": {}}, None) for rl in OWN),
        *(({"rl": rl}, WEIGHTS, None) for rl in ("dpo", "ipo", "kto", "orpo", "simpo")),
    ],
)
def test_what_is_refused_beside_rl(config: dict[str, Any], keys: dict[str, Any], block: dict[str, Any], message: str | None) -> None:
    cfg, safety = DictDefault({**config, **keys}), SafetyConfig.parse(block)
    if message is None:
        refuse(cfg, safety)
        return
    with pytest.raises(ConfigurationError, match=message):
        refuse(cfg, safety)
