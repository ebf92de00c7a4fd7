"""Every method beside every fact that a TRL run can have here: either it acts, or its requirements refuse it."""

from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.training import providers
from trl_safety import AlignmentSubspace
from trl_safety.config.block import METHODS, options_class
from trl_safety.config.requirements import EVERY_METHOD, FACTS
from trl_safety.errors import SafetyError
from trl_safety.reports.report import verify

BESIDE: dict[str, tuple[str, dict[str, Any]]] = {
    "packed": ("rows", {"packing": True, "max_length": 24}),
    "packed and cut": ("rows", {"packing": True, "max_length": 12, "packing_strategy": "wrapped"}),
    "compiled": ("compiled", {"torch_compile": True, "torch_compile_backend": "eager"}),
    "whole modules": ("trained_besides", {"peft_config": tiny.lora(modules_to_save=["lm_head"])}),
    "streamed": ("streamed", {"data": tiny.rows(32).to_iterable_dataset()}),
    "one sample a batch": ("batch", {"per_device_train_batch_size": 1}),
    "a batch that varies": ("batch_varies", {"auto_find_batch_size": True}),
    # TRL below 1.16 cannot smooth the labels of its own default loss, `chunked_nll`.
    "smoothed labels": ("label_smoothing", {"label_smoothing_factor": 0.1, "loss_type": "nll"}),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return providers.make(tmp_path_factory.mktemp("providers"))


def options(method: str, world: Path) -> dict[str, Any]:
    given: dict[str, dict[str, Any]] = {
        "alignment_buffer": {"base": str(tiny.DATA / "gqa-base"), "aligned": str(tiny.DATA / "gqa-aligned")},
        "dual_select": {"references": 4, "warmup_steps": 1},
        "sbr": {"prompts": ["w41", "w42 w43"], "number": 2, "ask_first": False},
        "safe_lora": {"threshold": 1.0},
        "signed_vector": {"train": -1.0, "serve": 0.5},
        "buffer_reinforce": {"buffer": str(world / "buffer")},
    }
    return given.get(method, {})


@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize("method", METHODS)
def test_acts_or_is_refused(method: str, beside: str, world: Path, tmp_path: Path, gqa_subspace: AlignmentSubspace) -> None:
    fact, arguments = BESIDE[beside]
    block = {method: options(method, world)}
    config = options_class(method)(**block[method])
    value = {"packed": "packed", "packed and cut": "cut"}.get(beside, True)
    concerned = [
        found
        for found in config.requirements
        if found.fact == fact and found.when(config) and (fact != "rows" or found.refused(value, config))
    ]
    kwargs = {"subspace": gqa_subspace} if config.subspace_use == "reads" else {}
    if options_class(method).reads_references:
        kwargs["reference_dataset"] = tiny.rows(16, seed=5)
    start = {"peft_config": tiny.lora(init_lora_weights=True), "learning_rate": 0.1, "max_steps": 4}
    made = lambda: tiny.trainer(tmp_path, safety=block, **{**start, **kwargs, **arguments})  # noqa: E731
    if concerned:
        with pytest.raises(SafetyError, match=f"{method} cannot act|needs rows|rows cannot be counted"):
            made()
        return
    trainer = made()
    trainer.train()
    trainer.save_model()
    assert verify(tmp_path).methods[-1].name == method


def test_every_requirement_names_a_fact_and_every_fact_has_one() -> None:
    named = {found.fact for found in EVERY_METHOD} | {found.fact for method in METHODS for found in options_class(method).requirements}
    assert named == set(FACTS)


@pytest.mark.parametrize("method", METHODS)
def test_every_cell_that_says_works_names_a_test_that_is_there(method: str) -> None:
    for test in options_class(method).shown.values():
        path, _, name = test.partition("::")
        text = (Path(__file__).parent.parent.parent / path).read_text(encoding="utf-8")
        assert f"def {name}(" in text, test
