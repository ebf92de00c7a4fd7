"""Models and adapters as people have them: added tokens, revisions, quantised bases, vision-language models, damaged files."""

import importlib.util
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
    T5Config,
    T5ForConditionalGeneration,
)
from typer.testing import CliRunner

from tests import tiny
from trl_safety.adapters.folder import AdapterFolder
from trl_safety.cli.app import app
from trl_safety.errors import AdapterError, ConfigurationError
from trl_safety.evaluation.loading import attach, load_model

INPUT = torch.tensor([[3, 4, 5]])
ADDED = torch.tensor([[3, 64, 65]])


def aligned(folder: Path) -> str:
    tiny.model().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


def with_tokens(*tokens: str) -> Any:
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(list(tokens))
    return tokenizer


def adapter_of(base: str, folder: Path, *, rows: int | None = None, tokenizer: Any = None, model: Any = None, **options: Any) -> Path:
    """A trained-looking adapter of a base, with embeddings resized and trained as the options say."""
    torch.manual_seed(1)
    model = model or AutoModelForCausalLM.from_pretrained(base)
    if rows:
        model.resize_token_embeddings(rows)
    model = get_peft_model(model, tiny.lora(**options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn_like(parameter) * 0.1
    model.save_pretrained(str(folder))
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def logits(model: Any, tokens: torch.Tensor = INPUT) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.parametrize(
    ("rows", "options", "kept"),
    [
        (66, {"modules_to_save": ["embed_tokens", "lm_head"]}, True),
        (72, {"modules_to_save": ["embed_tokens", "lm_head"]}, True),
        (66, {}, True),
        (66, {"trainable_token_indices": {"embed_tokens": [64, 65]}}, True),
        (None, {"trainable_token_indices": [3, 4]}, True),
        (None, {"modules_to_save": ["lm_head"]}, True),
    ],
    ids=["modules-to-save", "padded", "resized", "token-indices", "indices-in-place", "head-alone"],
)
def test_adapters_that_brought_tokens(tmp_path: Path, rows: int | None, options: dict[str, Any], kept: bool) -> None:
    base = aligned(tmp_path / "base")
    added = with_tokens("<a>", "<b>") if rows else None
    folder = adapter_of(base, tmp_path / "adapter", rows=rows, tokenizer=added, **options)
    model, tokenizer = load_model(None, folder)
    assert len(tokenizer) == (66 if rows else 64)
    assert len(model.get_input_embeddings().weight) == (rows or 64)
    tokens = ADDED if rows and "trainable_token_indices" not in options else INPUT
    assert torch.isfinite(logits(model, tokens)).all()
    if rows in (None, 66):
        # What PEFT's own auto class loads; of padded embeddings it cannot load any.
        torch.manual_seed(0)
        own = AutoPeftModelForCausalLM.from_pretrained(str(folder)).eval()
        assert torch.equal(logits(model, tokens)[..., :64], logits(own, tokens)[..., :64])
    named, _ = load_model(base, folder)
    assert torch.equal(logits(named, INPUT)[..., :64], logits(model, INPUT)[..., :64])


def test_tokens_without_embeddings_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = aligned(tmp_path / "base")
    folder = adapter_of(base, tmp_path / "adapter", tokenizer=with_tokens("<a>", "<b>"))
    model, _ = load_model(None, folder)
    assert len(model.get_input_embeddings().weight) == 66
    assert "no embeddings for 2 of them" in caplog.text


def test_an_adapter_of_another_size_is_refused(tmp_path: Path) -> None:
    base = aligned(tmp_path / "base")
    torch.manual_seed(0)
    other = AutoModelForCausalLM.from_config(
        LlamaConfig(**{**json.loads((tmp_path / "base" / "config.json").read_text()), "hidden_size": 64})
    )
    folder = adapter_of(base, tmp_path / "adapter", model=other)
    with pytest.raises(AdapterError, match="PEFT cannot put it on the model"):
        load_model(base, folder)


def test_a_second_adapter(tmp_path: Path) -> None:
    base = aligned(tmp_path / "base")
    model, _ = load_model(None, adapter_of(base, tmp_path / "one"))
    assert attach(model, AdapterFolder.open(adapter_of(base, tmp_path / "two")), "two") is model
    assert set(model.peft_config) == {"default", "two"}


def test_the_revision_that_the_adapter_names(tmp_path: Path, hub_cache: Callable[..., None], caplog: pytest.LogCaptureFixture) -> None:
    tiny.model("gqa-base").save_pretrained(tmp_path / "old")
    tiny.tokenizer().save_pretrained(tmp_path / "old")
    hub_cache("org/model", main=aligned(tmp_path / "new"), v1=str(tmp_path / "old"))
    folder = adapter_of(str(tmp_path / "old"), tmp_path / "adapter")
    tiny.rewrite_json(folder / "adapter_config.json", base_model_name_or_path="org/model", revision="v1")
    want = logits(load_model(tmp_path / "old", None)[0])
    for model in (None, "org/model"):
        loaded, _ = load_model(model, folder)
        with loaded.disable_adapter():
            assert torch.equal(logits(loaded), want)
    assert not caplog.text
    # Asked for by name, it is obeyed; what the adapter says holds for its own base alone.
    main = logits(load_model("org/model", None)[0])
    assert not torch.equal(main, want)
    assert torch.equal(logits(load_model("org/model", None, revision="v1")[0]), want)
    loaded, _ = load_model("org/model", folder, revision="main")
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded), main)
    # Some tools write there what is no revision of the base.
    for nonsense in ("checkpoint-500", "1.0", 7):
        caplog.clear()
        tiny.rewrite_json(folder / "adapter_config.json", revision=nonsense)
        loaded, _ = load_model("org/model", folder)
        assert "is not used" in caplog.text
        with loaded.disable_adapter():
            assert torch.equal(logits(loaded), main)
    with pytest.raises(ConfigurationError, match="revision = 'v9'"):
        load_model("org/model", None, revision="v9")
    with pytest.raises(ConfigurationError, match="is a folder, which has no revisions"):
        load_model(tmp_path / "old", None, revision="v1")


