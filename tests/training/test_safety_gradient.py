"""The diagnostic against a float64 computation that forms every weight's gradient."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from typer.testing import CliRunner

from tests import tiny
from tests.training import providers
from trl_safety import AlignmentSubspace
from trl_safety.adapters.folder import AdapterFolder
from trl_safety.cli.app import app
from trl_safety.errors import ConfigurationError, SubspaceError
from trl_safety.inspection.gradient import safety_gradient


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The aligned model with a tokenizer, data, and the provider's adapters."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("gradient")
    tiny.model().save_pretrained(folder / "aligned")
    tiny.tokenizer().save_pretrained(folder / "aligned")
    (folder / "train.jsonl").write_text("\n".join(json.dumps(row) for row in tiny.rows(11)))
    return providers.make(folder, base=str(folder / "aligned"))


def dense(folder: Path, direction: dict[str, torch.Tensor], buffer: bool) -> dict[str, float]:
    """−⟨∇W, v⟩/‖v‖ from the whole gradient of every weight, sample by sample."""
    model = tiny.model().double()
    if buffer:
        for name, factors in AdapterFolder.open(folder / "buffer").factors.items():
            model.get_submodule(name).weight.data += factors.scaling * factors.B.double() @ factors.A.double()
    tokenizer = tiny.tokenizer()
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = [*tokenizer(row["completion"])["input_ids"], tokenizer.eos_token_id]
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        (torch.nn.functional.cross_entropy(logits, torch.tensor(answer)) / len(rows)).backward()
    return {name: -(model.get_submodule(name).weight.grad * v).sum().item() / v.norm().item() for name, v in direction.items()}


def test_equal_to_the_dense_gradients(world: Path) -> None:
    view = safety_gradient(world / "aligned", str(world / "train.jsonl"), world / "reinforce", buffer=world / "buffer", batch_size=4)
    factors = AdapterFolder.open(world / "reinforce").factors
    direction = {name: f.scaling * f.B.double() @ f.A.double() for name, f in factors.items()}
    for beside, field in ((False, "score"), (True, "buffered")):
        expected = dense(world, direction, beside)
        found = {layer.layer: getattr(layer, field) for layer in view.layers}
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-6)
    assert any(abs(layer.score - (layer.buffered or 0)) > 1e-4 for layer in view.layers)
    assert view.samples == 11


def test_the_sign_is_that_of_training(world: Path, tmp_path: Path) -> None:
    """Training on the data that the direction was trained on moves with it; undoing it has the other sign."""
    (tmp_path / "same.jsonl").write_text("\n".join(json.dumps(row) for row in tiny.rows(32)))
    trainer = tiny.trainer(
        tmp_path, peft_config=None, base=get_peft_model(tiny.model(), tiny.lora(init_lora_weights=True)), learning_rate=0.05
    )
    trainer.train()
    trainer.save_model()
    view = safety_gradient(world / "aligned", str(tmp_path / "same.jsonl"), tmp_path)
    assert sum(layer.score for layer in view.layers) > 0
    assert view.buffered_loss is None


def test_the_command_with_a_subspace(world: Path, tmp_path: Path, gqa_subspace: AlignmentSubspace) -> None:
    gqa_subspace.save(tmp_path / "S.safetensors")
    line = ["safety-gradient", str(world / "aligned"), str(world / "train.jsonl"), "-d", str(tmp_path / "S.safetensors")]
    line += ["--buffer", str(world / "buffer"), "--json", str(tmp_path / "s.json"), "--plot", str(tmp_path / "s.png"), "--samples", "5"]
    result = CliRunner().invoke(app, line)
    assert result.exit_code == 0, (result.output, result.exception)
    assert "over all layers" in result.output
    assert len(json.loads((tmp_path / "s.json").read_text())["layers"]) == 21
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")


def test_refused(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"data = 'missing.jsonl': cannot be read"):
        safety_gradient(world / "aligned", "missing.jsonl", world / "reinforce")
    with pytest.raises(ConfigurationError, match="no answer within max_length = 2"):
        safety_gradient(world / "aligned", str(world / "train.jsonl"), world / "reinforce", max_length=2)
    whole = AlignmentSubspace.from_pair(
        tiny.DATA / "gqa-base", tiny.DATA / "gqa-aligned", target_modules=["q_proj"], whole=True, progress=False
    )
    whole.save(tmp_path / "W.safetensors")
    with pytest.raises(SubspaceError, match="keeps V whole"):
        safety_gradient(world / "aligned", str(world / "train.jsonl"), tmp_path / "W.safetensors")


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("content", ["{}", "no", ""])
def test_a_damaged_model(world: Path, tmp_path: Path, file: str, content: str) -> None:
    shutil.copytree(world / "aligned", tmp_path / "aligned")
    (tmp_path / "aligned" / file).write_text(content)
    with pytest.raises(ConfigurationError, match="cannot be loaded"):
        safety_gradient(tmp_path / "aligned", str(world / "train.jsonl"), world / "reinforce")
