"""Adapters that were trained elsewhere, adopted and used as a buffer and as a ReinforceLoRA."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from typer.testing import CliRunner

from tests import tiny
from tests.tiny import DATA
from trl_safety.adapters.adopt import adopt
from trl_safety.adapters.folder import AdapterFolder
from trl_safety.adapters.marks import kind_of
from trl_safety.adapters.record import open_kind
from trl_safety.cli.app import app
from trl_safety.corrections.buffer_reinforce import merge_reinforce
from trl_safety.errors import AdapterError, CheckpointError, ConfigurationError
from trl_safety.reports.report import read_report, verify

ALIGNED = str(DATA / "gqa-aligned")


def foreign(folder: Path, **options: Any) -> Path:
    """An adapter as plain PEFT writes it, of the aligned model."""
    torch.manual_seed(5)
    get_peft_model(tiny.model(), tiny.lora(**options)).save_pretrained(str(folder))
    tiny.rewrite_json(folder / "adapter_config.json", base_model_name_or_path="authors/their-model")
    return folder


def user(folder: Path) -> Path:
    shutil.copytree(DATA / "gqa-adapter", folder)
    tiny.rewrite_json(folder / "adapter_config.json", base_model_name_or_path=ALIGNED)
    return folder


@pytest.mark.parametrize("model", [ALIGNED, None], ids=["checked", "not-checked"])
@pytest.mark.parametrize("kind", ["buffer", "reinforce"])
def test_taken_in(tmp_path: Path, kind: str, model: str | None) -> None:
    source = foreign(tmp_path / "theirs")
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    checked = adopt(source, tmp_path / "ours", kind, model)
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before
    folder, record = open_kind(tmp_path / "ours", kind, kind)
    assert (record.kind, kind_of(folder.config)) == (kind, kind)
    assert len(record.samples) == (9 if model else 0)
    assert "not verified" in checked
    assert ("later uses will be checked against 9 layers" in checked) == bool(model)
    theirs, ours = (load_file(path / "adapter_model.safetensors") for path in (source, tmp_path / "ours"))
    assert tiny.identical(theirs, ours)


def test_a_buffer_in_training(tmp_path: Path) -> None:
    for name, model in (("checked", ALIGNED), ("not", None)):
        adopt(foreign(tmp_path / f"their-{name}"), tmp_path / name, "buffer", model)
        trainer = tiny.trainer(tmp_path / f"run-{name}", safety={"buffer_reinforce": {"buffer": str(tmp_path / name)}})
        trainer.train()
        trainer.save_model()
        check = read_report(tmp_path / f"run-{name}").base_check
        assert check.startswith("weights of the model match" if model else "not verified")
        assert verify(tmp_path / f"run-{name}").methods[0].name == "buffer_reinforce"
    with pytest.raises(AdapterError, match="use the adapter that was made for this model"):
        tiny.trainer(tmp_path / "other", base=tiny.model("gqa-base"), safety={"buffer_reinforce": {"buffer": str(tmp_path / "checked")}})


def test_a_merge(tmp_path: Path) -> None:
    adapter = user(tmp_path / "user")
    for name, model in (("checked", ALIGNED), ("not", None)):
        adopt(foreign(tmp_path / f"their-{name}"), tmp_path / name, "reinforce", model)
        report = merge_reinforce(adapter, tmp_path / name, tmp_path / f"merged-{name}")
        assert report.base_check.startswith("weights of" if model else "not verified")
        assert verify(tmp_path / f"merged-{name}").protected
    tiny.rewrite_json(adapter / "adapter_config.json", base_model_name_or_path=str(DATA / "gqa-base"))
    with pytest.raises(AdapterError, match="use the adapter that was made for this model"):
        merge_reinforce(adapter, tmp_path / "checked", tmp_path / "wrong")


def test_its_own_base_is_compared(tmp_path: Path) -> None:
    source = foreign(tmp_path / "theirs")
    shutil.copytree(ALIGNED, tmp_path / "same")
    for base, says in ((ALIGNED, "later uses will be checked against 9 layers of"), (str(tmp_path / "same"), "match those of")):
        tiny.rewrite_json(source / "adapter_config.json", base_model_name_or_path=base)
        checked = adopt(source, tmp_path / f"ours-{Path(base).name}", "buffer", ALIGNED)
        assert says in checked
        assert "not verified" not in checked
    tiny.rewrite_json(source / "adapter_config.json", base_model_name_or_path=str(DATA / "gqa-base"))
    with pytest.raises(AdapterError, match="differs from that of"):
        adopt(source, tmp_path / "wrong", "buffer", ALIGNED)
    assert not (tmp_path / "wrong").exists()


def test_a_quantised_model(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    full = tiny.wide(tmp_path / "full")
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    AutoModelForCausalLM.from_pretrained(full, quantization_config=nf4, device_map={"": "cpu"}).save_pretrained(tmp_path / "nf4")
    for name in ("theirs", "user"):
        torch.manual_seed(5)
        get_peft_model(AutoModelForCausalLM.from_pretrained(full), tiny.lora()).save_pretrained(str(tmp_path / name))
    adopt(tmp_path / "theirs", tmp_path / "ours", "reinforce", tmp_path / "nf4")
    assert open_kind(tmp_path / "ours", "reinforce", "reinforce")[1].quantised
    assert "up to quantisation" in merge_reinforce(tmp_path / "user", tmp_path / "ours", tmp_path / "merged").base_check


def test_gpt2(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=32))
    model.save_pretrained(tmp_path / "gpt2")
    options: dict[str, Any] = {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "init_lora_weights": False}
    get_peft_model(model, LoraConfig(r=2, task_type="CAUSAL_LM", **options)).save_pretrained(str(tmp_path / "theirs"))
    assert "checked against 2 layers" in adopt(tmp_path / "theirs", tmp_path / "ours", "buffer", tmp_path / "gpt2")


def test_refused(tmp_path: Path) -> None:
    source = foreign(tmp_path / "theirs")

    def refused(match: str, *, adapter: Path = source, kind: str = "buffer", model: Any = None, error: Any = AdapterError) -> None:
        with pytest.raises(error, match=match):
            adopt(adapter, tmp_path / "out", kind, model)
        assert not (tmp_path / "out").exists()

    refused("as = 'user'", kind="user", error=ConfigurationError)
    refused("neither a folder nor a Hub repository", adapter=tmp_path / "missing")
    refused(r"is \[24, 48\], but \[48, 48\] in model", model=DATA / "mha-aligned")
    refused("not a local folder", model=tmp_path / "missing", error=CheckpointError)
    refused("holds more than LoRA factors", adapter=foreign(tmp_path / "more", modules_to_save=["lm_head"]))
    refused("its update is zero in every layer", adapter=foreign(tmp_path / "fresh", init_lora_weights=True))
    adopt(source, tmp_path / "ours", "buffer", ALIGNED)
    refused("is already marked as a buffer adapter", adapter=tmp_path / "ours")
    merged = merge_reinforce(user(tmp_path / "user"), _reinforce(tmp_path), tmp_path / "merged")
    assert merged.protected
    refused("was corrected by buffer_reinforce", adapter=tmp_path / "merged")
    with pytest.raises(AdapterError, match="already exists"):
        adopt(source, tmp_path / "ours", "buffer")
    with pytest.raises(AdapterError, match="trl-safety adopt"):
        merge_reinforce(tmp_path / "user", source, tmp_path / "out")


def _reinforce(tmp_path: Path) -> Path:
    adopt(foreign(tmp_path / "r"), tmp_path / "reinforce", "reinforce")
    return tmp_path / "reinforce"


def test_the_command(tmp_path: Path) -> None:
    source = foreign(tmp_path / "theirs")
    result = CliRunner().invoke(app, ["adopt", str(source), "-o", str(tmp_path / "ours"), "--as", "reinforce", "--model", ALIGNED])
    assert result.exit_code == 0, result.output
    assert "a reinforce adapter; base model: later uses will be checked against 9 layers" in result.output
    assert json.loads((tmp_path / "ours" / "safety_adapter.json").read_text())["kind"] == "reinforce"
    assert AdapterFolder.open(tmp_path / "ours").factors
    result = CliRunner().invoke(app, ["adopt", str(source), "-o", str(tmp_path / "ours"), "--as", "reinforce"])
    assert result.exit_code == 1
    assert "already exists" in result.output