def test_the_revision_that_a_command_names(tmp_path: Path, hub_cache: Callable[..., None]) -> None:
    tiny.model("gqa-base").save_pretrained(tmp_path / "old")
    tiny.tokenizer().save_pretrained(tmp_path / "old")
    hub_cache("org/model", main=aligned(tmp_path / "new"), v1=str(tmp_path / "old"))
    adapter = adapter_of(aligned(tmp_path / "base"), tmp_path / "adapter")
    tiny.rewrite_json(adapter / "adapter_config.json", base_model_name_or_path="org/model", revision="v1")
    (tmp_path / "harmful.jsonl").write_text("".join(json.dumps({"prompt": f"w{number} w5"}) + "\n" for number in range(9)))

    def completions(name: str, *line: str) -> list[str]:
        result = CliRunner().invoke(app, ["eval", *line, "--harmful", str(tmp_path / "harmful.jsonl"), "-o", str(tmp_path / name)])
        assert result.exit_code == 0, result.output
        return [json.loads(row)["completion"] for row in (tmp_path / name / "completions.jsonl").read_text().splitlines()]

    old, new = completions("old-alone", str(tmp_path / "old")), completions("new-alone", str(tmp_path / "new"))
    assert old != new
    assert completions("main", "org/model") == new
    assert completions("v1", "org/model", "--revision", "v1") == old
    # With an adapter on it: its own base's revision, where none is asked for.
    named = completions("named", "org/model", "--adapter", str(adapter))
    asked = completions("asked", "org/model", "--adapter", str(adapter), "--revision", "main")
    tiny.rewrite_json(adapter / "adapter_config.json", base_model_name_or_path=str(tmp_path / "new"), revision=None)
    assert completions("on-new", str(tmp_path / "new"), "--adapter", str(adapter)) == asked != named
    # The baseline's own; and which commit gave which rates is kept.
    both = completions("both", "org/model", "--baseline", "org/model", "--baseline-revision", "v1")
    assert both == old + new
    found = json.loads((tmp_path / "both" / "evaluation.json").read_text())
    commits = [(tmp_path / "hub" / "models--org--model" / "refs" / name).read_text() for name in ("v1", "main")]
    assert [(one["name"], one["commit"]) for one in found["models"]] == list(zip(("org/model@v1", "org/model"), commits, strict=True))
    assert json.loads((tmp_path / "named" / "evaluation.json").read_text())["models"][0]["commit"] == commits[0]
    assert json.loads((tmp_path / "v1" / "evaluation.json").read_text())["model"] == "org/model@v1"
    for name, revision in (("aligned", "--baseline-revision"), (str(adapter), "--baseline-revision"), ("org/model", "--grader-revision")):
        line = ["eval", "org/model", "--adapter", str(adapter), "--baseline", name, revision, "v1", "-o", str(tmp_path / "no")]
        result = CliRunner().invoke(app, [*line, "--harmful", str(tmp_path / "harmful.jsonl")])
        assert result.exit_code == 1
        assert "leave it out" in result.output
    for command, line in (
        ("eval", ["org/model"]),
        ("sweep", [str(adapter), "--model", "org/model", "--method", "safe_lora", "--grid", "threshold=1"]),
    ):
        wanted = [command, *line, "--revision", "v9", "--harmful", str(tmp_path / "harmful.jsonl"), "-o", str(tmp_path / "no")]
        result = CliRunner().invoke(app, wanted)
        assert result.exit_code == 1
        assert "revision = 'v9': 'org/model' has none of this name" in result.output
    assert not (tmp_path / "no").exists()


