"""A method from another package: with one entry point it acts, is refused, reported and listed like this package's methods."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer
from typer.testing import CliRunner

from tests import tiny
from trl_safety import SafeSFTTrainer, SafetyConfig, SafetyMixin
from trl_safety.cli.app import app
from trl_safety.config.block import known_methods
from trl_safety.errors import ConfigurationError
from trl_safety.reports.report import read_report, verify
from trl_safety.training.factor_groups import update_norm

PACKAGE = Path(__file__).parent.parent / "data" / "other_package"


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(PACKAGE))


def norm(trainer: Any) -> float:
    from trl_safety.adapters.lora import lora_modules

    return update_norm(lora_modules(trainer.model))


def test_it_is_no_longer_than_it_should_be() -> None:
    files = [*PACKAGE.glob("toy_decay/*.py"), PACKAGE / "toy_decay-1.0.dist-info" / "entry_points.txt"]
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files) <= 65


def test_unknown_without_the_package() -> None:
    with pytest.raises(ConfigurationError, match=r"toy_decay = .*: unknown option"):
        SafetyConfig.parse({"toy_decay": {}})


@pytest.mark.usefixtures("installed")
class TestInstalled:
    def test_it_acts_in_sft(self, tmp_path: Path) -> None:
        norms = {}
        for weight in (0.0, 30.0):
            trainer = tiny.trainer(tmp_path / str(weight), safety={"toy_decay": {"weight": weight}}, max_steps=4)
            assert isinstance(trainer, SafeSFTTrainer)
            trainer.train()
            trainer.save_model()
            norms[weight] = norm(trainer)
            assert "safety/toy_decay" in trainer.state.log_history[-2]
        assert norms[30.0] < 0.7 * norms[0.0]
        (report,) = verify(tmp_path / "30.0").methods
        assert (report.name, report.source, report.steps) == ("toy_decay", "toy decay, of a test", (1, 4))
        assert report.summary.startswith("decay of weight 30 in optimizer steps 1 to 4; the adapter came with an update of norm")
        assert {layer.action for layer in report.layers.values()} == {"held"}

    def test_it_acts_beside_another_method(self, tmp_path: Path, gqa_subspace: Any) -> None:
        block = {"toy_decay": {"weight": 1.0}, "asft": {}, "safe_lora": {"threshold": 1.0}}
        trainer = tiny.trainer(tmp_path, safety=block, subspace=gqa_subspace, max_steps=2)
        trainer.train()
        trainer.save_model()
        assert [method.name for method in read_report(tmp_path).methods] == ["asft", "toy_decay", "safe_lora"]

    def test_it_acts_in_any_trainer(self, tmp_path: Path) -> None:
        from transformers import TrainingArguments

        class SafeTrainer(SafetyMixin, Trainer):
            pass

        torch.manual_seed(0)
        from peft import get_peft_model

        model = get_peft_model(tiny.model(), tiny.lora())
        rows = [{"input_ids": torch.tensor([1, 2, 3, 4]), "labels": torch.tensor([1, 2, 3, 4])} for _ in range(8)]
        args = TrainingArguments(str(tmp_path), use_cpu=True, max_steps=2, report_to="none", save_strategy="no", disable_tqdm=True)
        trainer = SafeTrainer(model, args, train_dataset=rows)
        trainer.start_safety({"toy_decay": {}})
        trainer.train()
        trainer.save_model()
        assert verify(tmp_path).methods[0].name == "toy_decay"

    def test_its_requirements_refuse(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigurationError, match=r"torch_compile = True: toy_decay cannot act: it has not been tried; turn it off"):
            tiny.trainer(tmp_path, safety={"toy_decay": {}}, torch_compile=True)

    def test_it_is_listed_and_named(self) -> None:
        assert known_methods()[-1] == "toy_decay"
        done = CliRunner().invoke(app, ["methods"], env={"COLUMNS": "200"})
        assert done.exit_code == 0
        assert "toy decay, of a test" in done.output
        with pytest.raises(ConfigurationError, match="did you mean 'toy_decay'"):
            SafetyConfig.parse({"toy_decy": {}})
        with pytest.raises(ConfigurationError, match=r"safety\.toy_decay\.weight = -1\.0"):
            SafetyConfig.parse({"toy_decay": {"weight": -1.0}})


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("toy_decay.nothing:Here", "cannot be imported"),
        ("toy_decay.hook:squared_norm", "is not a subclass of trl_safety.MethodOptions"),
    ],
)
def test_a_broken_package_breaks_nothing_but_its_own_method(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, message: str
) -> None:
    info = tmp_path / "broken-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[trl_safety.methods]\nbroken = {target}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.syspath_prepend(str(PACKAGE))
    assert SafetyConfig.parse({"asft": {}, "subspace": "S"})
    with pytest.raises(ConfigurationError, match=message):
        SafetyConfig.parse({"broken": {}})
    done = CliRunner().invoke(app, ["methods"])
    assert done.exit_code == 0
    assert message in done.output + (done.stderr or "")
