"""A model that Unsloth has rewritten is recognised by where its classes and functions are from. Unsloth itself needs a GPU and is not run here."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import pytest
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP
from trl import SFTTrainer

from tests import tiny
from tests.training import providers
from trl_safety import AlignmentSubspace, SafetyMixin
from trl_safety.errors import ConfigurationError
from trl_safety.reports.report import verify

PAIR = {"base": str(tiny.DATA / "gqa-base"), "aligned": str(tiny.DATA / "gqa-aligned")}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return providers.make(tmp_path_factory.mktemp("providers"))


def from_unsloth(function: Any, module: str) -> Any:
    """A copy of a function that says it is from one of Unsloth's modules."""
    copy = types.FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__, copy.__module__ = function.__kwdefaults__, module
    return copy


def of_the_class(model: Any, monkeypatch: pytest.MonkeyPatch) -> type | None:
    """As for attention: the function of the class is replaced, so that every model of that class is Unsloth's."""
    monkeypatch.setattr(LlamaAttention, "forward", from_unsloth(LlamaAttention.forward, "unsloth.models.llama"))
    return None


def of_a_layer(model: Any, monkeypatch: pytest.MonkeyPatch) -> type | None:
    """As for the LoRA MLP: a function is put on one layer."""
    layer = model.model.layers[0].mlp
    layer.forward = types.MethodType(from_unsloth(LlamaMLP.forward, "unsloth.kernels.fast_lora"), layer)
    return None


def a_class(model: Any, monkeypatch: pytest.MonkeyPatch) -> type | None:
    """As in its compiled modules: the layer's class is another one."""
    model.model.layers[1].mlp.__class__ = type("LlamaMLP", (LlamaMLP,), {"__module__": "unsloth_compiled_module_llama"})
    return None


def the_trainer(model: Any, monkeypatch: pytest.MonkeyPatch) -> type | None:
    """As its trainers are: a generated subclass."""
    return type("UnslothSFTTrainer", (SFTTrainer,), {"__module__": "UnslothSFTTrainer"})


def made(how: Any, monkeypatch: pytest.MonkeyPatch, output: Path) -> Any:
    """A trainer with the mixin for a model, or by a trainer, that looks like Unsloth's."""
    model = tiny.model()
    trainer = how(model, monkeypatch) or SFTTrainer
    return tiny.trainer(output, cls=type("SafeTrainer", (SafetyMixin, trainer), {}), base=model)


@pytest.mark.parametrize("how", [of_the_class, of_a_layer, a_class, the_trainer])
def test_what_reads_the_factors_acts_and_the_rest_is_refused(
    how: Any, world: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, gqa_subspace: AlignmentSubspace
) -> None:
    refused: dict[str, tuple[dict[str, Any], str]] = {
        "alignment_buffer": (PAIR, "Unsloth's kernels, and its vLLM, share the frozen weights"),
        "signed_vector": ({**PAIR, "train": 0.5}, "share the frozen weights"),
        "buffer_reinforce": ({"buffer": str(world / "buffer")}, "bypass the modules on which the buffer acts"),
        "dual_select": ({"references": 4}, "Unsloth's kernels bypass the modules in which they are read"),
        "sbr": ({"prompts": ["w41"], "number": 1}, "the prompts pass through layers that Unsloth has rewritten"),
    }
    trainer = made(how, monkeypatch, tmp_path)
    for method, (options, reason) in refused.items():
        with pytest.raises(
            ConfigurationError, match=f"(?i)the model or the trainer is Unsloth's .unsloth.*{method} cannot act: .*{reason}"
        ):
            trainer.start_safety({method: options})
    with pytest.raises(ConfigurationError, match="alignment_buffer cannot act: Unsloth's kernels compute a layer by themselves"):
        trainer.start_safety({"alignment_buffer": {"how": "low_rank"}}, gqa_subspace)
    trainer.start_safety({"asft": {"weight": 2.0}, "safe_lora": {"threshold": 1.0}}, gqa_subspace)
    trainer.train()
    trainer.save_model()
    assert all(method.acted for method in verify(tmp_path).methods)


def test_a_model_of_transformers_is_not_unsloths(tmp_path: Path) -> None:
    trainer = made(lambda model, patch: None, pytest.MonkeyPatch(), tmp_path)
    trainer.start_safety({"sbr": {"prompts": ["w41"], "number": 1, "ask_first": False}})
    assert trainer._safety is not None
