"""Sixteen and more model families, their checkpoints named as on the Hub: a pair, its subspace, an adapter, a correction, the base check."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D
from typer.testing import CliRunner

from tests import tiny
from trl_safety import AlignmentSubspace
from trl_safety.adapters.checkpoint import Checkpoint
from trl_safety.adapters.lora import lora_modules
from trl_safety.cli.app import app
from trl_safety.config.safe_lora import SafeLoraConfig
from trl_safety.corrections.folder import correct_folder
from trl_safety.corrections.safe_lora import SafeLoraCorrection
from trl_safety.errors import AdapterError
from trl_safety.evaluation.evaluate import read_evaluation
from trl_safety.reports.report import verify
from trl_safety.subspace.recognition import verify_base

TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SIGHT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def llava() -> Any:
    config = tf.LlavaConfig(text_config=tf.LlamaConfig(**TEXT), vision_config=tf.CLIPVisionConfig(**SIGHT), image_token_index=63)
    return tf.LlavaForConditionalGeneration(config)


def gemma3() -> Any:
    text, vision = tf.Gemma3TextConfig(**TEXT, head_dim=8), tf.SiglipVisionConfig(**SIGHT)
    return tf.Gemma3ForConditionalGeneration(tf.Gemma3Config(text_config=text, vision_config=vision, image_token_index=63))


def paligemma() -> Any:
    text, vision = tf.GemmaConfig(**TEXT, head_dim=8), tf.SiglipVisionConfig(**SIGHT)
    return tf.PaliGemmaForConditionalGeneration(
        tf.PaliGemmaConfig(text_config=text, vision_config=vision, image_token_index=63, projection_dim=32)
    )


def qwen2_vl() -> Any:
    text = {**TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}}
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2}
    ids = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}
    return tf.Qwen2VLForConditionalGeneration(tf.Qwen2VLConfig(text_config=text, vision_config=vision, **ids))


def experts(name: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """Experts in separate tensors, as in every mixture's checkpoint, where this Transformers joins them on loading."""
    gate, up, down = ("w1", "w3", "w2") if name == "block_sparse_moe" else ("gate_proj", "up_proj", "down_proj")

    def split(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        result = {}
        for key, tensor in state.items():
            key = key.replace(".mlp.", f".{name}.")
            stem = key.rpartition(".")[0]
            if key.endswith("experts.gate_up_proj"):
                for i, one in enumerate(tensor):
                    result[f"{stem}.{i}.{gate}.weight"], result[f"{stem}.{i}.{up}.weight"] = one.chunk(2)
            elif key.endswith("experts.down_proj"):
                result |= {f"{stem}.{i}.{down}.weight": one for i, one in enumerate(tensor)}
            else:
                result[key] = tensor
        return result

    return split


def fused(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Projections in one tensor, which Transformers splits on loading."""
    kinds = {"self_attn.{}_proj.weight": ("gate", "q", "k", "v"), "mlp.{}_proj.weight": ("gate", "up")}
    names = {"self_attn.{}_proj.weight": "attn.gqkv_proj.weight", "mlp.{}_proj.weight": "mlp.gate_up_proj.weight"}
    result = dict(state)
    for pattern, parts in kinds.items():
        for stem in [key.removesuffix(pattern.format("gate")) for key in state if key.endswith(pattern.format("gate"))]:
            result[stem + names[pattern]] = torch.cat([result.pop(stem + pattern.format(part)) for part in parts])
    return {key.replace("self_attn.o_proj", "attn.o_proj"): tensor for key, tensor in result.items()}


def renamed(*rules: tuple[str, str], tied: bool = False) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    def rename(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        result = {}
        for key, tensor in state.items():
            if tied and key == "lm_head.weight":
                continue
            for pattern, replacement in rules:
                key = re.sub(pattern, replacement, key)
            result[key] = tensor
        return result

    return rename


SEEING = (
    (r"^lm_head", "language_model.lm_head"),
    (r"^model\.language_model\.", "language_model.model."),
    (r"^model\.vision_tower\.", "vision_tower.vision_model."),
    (r"^model\.multi_modal_projector", "multi_modal_projector"),
)

FAMILIES: dict[str, tuple[Callable[[], Any], Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]]] = {
    "llama": (lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT)), renamed()),
    "smollm": (lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT, tie_word_embeddings=True)), renamed(tied=True)),
    "mistral": (lambda: tf.MistralForCausalLM(tf.MistralConfig(**TEXT)), renamed()),
    "qwen2": (lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(**TEXT)), renamed()),
    "qwen3": (lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**TEXT, head_dim=8)), renamed()),
    "gemma2": (lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**TEXT, head_dim=8)), renamed(tied=True)),
    "gemma3-text": (lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**TEXT, head_dim=8)), renamed(tied=True)),
    "phi3": (lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**TEXT)), renamed()),
    "stablelm": (lambda: tf.StableLmForCausalLM(tf.StableLmConfig(**TEXT)), renamed()),
    "olmo2": (lambda: tf.Olmo2ForCausalLM(tf.Olmo2Config(**TEXT)), renamed()),
    "gpt2": (
        lambda: tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64)),
        renamed((r"^transformer\.", ""), tied=True),
    ),
    "gpt-neox": (
        lambda: tf.GPTNeoXForCausalLM(
            tf.GPTNeoXConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
        ),
        renamed(),
    ),
    "opt": (
        lambda: tf.OPTForCausalLM(
            tf.OPTConfig(vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32)
        ),
        renamed((r"^model\.", ""), tied=True),
    ),
    "falcon": (
        lambda: tf.FalconForCausalLM(tf.FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)),
        renamed(tied=True),
    ),
    "bloom": (
        lambda: tf.BloomForCausalLM(tf.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)),
        renamed((r"^transformer\.", ""), tied=True),
    ),
    "mixtral": (
        lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**TEXT, num_local_experts=4)),
        experts("block_sparse_moe"),
    ),
    "qwen3-moe": (lambda: tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**TEXT, **EXPERTS, head_dim=8)), experts("mlp")),
    "hrm-text": (lambda: tf.HrmTextForCausalLM(tf.HrmTextConfig(**{**TEXT, "num_key_value_heads": 4}, head_dim=8)), fused),
    "llava": (llava, renamed(*SEEING)),
    "gemma3": (gemma3, renamed(*SEEING[1:], tied=True)),
    "paligemma": (paligemma, renamed(*SEEING[1:], tied=True)),
    "qwen2-vl": (qwen2_vl, renamed((r"^model\.language_model\.", "model."), (r"^model\.visual\.", "visual."))),
}


def written(family: str, folder: Path, seed: int) -> Any:
    """Saves a model to a folder under the Hub's names."""
    make, rename = FAMILIES[family]
    if family == "hrm-text" and not hasattr(tf, "HrmTextForCausalLM"):
        pytest.skip("this Transformers does not have it yet")
    torch.manual_seed(seed)
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    folder.mkdir()
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in rename(model.state_dict()).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tiny.tokenizer().save_pretrained(folder)
    return model


def linear(model: nn.Module) -> dict[str, nn.Module]:
    head = model.get_output_embeddings()  # type: ignore[operator]
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D) and module is not head}