def test_a_revision_of_a_folder_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = adapter_of(aligned(tmp_path / "base"), tmp_path / "adapter")
    tiny.rewrite_json(folder / "adapter_config.json", revision="main")
    load_model(None, folder)
    assert not caplog.text
    tiny.rewrite_json(folder / "adapter_config.json", revision="v1")
    load_model(None, folder)
    assert "is a folder, which has no revisions" in caplog.text


def test_a_quantised_base_in_full_precision(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("bitsandbytes")
    full = tiny.wide(tmp_path / "full")
    quantised = AutoModelForCausalLM.from_pretrained(
        full, quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"), device_map={"": "cpu"}
    )
    quantised.save_pretrained(tmp_path / "nf4")
    tiny.tokenizer().save_pretrained(tmp_path / "nf4")
    folder = adapter_of(full, tmp_path / "adapter")
    tiny.rewrite_json(folder / "adapter_config.json", base_model_name_or_path=str(tmp_path / "nf4"))
    model, _ = load_model(full, folder)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(full)))
    assert "one of it and" in caplog.text
    # The base itself is loaded as it is stored.
    stored, _ = load_model(None, folder)
    with stored.disable_adapter():
        assert not torch.equal(logits(stored), logits(model))
    with pytest.raises(AdapterError, match=r"is not that of '.*nf4'"):
        load_model(tiny.wide(tmp_path / "other", seed=7), folder)


TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SIGHT = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}


def llava() -> Any:
    config = LlavaConfig(text_config=LlamaConfig(**TEXT), vision_config=CLIPVisionConfig(**SIGHT), image_token_index=63)
    return LlavaForConditionalGeneration(config)


def gemma() -> Any:
    text = Gemma3TextConfig(**TEXT, head_dim=8)
    return Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=SiglipVisionConfig(**SIGHT), image_token_index=63))


@pytest.mark.parametrize("make", [llava, gemma])
def test_vision_language_models_are_asked_in_text(tmp_path: Path, make: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    whole = make().eval()
    whole.save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    folder = adapter_of(str(tmp_path / "base"), tmp_path / "adapter", model=type(whole).from_pretrained(tmp_path / "base"))
    model, tokenizer = load_model(tmp_path / "base", None)
    assert torch.equal(logits(model), logits(whole))
    assert model.generate(INPUT, max_new_tokens=2, min_new_tokens=2, do_sample=False).shape == (1, 5)
    assert len(tokenizer) == 64
    model, _ = load_model(None, folder)
    assert not torch.equal(logits(model), logits(whole))


def test_an_adapter_of_the_text_model_alone(tmp_path: Path) -> None:
    """Its names are not the vision-language model's, so that PEFT would put nothing on it."""
    whole = gemma()
    whole.save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    folder = adapter_of(str(tmp_path / "base"), tmp_path / "adapter", model=Gemma3ForCausalLM(whole.config.text_config))
    with pytest.raises(AdapterError, match=r"PEFT cannot put it on the model|is not in the loaded model as it was saved"):
        load_model(tmp_path / "base", folder)


def test_weights_that_are_missing(tmp_path: Path) -> None:
    """Transformers makes them up with a warning: what would be measured is nobody's model."""
    base = aligned(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if "layers.1." not in name}, file, metadata={"format": "pt"})
    with pytest.raises(ConfigurationError, match=r"cannot be loaded \('model.layers.1.*more weights of LlamaForCausalLM are not in it"):
        load_model(base, None)


