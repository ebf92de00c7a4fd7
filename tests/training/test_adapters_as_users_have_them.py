"""rsLoRA, patterns, modules_to_save, several adapters, GPT-2, tied weights, QLoRA, and every variant that is refused."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import nn

from tests import references, tiny
from tests.training.test_corrections import assert_close, expected, updates
from trl_safety import AlignmentSubspace, apply_csulora, apply_safe_lora, asft_penalty
from trl_safety.adapters.lora import lora_modules
from trl_safety.config.csulora import CsuloraConfig
from trl_safety.config.safe_lora import SafeLoraConfig
from trl_safety.corrections.csulora import CsuloraCorrection
from trl_safety.corrections.folder import correct_folder
from trl_safety.corrections.safe_lora import SafeLoraCorrection
from trl_safety.errors import AdapterError, SafetyError, SubspaceError
from trl_safety.reports.report import read_report


def dense_updates(model: Any) -> dict[str, torch.Tensor]:
    """ΔW as PEFT itself merges it: merged weight minus base weight, oriented out × in."""
    result = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            delta = layer.get_delta_weight(layer.active_adapters[0]).detach().double()
            result[name.removeprefix("base_model.model.")] = delta.T if getattr(layer, "fan_in_fan_out", False) else delta
    return result


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 6}, "alpha_pattern": {"q_proj": 16}},
        {"use_rslora": True, "rank_pattern": {"v_proj": 8}, "alpha_pattern": {"layers.0.self_attn.v_proj": 3}},
        {"layers_to_transform": [1, 2]},
        {"target_modules": r".*layers\.[02]\.self_attn\.(q|k|v|o)_proj"},
        {"target_modules": "all-linear"},
        {"init_lora_weights": "gaussian"},
        {"lora_bias": True},
        {"bias": "lora_only"},
    ],
    ids=str,
)
@pytest.mark.parametrize("method", ["safe_lora", "csulora"])
def test_options_of_plain_lora(tmp_path: Path, gqa_subspace: AlignmentSubspace, options: dict[str, Any], method: str) -> None:
    torch.manual_seed(1)
    model = get_peft_model(tiny.model(), tiny.lora(**options))
    with torch.no_grad():
        for module in lora_modules(model):
            module.B.normal_(std=0.1)
    before = dense_updates(model)
    assert_close(updates(model), before)
    model.save_pretrained(tmp_path / "trained")
    if method == "safe_lora":
        apply_safe_lora(model, gqa_subspace, threshold=1.0)
    else:
        apply_csulora(model, gqa_subspace)
    want = expected(method, gqa_subspace, before)
    assert_close(dense_updates(model), want)
    model.save_pretrained(tmp_path / "model")
    assert_close(dense_updates(PeftModel.from_pretrained(tiny.model(), str(tmp_path / "model"))), want)
    if method == "csulora":
        correct_folder(tmp_path / "trained", tmp_path / "folder", gqa_subspace, CsuloraCorrection(CsuloraConfig()))
        assert_close(dense_updates(PeftModel.from_pretrained(tiny.model(), str(tmp_path / "folder"))), want)


def test_penalty_with_scaling_is_that_of_the_merged_update(gqa_subspace: AlignmentSubspace) -> None:
    model = get_peft_model(tiny.model(), tiny.lora(use_rslora=True, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3}))
    total = 0.0
    for name, update in dense_updates(model).items():
        U, S, _ = (x.double() for x in gqa_subspace.layers[name].factors())
        M = U @ torch.diag(S**2) @ U.T / gqa_subspace.layers[name].frobenius_norm
        total += references.penalty(update, torch.eye(update.shape[1]), M).item()
    assert asft_penalty(model, gqa_subspace, scaled=True).item() == pytest.approx(total, rel=1e-5)


def test_modules_to_save_are_kept_and_reported(tmp_path: Path, gqa_subspace: AlignmentSubspace) -> None:
    trainer = tiny.trainer(
        tmp_path, safety={"safe_lora": {"threshold": 1.0}}, subspace=gqa_subspace, peft_config=tiny.lora(modules_to_save=["embed_tokens"])
    )
    trainer.train()
    trainer.save_model()
    report = read_report(tmp_path)
    assert len(report.not_covered) == 1
    assert "embed_tokens" in report.not_covered[0]
    assert "covered by no method: 1 parameters" in (tmp_path / "README.md").read_text()
    correct = {m.name for m in lora_modules(trainer.model)}
    assert set(report.methods[0].layers) == correct
    saved = PeftModel.from_pretrained(tiny.model(), str(tmp_path))
    trained = trainer.model.get_input_embeddings().modules_to_save["default"].weight
    assert torch.equal(saved.get_input_embeddings().modules_to_save["default"].weight, trained)


def test_of_several_adapters_the_active_one_is_meant(tmp_path: Path, gqa_subspace: AlignmentSubspace) -> None:
    model = get_peft_model(tiny.model(), tiny.lora())
    model.add_adapter("other", tiny.lora(r=6, target_modules=["k_proj"]))
    model.set_adapter("other")
    before = tiny.factors(model)
    apply_safe_lora(model, gqa_subspace, threshold=1.0)
    changed = {name for name, value in tiny.factors(model).items() if not torch.equal(value, before[name])}
    assert changed
    assert all(".other." in name for name in changed)
    model.save_pretrained(tmp_path)
    assert read_report(tmp_path / "other").protected
    assert not (tmp_path / "safety_report.json").exists()
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(AdapterError, match="2 adapters are active"):
        apply_safe_lora(model, gqa_subspace)
    apply_safe_lora(model, gqa_subspace, threshold=1.0, adapter="default")
    with pytest.raises(AdapterError, match="adapter = 'nope'"):
        apply_safe_lora(model, gqa_subspace, adapter="nope")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("gpt2")
    for name in ("base", "aligned"):
        GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=24, n_layer=2, n_head=2)).save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize("method", ["safe_lora", "csulora"])
def test_gpt2s_transposed_layers_and_fused_qkv(gpt2: Path, tmp_path: Path, method: str) -> None:
    from transformers import AutoModelForCausalLM

    subspace = AlignmentSubspace.from_pair(gpt2 / "base", gpt2 / "aligned", target_modules="all-linear", rank=4, progress=False)
    model = AutoModelForCausalLM.from_pretrained(gpt2 / "aligned")
    config = LoraConfig(
        r=3, lora_alpha=6, target_modules=["c_attn", "c_proj"], init_lora_weights=False, task_type="CAUSAL_LM", fan_in_fan_out=True
    )
    model = get_peft_model(model, config)
    want = expected(method, subspace, dense_updates(model))
    if method == "safe_lora":
        apply_safe_lora(model, subspace, threshold=1.0)
    else:
        apply_csulora(model, subspace)
    assert_close(dense_updates(model), want)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tied")
    for name in ("base", "aligned"):
        config = LlamaConfig(
            vocab_size=64, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, tie_word_embeddings=True
        )
        LlamaForCausalLM(config).save_pretrained(folder / name)
    return folder


def test_tied_head_is_found_under_the_embeddings_name(tied: Path) -> None:
    from transformers import AutoModelForCausalLM

    subspace = AlignmentSubspace.from_pair(tied / "base", tied / "aligned", target_modules=["q_proj", "lm_head"], rank=4, progress=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tied / "aligned"), tiny.lora(target_modules=["q_proj", "lm_head"]))
    want = expected("safe_lora", subspace, dense_updates(model))
    report = apply_safe_lora(model, subspace, threshold=1.0)
    assert_close(dense_updates(model), want)
    assert "match the subspace's aligned model in 3 of 3 layers" in report.base_check


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "use_dora = True"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
        ({"init_lora_weights": "olora"}, "init_lora_weights = 'olora'"),
        ({"init_lora_weights": "mica"}, "init_lora_weights = 'mica'"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens.*is an embedding"),
        ({"target_modules": [], "target_parameters": ["q_proj.weight"]}, "target_parameters"),
    ],
    ids=str,
)
def test_variants_are_refused_at_once(tmp_path: Path, gqa_subspace: AlignmentSubspace, options: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        tiny.trainer(tmp_path, safety={"asft": {}}, subspace=gqa_subspace, peft_config=tiny.lora(**{"init_lora_weights": True, **options}))


def test_loftq_and_other_tuners_are_refused(gqa_subspace: AlignmentSubspace) -> None:
    from peft import IA3Config, LoHaConfig

    config = tiny.lora()
    model = get_peft_model(tiny.model(), config)
    model.peft_config["default"].init_lora_weights = "loftq"
    with pytest.raises(AdapterError, match="loftq"):
        apply_safe_lora(model, gqa_subspace)
    for other in (IA3Config(target_modules=["k_proj"], feedforward_modules=[]), LoHaConfig(target_modules=["q_proj"])):
        with pytest.raises(AdapterError, match="peft_type"):
            apply_safe_lora(get_peft_model(tiny.model(), other), gqa_subspace)


def test_fused_experts_are_refused(tmp_path: Path, gqa_subspace: AlignmentSubspace) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=64,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
    )
    model = get_peft_model(
        MixtralForCausalLM(config), LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"])
    )
    with pytest.raises(AdapterError, match="target_parameters"):
        asft_penalty(model, gqa_subspace)


def test_merged_adapters_are_refused(gqa_subspace: AlignmentSubspace, gqa_model: Any) -> None:
    gqa_model.merge_adapter()
    with pytest.raises(AdapterError, match="unmerge_adapter"):
        apply_safe_lora(gqa_model, gqa_subspace)


def test_layers_are_found_under_compile_and_ddp_wrappers(gqa_subspace: AlignmentSubspace, gqa_model: Any) -> None:
    expected_value = asft_penalty(gqa_model, gqa_subspace)
    for wrapped in (torch.compile(gqa_model, backend="eager"), nn.DataParallel(gqa_model)):
        assert torch.equal(asft_penalty(wrapped, gqa_subspace), expected_value)


def test_a_vision_language_models_layers(tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    for name in ("base", "aligned"):
        config = LlavaConfig(
            text_config=LlamaConfig(vocab_size=64, hidden_size=24, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2),
            vision_config=CLIPVisionConfig(
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                image_size=8,
                patch_size=4,
                projection_dim=8,
            ),
        )
        LlavaForConditionalGeneration(config).save_pretrained(tmp_path / name)
    model = get_peft_model(
        AutoModelForImageTextToText.from_pretrained(tmp_path / "aligned"), tiny.lora(task_type=None, target_modules=["q_proj", "v_proj"])
    )
    names = {m.name for m in lora_modules(model)}
    subspace = AlignmentSubspace.from_pair(
        tmp_path / "base", tmp_path / "aligned", target_modules=["q_proj", "v_proj"], rank=4, progress=False
    )
    assert len(subspace.for_modules(names)) == len(names) == 6
    want = expected("safe_lora", subspace, updates(model))
    apply_safe_lora(model, subspace, threshold=1.0)
    assert_close(updates(model), want)


class TestQLoRA:
    """Real NF4 layers with double quantisation; V comes from the full-precision pair."""

    @pytest.fixture(scope="class")
    def pair(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """Layers of 64 and 128: bitsandbytes' CPU kernels are wrong for rows that are not a multiple of its 64-entry blocks."""
        from transformers import LlamaConfig, LlamaForCausalLM

        pytest.importorskip("bitsandbytes")
        folder = tmp_path_factory.mktemp("qlora")
        config = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4)
        for name in ("base", "aligned", "stranger"):
            LlamaForCausalLM(config).save_pretrained(folder / name)
        return folder

    @pytest.fixture
    def quantised(self, pair: Path) -> Any:
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        def load(name: str | Path = "aligned", **storage: Any) -> Any:
            config = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=torch.float32,
                **storage,
            )
            # A folder that is quantised already brings its own configuration.
            options = {} if isinstance(name, Path) else {"quantization_config": config}
            return AutoModelForCausalLM.from_pretrained(pair / name, device_map={"": "cpu"}, **options)

        return load

    @pytest.fixture
    def subspace(self, pair: Path) -> AlignmentSubspace:
        return AlignmentSubspace.from_pair(pair / "base", pair / "aligned", target_modules="all-linear", rank=8, progress=False)

    @pytest.mark.parametrize("method", ["safe_lora", "csulora"])
    def test_trains_corrects_saves_and_loads(self, tmp_path: Path, quantised: Any, subspace: AlignmentSubspace, method: str) -> None:
        block = {"asft": {"weight": 1.0}, method: {"threshold": 1.0} if method == "safe_lora" else {}}
        trainer = tiny.trainer(tmp_path, base=quantised(), safety=block, subspace=subspace, learning_rate=1e-3)
        assert type(trainer.model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj.base_layer")).__name__ == "Linear4bit"
        trainer.train()
        trainer.save_model()
        report = read_report(tmp_path)
        assert report.protected
        assert "in 9 of 9 layers" in report.base_check
        assert [m.name for m in report.methods] == ["asft", method]
        assert_close(updates(PeftModel.from_pretrained(quantised(), str(tmp_path))), updates(trainer.model))

    def test_penalty_is_that_of_the_full_precision_pair(self, pair: Path, quantised: Any, subspace: AlignmentSubspace) -> None:
        from transformers import AutoModelForCausalLM

        values = []
        for model in (quantised(), AutoModelForCausalLM.from_pretrained(pair / "aligned")):
            torch.manual_seed(0)
            values.append(asft_penalty(get_peft_model(model, tiny.lora()), subspace).item())
        assert values[0] == pytest.approx(values[1], rel=1e-6)
        assert values[0] > 0

    def test_another_model_is_seen_through_the_quantisation(self, tmp_path: Path, pair: Path, quantised: Any) -> None:
        subspace = AlignmentSubspace.from_pair(pair / "base", pair / "stranger", target_modules=tiny.TARGETS, rank=8, progress=False)
        with pytest.raises(AdapterError, match="another model"):
            tiny.trainer(tmp_path, base=quantised(), safety={"asft": {}}, subspace=subspace)

    @pytest.mark.parametrize("which", ["base", "aligned"])
    def test_the_base_is_told_from_the_aligned_model_through_the_quantisation(self, tmp_path: Path, pair: Path, which: str) -> None:
        """V at 5 % of W is below NF4's error of 9 % in every entry, but is detected over all layers together."""
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        near = AutoModelForCausalLM.from_pretrained(pair / "base")
        torch.manual_seed(4)
        with torch.no_grad():
            for parameter in near.parameters():
                parameter.add_(torch.randn_like(parameter) * parameter.std() * 0.05)
        near.save_pretrained(tmp_path / "aligned")
        shutil.copytree(pair / "base", tmp_path / "base")
        subspace = AlignmentSubspace.from_pair(tmp_path / "base", tmp_path / "aligned", target_modules="all-linear", rank=8, progress=False)
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / which, quantization_config=config, device_map={"": "cpu"})
        model = get_peft_model(model, tiny.lora(target_modules="all-linear"))
        if which == "base":
            with pytest.raises(AdapterError, match="the unaligned base of the pair, quantised"):
                apply_safe_lora(model, subspace)
        else:
            assert "in 21 of 21 layers, up to quantisation" in apply_safe_lora(model, subspace).base_check

    @pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
    @pytest.mark.parametrize("trained_on", ["aligned", "base", "stranger"])
    def test_a_saved_adapter_is_corrected_only_for_the_model_that_its_quantised_base_is(
        self, tmp_path: Path, pair: Path, quantised: Any, trained_on: str, storage: torch.dtype
    ) -> None:
        """The base model that the adapter names is a folder of 4-bit weights: compared up to their rounding."""
        quantised(trained_on, bnb_4bit_quant_storage=storage).save_pretrained(tmp_path / "stored")
        adapter = get_peft_model(quantised(tmp_path / "stored"), tiny.lora(target_modules="all-linear", init_lora_weights=False))
        adapter.save_pretrained(tmp_path / "adapter")
        subspace = AlignmentSubspace.from_pair(pair / "base", pair / "aligned", target_modules="all-linear", rank=8, progress=False)
        correction = SafeLoraCorrection(SafeLoraConfig(threshold=1.0))
        if trained_on == "aligned":
            report = correct_folder(tmp_path / "adapter", tmp_path / "out", subspace, correction)
            assert report.base_check.endswith("layers that were compared, up to quantisation")
        else:
            with pytest.raises(AdapterError, match="use the subspace of the model that the adapter was trained on"):
                correct_folder(tmp_path / "adapter", tmp_path / "out", subspace, correction)
            assert not (tmp_path / "out").exists()

    def test_a_base_in_eight_bits_is_said_not_to_be_verified(self, tmp_path: Path, pair: Path, subspace: AlignmentSubspace) -> None:
        from transformers import AutoModelForCausalLM

        get_peft_model(AutoModelForCausalLM.from_pretrained(pair / "aligned"), tiny.lora(init_lora_weights=False)).save_pretrained(
            tmp_path / "adapter"
        )
        shutil.copytree(pair / "aligned", tmp_path / "stored")
        tensors = load_file(tmp_path / "stored" / "model.safetensors")
        save_file({name: value.to(torch.int8) for name, value in tensors.items()}, tmp_path / "stored" / "model.safetensors")
        tiny.rewrite_json(tmp_path / "stored" / "config.json", quantization_config={"quant_method": "bitsandbytes"})
        tiny.rewrite_json(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path=str(tmp_path / "stored"))
        report = correct_folder(tmp_path / "adapter", tmp_path / "out", subspace, SafeLoraCorrection(SafeLoraConfig(threshold=1.0)))
        assert "not verified" in report.base_check
        assert "quantised in a format that cannot be read" in report.base_check

    def test_a_quantised_checkpoint_gives_no_subspace(self, tmp_path: Path, pair: Path, quantised: Any) -> None:
        quantised().save_pretrained(tmp_path / "stored")
        with pytest.raises(SafetyError, match=r"stored quantised.*full-precision"):
            AlignmentSubspace.from_pair(pair / "base", tmp_path / "stored", target_modules=tiny.TARGETS, rank=4, progress=False)


def test_a_name_that_only_the_wrapped_model_has_is_missing(gqa_model: Any) -> None:
    """Another package looks for the live names, finds nothing, and trains on. Here that is an error."""
    subspace = AlignmentSubspace.from_pair(
        tiny.DATA / "gqa-base", tiny.DATA / "gqa-aligned", target_modules=["o_proj"], rank=4, progress=False
    )
    with pytest.raises(SubspaceError, match="9 of 9 adapted layers"):
        asft_penalty(gqa_model, subspace)