def loaded(folder: Path, model: Any) -> Any:
    found, report = type(model).from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_from_the_names_on_the_hub(family: str, tmp_path: Path) -> None:
    models = [loaded(tmp_path / name, written(family, tmp_path / name, seed)) for seed, name in enumerate(("base", "aligned"))]
    subspace = AlignmentSubspace.from_pair(
        tmp_path / "base", tmp_path / "aligned", target_modules="all-linear", rank=6, progress=False, device="cpu"
    )
    base, aligned = (linear(model) for model in models)
    assert list(subspace.layers) == list(aligned)
    for name, layer in subspace.layers.items():
        V = (aligned[name].weight - base[name].weight).detach()
        V = V.T if layer.transposed else V
        assert layer.frobenius_norm == pytest.approx(float(V.norm()), rel=1e-5), name
        assert torch.allclose(layer.singular_values, torch.linalg.svdvals(V)[: layer.rank], rtol=1e-4), name
        # Which of the pair is which, at the same entries as of the loaded model.
        assert max(layer.difference(aligned[name].weight)[0], layer.difference(base[name].weight)[1]) == 0, name
    options = {"r": 2, "lora_alpha": 4, "target_modules": sorted(aligned), "init_lora_weights": False}
    model = get_peft_model(models[1], LoraConfig(**options, fan_in_fan_out=family == "gpt2"))
    model.save_pretrained(str(tmp_path / "adapter"))
    tiny.rewrite_json(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path=str(tmp_path / "aligned"))
    adapted = [module for module in lora_modules(model) if module.name in subspace.layers]
    assert f"in {len(aligned)} of {len(aligned)} layers" in verify_base(adapted, subspace.layers)
    report = correct_folder(
        tmp_path / "adapter", tmp_path / "out", subspace, SafeLoraCorrection(SafeLoraConfig(threshold=1.0, operator="scaled"))
    )
    assert f"weights of {tmp_path / 'aligned'} match the subspace's aligned model in all 8 layers" in report.base_check
    assert verify(tmp_path / "out").protected
    # Some families' tokenizer classes put their own way to cut text in place of this one's, by which a special token alone is one.
    (tmp_path / "task.jsonl").write_text('{"prompt": "<s> w3 w4", "answer": "w5"}\n')
    line = ["eval", str(tmp_path / "aligned"), "--adapter", str(tmp_path / "out"), "--baseline", "aligned", "--new-tokens", "2"]
    asked = CliRunner().invoke(app, [*line, "--task", str(tmp_path / "task.jsonl"), "-o", str(tmp_path / "E")])
    assert asked.exit_code == 0, (asked.output, asked.exception)
    found = read_evaluation(tmp_path / "E")
    assert [one.scores[0].task.count for one in found.models if one.scores[0].task] == [1, 1]
    tiny.rewrite_json(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path=str(tmp_path / "base"))
    with pytest.raises(AdapterError, match="differs from the subspace's aligned model"):
        correct_folder(tmp_path / "adapter", tmp_path / "other", subspace, SafeLoraCorrection(SafeLoraConfig(threshold=1.0)))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_is_as_transformers_loads_it(family: str, tmp_path: Path) -> None:
    model = loaded(tmp_path / "model", written(family, tmp_path / "model", 0))
    checkpoint = Checkpoint(tmp_path / "model")
    own = dict(model.named_parameters())
    assert set(own) <= set(checkpoint.parameters)
    for name, parameter in own.items():
        asked = checkpoint.parameters[name]
        assert checkpoint.shape(asked) == parameter.shape, name
        assert torch.equal(checkpoint.tensor(asked), parameter.detach()), name


def test_as_this_version_saves_them(tmp_path: Path) -> None:
    """One model of the pair was saved by this Transformers, the other is as downloaded."""
    written("llava", tmp_path / "base", 0)
    loaded(tmp_path / "aligned", written("llava", tmp_path / "aligned", 1)).save_pretrained(tmp_path / "saved")
    pairs = [(tmp_path / "base", tmp_path / name) for name in ("aligned", "saved")]
    one, other = (AlignmentSubspace.from_pair(*pair, target_modules="all-linear", rank=4, progress=False) for pair in pairs)
    assert one.identity == other.identity
