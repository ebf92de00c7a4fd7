"""Adapters that PEFT does not load, that have no effect, or that hold no finite numbers; and remedies that can be followed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.tiny import DATA
from trl_safety import AlignmentSubspace, apply_safe_lora
from trl_safety.adapters.folder import AdapterFolder
from trl_safety.adapters.lora import check_finite, lora_modules
from trl_safety.adapters.record import RECORD, AdapterRecord
from trl_safety.config.safe_lora import SafeLoraConfig
from trl_safety.corrections.folder import correct_folder
from trl_safety.corrections.safe_lora import SafeLoraCorrection
from trl_safety.errors import AdapterError, ReportError, SubspaceError
from trl_safety.linalg.finite import is_finite
from trl_safety.linalg.low_rank import is_zero_product
from trl_safety.reports.report import REPORT, fingerprints, read_report, verify, write_report
from trl_safety.version import __version__

Q = "model.layers.0.self_attn.q_proj"
A, B = (f"base_model.model.{Q}.lora_{side}.weight" for side in "AB")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DATA / "gqa-adapter", tmp_path / "adapter"))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Apply `change` to the adapter's tensors; what it returns, if anything, takes their place."""
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file(change(tensors) or tensors, file, metadata={"format": "pt"})


def renamed(old: str, new: str) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()}


def corrected(adapter: Path, output: Path, subspace: AlignmentSubspace) -> Path:
    correct_folder(adapter, output, subspace, SafeLoraCorrection(SafeLoraConfig(threshold=1.0)))
    return output


NOT_LOADED = {
    "no prefix": ("base_model.model.", ""),
    "under DistributedDataParallel": ("base_model.model.", "module.base_model.model."),
    "compiled": ("base_model.model.", "_orig_mod.base_model.model."),
    "compiled inside": ("base_model.model.", "base_model.model._orig_mod."),
    "under FSDP": ("base_model.model.", "base_model.model._fsdp_wrapped_module."),
    "checkpointed": ("layers.", "_checkpoint_wrapped_module.layers."),
    "with the adapter's name": (".weight", ".default.weight"),
    "inside a wrapped layer": (".lora_", ".base_layer.lora_"),
}


@pytest.mark.parametrize("names", NOT_LOADED.values(), ids=NOT_LOADED.keys())
def test_names_that_peft_does_not_load(adapter: Path, tmp_path: Path, gqa_subspace: AlignmentSubspace, names: tuple[str, str]) -> None:
    rewrite(adapter, renamed(*names))
    with pytest.warns(UserWarning, match="missing adapter keys"):
        # Under the name that is in the file, some versions of PEFT load it by chance.
        model = PeftModel.from_pretrained(tiny.model(), str(adapter), adapter_name="mine")
    assert not any(module.B.any() for module in lora_modules(model))
    with pytest.raises(AdapterError, match=r"is not named as PEFT needs it"):
        AdapterFolder.open(adapter)
    with pytest.raises(AdapterError, match=r"is not named as PEFT needs it"):
        corrected(adapter, tmp_path / "out", gqa_subspace)
    assert not (tmp_path / "out").exists()


def test_the_remedy_for_names_works(adapter: Path) -> None:
    rewrite(adapter, renamed("base_model.model.", "_orig_mod."))
    with pytest.raises(AdapterError) as raised:
        AdapterFolder.open(adapter)
    first = next(iter(load_file(adapter / "adapter_model.safetensors")))
    right = first.replace("_orig_mod.", "base_model.model.")
    assert repr(right) in str(raised.value)
    rewrite(adapter, renamed("_orig_mod.", "base_model.model."))
    assert AdapterFolder.open(adapter).factors.keys() == AdapterFolder.open(DATA / "gqa-adapter").factors.keys()


