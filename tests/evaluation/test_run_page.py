"""The page on a finished run holds all that it is given, and fetches nothing."""

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests import tiny
from tests.evaluation.test_evaluate import SETS, sets_of, world  # noqa: F401  # a fixture
from trl_safety import AlignmentSubspace
from trl_safety.cli.app import app
from trl_safety.errors import ConfigurationError, ReportError
from trl_safety.evaluation.run_page import _layers, write_run_page


def test_all_sections(world: Path, tmp_path: Path, gqa_subspace: AlignmentSubspace) -> None:  # noqa: F811
    harmful = str(world / "harmful.jsonl")
    safety = {"asft": {"weight": 0.1}, "safe_lora": {"layers": 3}, "eval": {"harmful": harmful, "steps": 1, "new_tokens": 4}}
    trainer = tiny.trainer(tmp_path / "run", safety=safety, subspace=gqa_subspace, save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.save_model()
    gqa_subspace.save(tmp_path / "S.safetensors")
    line = [
        "eval",
        str(world / "aligned"),
        "--adapter",
        str(tmp_path / "run"),
        "--baseline",
        "aligned",
        "-o",
        str(tmp_path / "e"),
        "--new-tokens",
        "4",
    ]
    assert CliRunner().invoke(app, [*line, *sets_of(world)]).exit_code == 0
    line = [
        "sweep",
        str(tmp_path / "run" / "checkpoint-4"),
        "--model",
        str(world / "aligned"),
        "--method",
        "safe_lora",
        "--grid",
        "layers=1,4",
    ]
    line += ["-s", str(tmp_path / "S.safetensors"), "-o", str(tmp_path / "s"), "--new-tokens", "4", *sets_of(world)]
    result = CliRunner().invoke(app, line)
    assert result.exit_code == 0, (result.output, result.exception)
    line = [
        "report",
        str(tmp_path / "run"),
        "-o",
        str(tmp_path / "page.html"),
        "--evaluation",
        str(tmp_path / "e"),
        "--sweep",
        str(tmp_path / "s"),
    ]
    result = CliRunner().invoke(app, line)
    assert result.exit_code == 0, (result.output, result.exception)
    text = (tmp_path / "page.html").read_text()
    for title in ("AsFT", "Safe LoRA", "While training", "Before and after", "Which strength?"):
        assert title in text
    assert text.count("data:image/png;base64,") == 4
    assert "safety/attack" in text
    assert not re.search(r"(src|href)=.?https?:", text)
    assert "A safety method acted" in text
    assert "before: aligned" in text
    assert "exact McNemar test of after against before" in text
    assert "plain scaling (a control)" in text
    assert str(tmp_path) not in text


def test_a_changed_adapter_is_said(world: Path, tmp_path: Path, gqa_subspace: AlignmentSubspace) -> None:  # noqa: F811
    trainer = tiny.trainer(tmp_path, safety={"safe_lora": {"layers": 3}}, subspace=gqa_subspace)
    trainer.train()
    trainer.save_model()
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 99}))
    report = json.loads((tmp_path / "safety_report.json").read_text())
    reasons = {layer["reason"] for layer in report["methods"][0]["layers"].values()}
    assert reasons == {None, "not among the 3 layers with the smallest cosine"}
    (tmp_path / "safety_report.json").write_text(json.dumps({**report, "not_covered": [f"norm.{i}" for i in range(8)]}))
    write_run_page(tmp_path, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "has changed since" in text
    assert "<details><summary>8 in all</summary>norm.0, norm.1" in text
    with pytest.raises(ReportError, match="no method of trl-safety"):
        write_run_page(world / "user", tmp_path / "none.html")
    with pytest.raises(ConfigurationError, match="run `trl-safety sweep`"):
        write_run_page(tmp_path, tmp_path / "none.html", sweep=tmp_path)
    assert not (tmp_path / "none.html").exists()
    assert SETS


def test_layers_in_their_order_and_many_as_a_map() -> None:
    def names(blocks: int) -> dict[str, dict[str, float]]:
        return {
            f"model.layers.{i}.{module}": {"update_norm": 1.0, **({"corrected_norm": 0.5} if i else {})}
            for module in ("mlp.up_proj", "mlp.down_proj")
            for i in range(blocks)
        }

    bars = _layers(names(11), ["update_norm", "corrected_norm"])
    labels = [label.get_text() for label in bars.axes[0].get_yticklabels()]
    assert labels[:2] == ["0.mlp.down_proj", "0.mlp.up_proj"]
    assert labels[-1] == "10.mlp.up_proj"
    assert bars.axes[1].patches[0].get_width() == 1.0  # left alone: what it was shows, and no zero
    mapped = _layers(names(40), ["update_norm", "corrected_norm"])
    assert [label.get_text() for label in mapped.axes[0].get_yticklabels()] == ["mlp.down_proj", "mlp.up_proj"]
    values = mapped.axes[1].images[0].get_array()
    assert values.shape == (2, 40)
    assert values.mask[:, 0].all()
    assert not values.mask[:, 1:].any()
