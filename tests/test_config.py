from pathlib import Path
from typing import Any

import pytest

from trl_safety.config.block import METHODS, SafetyConfig
from trl_safety.config.options import validate
from trl_safety.errors import ConfigurationError
from trl_safety.evaluation.gate import GateConfig


def test_defaults_are_the_authors() -> None:
    config = SafetyConfig.parse({"asft": {}, "safe_lora": {}})
    assert config.asft is not None
    assert (config.asft.weight, config.asft.operator, config.asft.scaled, config.asft.paper_lambda) == (1.0, "scaled", False, False)
    assert config.safe_lora is not None
    assert (config.safe_lora.threshold, config.safe_lora.layers, config.safe_lora.operator) == (0.5, None, "scaled")
    assert list(config.methods()) == ["asft", "safe_lora"]


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"asft": {"weight": -1}}, r"safety\.asft\.weight = -1: .*greater than or equal to 0"),
        ({"asft": {"weight": float("nan")}}, r"safety\.asft\.weight = nan"),
        ({"asft": {"weight": "strong"}}, r"safety\.asft\.weight = 'strong'"),
        ({"asft": {"lamda": 1}}, r"safety\.asft\.lamda = 1: unknown option; known here: operator, paper_lambda, scaled, weight"),
        ({"asft": {"operator": "exact"}}, r"safety\.asft\.operator = 'exact'.*'scaled' or 'orthogonal'"),
        ({"asf": {}}, r"safety\.asf = \{\}: unknown option; did you mean 'asft'"),
        ({"safe_lora": {"threshold": 1.5}}, r"safety\.safe_lora\.threshold = 1\.5"),
        ({"safe_lora": {"threshold": 0.1, "layers": 2}}, "either threshold"),
        ({"safe_lora": {"layers": 0}}, r"safety\.safe_lora\.layers = 0"),
        ({"csulora": {"output_rank": "half"}}, r"safety\.csulora\.output_rank = 'half'"),
        ({"safe_lora": {}, "csulora": {}}, "keep one of them"),
        ({}, "names no method"),
        ({"subspace": "S"}, "names no method"),
        ({"asft": {}, "subspace": {"base": "a", "aligned": "b"}}, "exactly one of rank"),
        ({"asft": {}, "subspace": {"base": "a", "aligned": "b", "rank": 0}}, r"safety\.subspace\.rank = 0"),
        (
            {"asft": {}, "subspace": {"base": "a", "aligned": "b", "rnk": 3}},
            r"safety\.subspace\.rnk = 3: unknown option; did you mean 'rank'",
        ),
        (["asft"], "expected a SafetyConfig, a mapping"),
    ],
)
def test_complaints_name_the_option_its_value_and_the_remedy(block: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        SafetyConfig.parse(block)


def test_yaml_files(tmp_path: Path) -> None:
    path = tmp_path / "safety.yaml"
    for text in ("asft: {weight: 3}", "model: x\nsafety:\n  asft: {weight: 3}"):
        path.write_text(text)
        config = SafetyConfig.parse(path)
        assert config.asft is not None
        assert config.asft.weight == 3
    path.write_text("asft: [")
    with pytest.raises(ConfigurationError, match="not valid YAML"):
        SafetyConfig.parse(path)
    with pytest.raises(ConfigurationError, match="cannot be read"):
        SafetyConfig.parse(tmp_path / "missing.yaml")


def test_every_option_is_described() -> None:
    for name in METHODS:
        options = SafetyConfig.model_fields[name].annotation.__args__[0]
        assert options.__doc__
        assert all(field.description for field in options.model_fields.values()), name


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"asft": {"weight": False}}, "weight = False: is a boolean"),
        ({"asft": {}, "safe_lora": {"layers": True}}, "layers = True: is a boolean"),
        ({"dual_select": {"nu": 0, "rho": 0}}, "neither compared with the samples nor added"),
        ({"dual_select": {}, "asft": {}, "skip_modules": ["q_proj"]}, "dual_select steers the whole update"),
        ({"asft": {}, "safe_lora": {"threshold": -0.5}}, r"safe_lora\.threshold = -0\.5: no cosine .* so it would do nothing"),
        ({"csulora": {"lambda_partial": 0, "lambda_outside": 0}}, "nothing is attenuated, so it would do nothing"),
        ({"alignment_vector": {"gamma": 0}}, "nothing of V is added, so it would do nothing"),
        ({"alignment_vector": {"seed": 3}}, "seed = 3 is used only by dare"),
        ({"dual_select": {"task_temperature": 0.5}}, "task_temperature = 0.5 is used only with selection: soft"),
        ({"dual_select": {"reference_gradient": "fresh", "rho": 0}}, "reference_gradient = 'fresh' is not used with rho = 0"),
        ({"asft": {}, "eval": None}, "eval is empty"),
        (
            {"alignment_buffer": {"base": "a", "aligned": "b"}, "subspace": {"base": "c", "aligned": "d", "rank": 4}},
            "subspace = .* is used by none of alignment_buffer",
        ),
    ],
)
def test_settings_that_would_do_nothing(block: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        SafetyConfig.parse(block)


def test_a_truth_value_is_no_threshold() -> None:
    with pytest.raises(ConfigurationError, match="max_attack = True"):
        validate(GateConfig, {"evaluation": "E", "max_attack": True}, "gate")


def test_what_a_gate_has_no_use_for() -> None:
    with pytest.raises(ConfigurationError, match="confident = True is used by"):
        validate(GateConfig, {"evaluation": "E", "max_task_loss": 0.1, "confident": True}, "gate")
    with pytest.raises(ConfigurationError, match="judge = 'keywords' is of an evaluation"):
        validate(GateConfig, {"adapter": "A", "judge": "keywords"}, "gate")