def test_models_that_answer_no_prompts(tmp_path: Path) -> None:
    T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)).save_pretrained(tmp_path)
    with pytest.raises(ConfigurationError, match="of type 't5', which answers no prompts"):
        load_model(tmp_path, None)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", ""),
        ("config.json", "[]"),
        ("config.json", '{"model_type": 3}'),
        ("config.json", '{"model_type": "no_such_model"}'),
        ("config.json", '{"model_type": "llama", "hidden_size": "wide"}'),
        ("config.json", '{"model_type": "own", "auto_map": {"AutoConfig": "a.B"}}'),
        ("model.safetensors", "short"),
        ("model.safetensors", None),
        ("tokenizer.json", "{}"),
        ("tokenizer_config.json", "[]"),
    ],
)
@pytest.mark.parametrize("own", [False, True], ids=["model", "base-of-an-adapter"])
def test_damaged_models(tmp_path: Path, file: str, content: str | None, own: bool) -> None:
    base = aligned(tmp_path / "base")
    folder = adapter_of(base, tmp_path / "adapter") if own else None
    (tmp_path / "base" / file).unlink()
    if content is None:
        (tmp_path / "base" / file).mkdir()
    else:
        (tmp_path / "base" / file).write_text(content)
    with pytest.raises((ConfigurationError, AdapterError), match=r"cannot be loaded"):
        load_model(None if own else base, folder)


@pytest.mark.parametrize("content", ["{", "[]", "3"])
def test_damaged_generation_configs(tmp_path: Path, hub_cache: Callable[..., None], content: str) -> None:
    """Transformers goes on without it, and without the stop tokens that it alone names."""
    base = aligned(tmp_path / "base")
    (tmp_path / "base" / "generation_config.json").write_text(content)
    hub_cache("org/model", main=base)
    for model in (base, "org/model"):
        with pytest.raises(ConfigurationError, match=r"its generation_config.json (cannot be read|holds no object)"):
            load_model(model, None)


@pytest.mark.parametrize(
    ("quantisation", "message"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "install what it needs, or name the full-precision model"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "says that it is stored in 4 bits, and 'model.layers.0.* is not"),
    ],
    ids=["gptq", "not-quantised"],
)
def test_quantised_models_that_cannot_be_loaded(tmp_path: Path, quantisation: dict[str, Any], message: str) -> None:
    pytest.importorskip("bitsandbytes")
    if quantisation["quant_method"] == "gptq" and importlib.util.find_spec("optimum"):
        pytest.skip("what it needs is installed")
    base = aligned(tmp_path / "base")
    tiny.rewrite_json(tmp_path / "base" / "config.json", quantization_config=quantisation)
    with pytest.raises(ConfigurationError, match=message):
        load_model(base, None)


def test_adapters_that_need_what_is_not_installed(tmp_path: Path) -> None:
    folder = adapter_of(aligned(tmp_path / "base"), tmp_path / "adapter")
    tiny.rewrite_json(folder / "adapter_config.json", megatron_config={"a": 1})
    with pytest.raises(AdapterError, match="PEFT cannot put it on the model"):
        load_model(None, folder)


def test_weights_in_parts_and_pickles(tmp_path: Path) -> None:
    base = aligned(tmp_path / "base")
    want = logits(load_model(base, None)[0])
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    file.unlink()
    torch.save(tensors, tmp_path / "base" / "pytorch_model.bin")
    assert torch.equal(logits(load_model(base, None)[0]), want)
    (tmp_path / "base" / "pytorch_model.bin").unlink()
    parts = {name: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(tensors)}
    for part in set(parts.values()):
        save_file({name: tensor for name, tensor in tensors.items() if parts[name] == part}, tmp_path / "base" / part, {"format": "pt"})
    (tmp_path / "base" / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": parts}))
    assert torch.equal(logits(load_model(base, None)[0]), want)
    (tmp_path / "base" / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ConfigurationError, match=r"cannot be loaded .*model-00002-of-00002.*fetch or save it again"):
        load_model(base, None)


def test_names_that_are_no_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.json").write_text("{}")
    for model in ("", "no such model", "org/none", "a/b/c", tmp_path / "empty", tmp_path / "file.json"):
        with pytest.raises(ConfigurationError, match="model"):
            load_model(model, None)


def test_options_are_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="model is missing"):
        load_model(None, None)
    folder = adapter_of(aligned(tmp_path / "base"), tmp_path / "adapter")
    assert LoraConfig.from_pretrained(str(folder)).revision is None