def test_verify_refuses_a_report_of_names_that_peft_does_not_load(adapter: Path, tmp_path: Path, gqa_subspace: AlignmentSubspace) -> None:
    """Written by an earlier version, which did not look at names."""
    out = corrected(adapter, tmp_path / "out", gqa_subspace)
    assert verify(out).protected
    rewrite(out, renamed("base_model.model.", ""))
    tiny.rewrite_json(out / REPORT, **fingerprints(out))
    with pytest.raises(AdapterError, match="is not named as PEFT needs it"):
        verify(out)


def cancels(tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        if "lora_B" in name:
            half = tensor[:, : tensor.shape[1] // 2]
            tensor.copy_(torch.cat([half, half], 1))
        else:
            half = tensor[: tensor.shape[0] // 2]
            tensor.copy_(torch.cat([half, -half], 0))


def zeroed(side: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if f"lora_{side}" in name:
                tensor.zero_()

    return change


def disjoint(tensors: dict[str, torch.Tensor]) -> None:
    """B uses directions that A does not have."""
    for name, tensor in tensors.items():
        tensor[:, ::2] = 0 if "lora_B" in name else tensor[:, ::2]
        if "lora_A" in name:
            tensor[1::2] = 0


NOTHING: dict[str, tuple[Callable[[dict[str, torch.Tensor]], None], dict[str, Any]]] = {
    "B": (zeroed("B"), {}),
    "A": (zeroed("A"), {}),
    # A correction's mark holds the alpha of the layer that it stands at.
    "scaling": (lambda _: None, {"lora_alpha": 0, "alpha_pattern": {}}),
    "pattern": (lambda _: None, {"alpha_pattern": {".*": 0}}),
    "alpha too small": (lambda _: None, {"alpha_pattern": {".*": 1e-30}}),
    "underflow": (lambda tensors: {name: tensor * 1e-42 for name, tensor in tensors.items()}, {}),
    "cancels": (cancels, {}),
    "disjoint": (disjoint, {}),
}


@pytest.mark.parametrize("route", NOTHING)
def test_no_update_by_any_route(adapter: Path, tmp_path: Path, gqa_subspace: AlignmentSubspace, route: str) -> None:
    change, options = NOTHING[route]
    out = corrected(adapter, tmp_path / "out", gqa_subspace)
    report = read_report(out)
    for folder in (adapter, out):
        assert not AdapterFolder.open(folder).is_zero
        rewrite(folder, change)
        tiny.rewrite_json(folder / "adapter_config.json", **options)
        assert AdapterFolder.open(folder).is_zero
    # A report that says otherwise is not believed, and a newly written one does not say so.
    tiny.rewrite_json(out / REPORT, **fingerprints(out))
    with pytest.raises(ReportError, match="NOT protected: its update is zero in every layer"):
        verify(out)
    write_report(out, report)
    written = read_report(out)
    assert not written.protected
    assert not any(method.acted for method in written.methods)
    with pytest.raises(ReportError, match="BUT its update is zero in every layer"):
        verify(out)


def test_an_adapter_of_the_model_without_its_head(adapter: Path, tmp_path: Path, gqa_subspace: AlignmentSubspace) -> None:
    """PEFT puts nothing of it on the model that answers, and only warns."""
    rewrite(adapter, renamed("base_model.model.model.", "base_model.model."))
    tiny.rewrite_json(adapter / "adapter_config.json", task_type="CAUSAL_LM")
    with pytest.raises(AdapterError, match="is named as in the model without its head"):
        corrected(adapter, tmp_path / "out", gqa_subspace)
    assert not (tmp_path / "out").exists()


def test_cards_of_other_encodings_stay_as_they_are(adapter: Path, tmp_path: Path, gqa_subspace: AlignmentSubspace) -> None:
    (adapter / "README.md").write_bytes("Modèle\n".encode("latin-1"))
    out = corrected(adapter, tmp_path / "out", gqa_subspace)
    content = (out / "README.md").read_bytes()
    assert content.startswith("Modèle".encode("latin-1"))
    write_report(out, read_report(out))
    assert (out / "README.md").read_bytes() == content
    verify(out)


def test_adapters_one_folder_down(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "parent").mkdir()
    shutil.move(adapter, tmp_path / "parent" / "default")
    with pytest.raises(AdapterError, match=r"has no adapter_config\.json; name one of those within it: .*default"):
        AdapterFolder.open(tmp_path / "parent")


@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_updates_are_updates(scale: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    factors = (torch.randn(24, 4) * scale).to(dtype), (torch.randn(4, 16) * scale).to(dtype)
    assert not is_zero_product(*factors)
    assert is_zero_product(torch.cat([factors[0], factors[0]], 1), torch.cat([factors[1], -factors[1]], 0))
    # One layer that acts is enough.
    assert not is_zero_product(torch.zeros(24, 4).index_fill_(0, torch.tensor([3]), scale), factors[1])
    assert is_zero_product(torch.zeros(24, 0), torch.zeros(0, 16))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [A, B])
def test_factors_that_are_no_numbers(adapter: Path, tmp_path: Path, gqa_subspace: AlignmentSubspace, name: str, value: float) -> None:
    rewrite(adapter, lambda tensors: tensors[name].view(-1)[3].fill_(value) and None)
    with pytest.raises(AdapterError, match=rf"tensor '{name}' holds NaN or infinity"):
        corrected(adapter, tmp_path / "out", gqa_subspace)
    assert not (tmp_path / "out").exists()


def test_what_else_is_no_number(adapter: Path, gqa_model: Any, gqa_subspace: AlignmentSubspace) -> None:
    rewrite(adapter, lambda tensors: tensors.update({"base_model.model.lm_head.weight": torch.tensor([[float("nan")]])}))
    with pytest.raises(AdapterError, match=r"tensor 'base_model\.model\.lm_head\.weight' holds NaN"):
        AdapterFolder.open(adapter)
    with torch.no_grad():
        lora_modules(gqa_model)[2].B[0, 0] = float("inf")
    for act in (lambda: check_finite(lora_modules(gqa_model)), lambda: apply_safe_lora(gqa_model, gqa_subspace, threshold=1.0)):
        with pytest.raises(AdapterError, match=rf"tensor '{lora_modules(gqa_model)[2].name}.lora_B' of the model's adapter holds NaN"):
            act()
    assert is_finite(torch.tensor([1, 2]))
    assert is_finite(torch.zeros(3).to(torch.float8_e4m3fn))
    assert not is_finite(torch.tensor([float("nan")]).to(torch.float8_e4m3fn))


@pytest.mark.parametrize("alpha", ["NaN", "Infinity", '"16"', "null"])
def test_a_scaling_that_is_no_number(adapter: Path, alpha: str) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora_alpha": "HERE"}).replace('"HERE"', alpha))
    with pytest.raises(AdapterError, match="lora_alpha"):
        AdapterFolder.open(adapter)


@pytest.mark.parametrize("part", ["left", "right", "singular_values", "samples", "whole"])
def test_a_subspace_that_is_no_number(tmp_path: Path, part: str) -> None:
    cut: dict[str, Any] = {"whole": True} if part == "whole" else {"rank": 4}
    pair = DATA / "gqa-base", DATA / "gqa-aligned"
    path = AlignmentSubspace.from_pair(*pair, target_modules="all-linear", progress=False, **cut).save(tmp_path / "S.safetensors")
    with safe_open(str(path), framework="pt") as handle:
        metadata = handle.metadata()
    tensors = load_file(path)
    tensors[f"{Q}:{part}"].view(-1)[1] = float("nan")
    save_file(tensors, path, metadata=metadata)

    def used() -> None:
        layer = AlignmentSubspace.load(path).layers[Q]
        layer.operator("scaled")
        layer.factors()

    with pytest.raises(SubspaceError, match=rf"tensor '{Q}:{part}' holds NaN or infinity"):
        used()


@pytest.mark.parametrize("value", ["NaN", "Infinity", '"wide"'])
def test_a_subspaces_norm_that_is_no_number(tmp_path: Path, gqa_subspace: AlignmentSubspace, value: str) -> None:
    path = gqa_subspace.save(tmp_path / "S.safetensors")
    with safe_open(str(path), framework="pt") as handle:
        metadata = handle.metadata()
    key = next(key for key in metadata if key.startswith("trl_safety"))
    header = json.loads(metadata[key])
    header["layers"][Q]["frobenius_norm"] = "HERE"
    save_file(load_file(path), path, metadata={**metadata, key: json.dumps(header).replace('"HERE"', value)})
    with pytest.raises(SubspaceError, match=rf"'{Q}:frobenius_norm' holds NaN"):
        AlignmentSubspace.load(path)


def test_a_record_that_is_no_number(tmp_path: Path) -> None:
    AdapterRecord.of_layers("buffer", "base", {Q: tiny.model().get_submodule(Q)}).write(tmp_path)
    assert AdapterRecord.read(tmp_path).samples[Q].numel() == 256
    samples = json.loads((tmp_path / RECORD).read_text())["samples"]
    for entries in (torch.full((256,), float("nan")), torch.zeros(255)):
        tiny.rewrite_json(tmp_path / RECORD, samples={**samples, Q: entries.numpy().tobytes().hex()})
        with pytest.raises(AdapterError, match=rf"samples of layer '{Q}' are not 256 numbers"):
            AdapterRecord.read(tmp_path)


def test_what_another_tool_wrote_into_the_configuration(adapter: Path) -> None:
    for wrote, remedy in (
        (peft.__version__, "the file names no newer PEFT"),
        ("0.1.0", "the file names no newer PEFT"),
        (None, "the file names no newer PEFT"),
        ("99.1.0", r"pip install peft==99\.1\.0"),
    ):
        tiny.rewrite_json(adapter / "adapter_config.json", peft_version=wrote, fused_gates=True)
        with pytest.raises(AdapterError, match=rf"sets fused_gates, which PEFT {peft.__version__} does not know.*{remedy}"):
            AdapterFolder.open(adapter)
    # The remedy that is named for the others.
    tiny.rewrite_json(adapter / "adapter_config.json", fused_gates=None, peft_version=peft.__version__)
    AdapterFolder.open(adapter)


def test_remedies_for_files_of_another_version(adapter: Path, tmp_path: Path, gqa_subspace: AlignmentSubspace) -> None:
    out = corrected(adapter, tmp_path / "out", gqa_subspace)
    for wrote, remedy in (("9.0", r"pip install trl-safety==9\.0, or correct"), (__version__, "reads 1; correct")):
        tiny.rewrite_json(out / REPORT, schema_version=99, trl_safety=wrote)
        with pytest.raises(ReportError, match=rf"has schema version 99.*{remedy}"):
            verify(out)
    for option, value in (("use_dora", True), ("init_lora_weights", "pissa"), ("init_lora_weights", "loftq")):
        shutil.copy(DATA / "gqa-adapter" / "adapter_config.json", adapter)
        tiny.rewrite_json(adapter / "adapter_config.json", **{option: value})
        with pytest.raises(AdapterError, match=option) as raised:
            AdapterFolder.open(adapter)
        assert ("convert the adapter" in str(raised.value)) == (value == "pissa")
        assert "unset" not in str(raised.value)


def test_a_correction_of_nothing_protects_nothing(adapter: Path, tmp_path: Path, gqa_subspace: AlignmentSubspace) -> None:
    rewrite(adapter, cancels)
    report = correct_folder(adapter, tmp_path / "out", gqa_subspace, SafeLoraCorrection(SafeLoraConfig(threshold=1.0)))
    assert not report.protected
    assert read_report(tmp_path / "out") == report
    assert "This adapter is NOT protected" in (tmp_path / "out" / "README.md").read_text()
