"""Equal to the results of the authors' own code, to float32 round-off, on both pairs (`tests/data`, made by that code)."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from tests.tiny import DATA, largest_difference, model
from trl_safety import AlignmentSubspace, apply_safe_lora, asft_penalty
from trl_safety.config.safe_lora import SafeLoraConfig
from trl_safety.corrections.folder import correct_folder
from trl_safety.corrections.safe_lora import SafeLoraCorrection

SETTINGS = {"threshold-0.35": {"threshold": 0.35}, "threshold-0.9": {"threshold": 0.9}, "number-4": {"layers": 4}}


def subspace(pair: str) -> AlignmentSubspace:
    return AlignmentSubspace.from_pair(
        DATA / f"{pair}-base", DATA / f"{pair}-aligned", adapter=DATA / f"{pair}-adapter", whole=True, progress=False
    )


def adapted(pair: str) -> Any:
    return PeftModel.from_pretrained(model(f"{pair}-aligned"), str(DATA / f"{pair}-adapter"), is_trainable=True)


@pytest.mark.parametrize("scaled", [False, True])
def test_asft_penalty_and_gradients(pair: str, scaled: bool) -> None:
    peft_model = adapted(pair)
    expected = load_file(DATA / f"{pair}-asft-{'scaled' if scaled else 'unscaled'}.safetensors")
    value = asft_penalty(peft_model, subspace(pair), scaled)
    value.backward()
    torch.testing.assert_close(value.double(), expected["penalty"], rtol=1e-6, atol=0)
    gradients = {name.replace(".default", ""): p.grad for name, p in peft_model.named_parameters() if p.requires_grad}
    assert len(gradients) == 18
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient.double(), expected[f"grad.{name}"], rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("setting", SETTINGS)
def test_safe_lora_on_a_model_and_on_a_folder(pair: str, setting: str, tmp_path: Path) -> None:
    expected = load_file(DATA / f"{pair}-safelora-{setting}" / "adapter_model.safetensors")
    peft_model = adapted(pair)
    apply_safe_lora(peft_model, subspace(pair), **SETTINGS[setting])
    peft_model.save_pretrained(tmp_path / "model")
    correct_folder(DATA / f"{pair}-adapter", tmp_path / "folder", subspace(pair), SafeLoraCorrection(SafeLoraConfig(**SETTINGS[setting])))
    for way in ("model", "folder"):
        assert largest_difference(load_file(tmp_path / way / "adapter_model.safetensors"), expected) < 1e-6
        # The rest of the configuration is the input's; only the mark is new.
        one, other = (json.loads((folder / "adapter_config.json").read_text()) for folder in (tmp_path / way, DATA / f"{pair}-adapter"))
        differing = {key for key in one.keys() & other.keys() if sorted_lists(one[key]) != sorted_lists(other[key])}
        assert differing <= {"alpha_pattern", "base_model_name_or_path", "peft_version"}


def sorted_lists(value: Any) -> Any:
    return sorted(value) if isinstance(value, list) else value


def test_the_authors_corrected_something(pair: str) -> None:
    """The negative control: the trained adapter is far from the one that the authors' code corrected."""
    before = load_file(DATA / f"{pair}-adapter" / "adapter_model.safetensors")
    assert largest_difference(before, load_file(DATA / f"{pair}-safelora-threshold-0.35" / "adapter_model.safetensors")) > 0.1
