import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.tiny import DATA
from trl_safety import AlignmentSubspace
from trl_safety.adapters.checkpoint import Checkpoint, digest
from trl_safety.errors import CheckpointError
from trl_safety.subspace.build import build_subspace

LAYER = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DATA / "gqa-aligned", tmp_path / "model"))


def rewrite(folder: Path, change: object) -> None:
    """Apply `change` to the tensors and save them again."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)  # type: ignore[operator]
    save_file(tensors, folder / "model.safetensors")


def shard(folder: Path) -> None:
    """Split a one-file checkpoint over three files with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    index = {}
    for part in range(3):
        file = f"model-{part + 1:05d}-of-00003.safetensors"
        save_file({name: tensors[name] for name in names[part::3]}, folder / file)
        index |= dict.fromkeys(names[part::3], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def test_reads_one_file_and_shards_alike(folder: Path) -> None:
    whole = {name: Checkpoint(folder).read(name) for name in Checkpoint(folder).modules if "norm" not in name}
    shard(folder)
    sharded = Checkpoint(folder)
    assert all(torch.equal(sharded.read(name), tensor) for name, tensor in whole.items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_any_float_dtype(folder: Path, dtype: torch.dtype) -> None:
    rewrite(folder, lambda t: t.update({name: value.to(dtype) for name, value in t.items()}))
    assert Checkpoint(folder).read(LAYER).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantised_tensors_are_refused(folder: Path, dtype: torch.dtype) -> None:
    rewrite(folder, lambda t: t.update({f"{LAYER}.weight": t[f"{LAYER}.weight"].to(dtype)}))
    with pytest.raises(CheckpointError, match=rf"{LAYER}.*quantised.*full-precision"):
        Checkpoint(folder).read(LAYER)


def test_quantised_checkpoint_is_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "bitsandbytes"}}))
    with pytest.raises(CheckpointError, match=r"bitsandbytes.*full-precision"):
        Checkpoint(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_are_refused(folder: Path, value: float) -> None:
    rewrite(folder, lambda t: t[f"{LAYER}.weight"].view(-1)[7].fill_(value))
    with pytest.raises(CheckpointError, match=rf"{LAYER}.*NaN"):
        Checkpoint(folder).read(LAYER)


def test_truncated_file_is_refused(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*truncated"):
        Checkpoint(folder)


def test_missing_shard_is_refused(folder: Path) -> None:
    shard(folder)
    file = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][f"{LAYER}.weight"]
    (folder / file).unlink()
    with pytest.raises(CheckpointError, match=file):
        Checkpoint(folder).read(LAYER)


def test_pickles_are_never_read(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="pickled"):
        Checkpoint(folder)


def test_neither_folder_nor_hub(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a local folder"):
        Checkpoint("someone/no-such-model")
    with pytest.raises(CheckpointError, match="not a local folder"):
        Checkpoint(tmp_path / "missing" / "folder")
    with pytest.raises(CheckpointError, match="neither"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("shards", [False, True], ids=["one-file", "shards"])
def test_from_the_cache_without_a_network(folder: Path, hub_cache: Callable[..., None], shards: bool) -> None:
    if shards:
        shard(folder)
    hub_cache("org/model", main=str(folder), old=str(DATA / "gqa-base"))
    found = Checkpoint("org/model")
    assert torch.equal(found.read(LAYER), Checkpoint(DATA / "gqa-aligned").read(LAYER))
    assert found.revision == f"{0:040x}"
    old = Checkpoint("org/model", "old")
    assert torch.equal(old.read(LAYER), Checkpoint(DATA / "gqa-base").read(LAYER))
    assert old.revision == f"{1:040x}"
    assert torch.equal(Checkpoint("org/model", f"{1:040x}").read(LAYER), old.read(LAYER))
    for revision in ("v9", f"{2:040x}"):
        with pytest.raises(CheckpointError, match="could not be fetched from the Hub"):
            Checkpoint("org/model", revision)


def test_a_pair_from_the_cache(tmp_path: Path, hub_cache: Callable[..., None]) -> None:
    hub_cache("org/base", main=str(DATA / "gqa-base"))
    hub_cache("org/aligned", main=str(DATA / "gqa-aligned"))
    options = {"target_modules": "all-linear", "rank": 4, "progress": False}
    built = build_subspace(tmp_path / "S.safetensors", "org/base", "org/aligned", **options)
    assert built.identity == AlignmentSubspace.from_pair(DATA / "gqa-base", DATA / "gqa-aligned", **options).identity
    assert built.provenance.base_revision == f"{0:040x}"


@pytest.mark.parametrize("missing", [["model.safetensors"], ["model.safetensors", "config.json"]])
def test_what_the_cache_lacks(folder: Path, hub_cache: Callable[..., None], missing: list[str]) -> None:
    """The cache holds only the configuration; the weights may be on the Hub."""
    for file in missing:
        (folder / file).unlink()
    hub_cache("org/model", main=str(folder))
    with pytest.raises(CheckpointError, match="could not be fetched from the Hub"):
        Checkpoint("org/model")


def test_one_file_counts_where_there_are_shards_too(folder: Path) -> None:
    """Transformers does the same: the shards may be left over from a larger save."""
    whole = (folder / "model.safetensors").read_bytes()
    shard(folder)
    (folder / "model.safetensors").write_bytes(whole)
    rewrite(folder, lambda t: t.update({f"{LAYER}.weight": t[f"{LAYER}.weight"] + 1}))
    assert torch.equal(Checkpoint(folder).read(LAYER), AutoModelForCausalLM.from_pretrained(folder).get_submodule(LAYER).weight.detach())


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", ""),
        ("config.json", "[]"),
        ("model.safetensors.index.json", "{}"),
        ("model.safetensors.index.json", "3"),
        ("model.safetensors.index.json", '{"weight_map": ["a"]}'),
        ("model.safetensors.index.json", '{"weight_map": {"a": 1}}'),
    ],
)
def test_damaged_descriptions(folder: Path, file: str, content: str) -> None:
    shard(folder)
    (folder / file).write_text(content)
    with pytest.raises(CheckpointError, match="fetch or save"):
        Checkpoint(folder)


def test_a_class_that_is_not_known_is_read_by_its_own_names(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "no_such_model"}')
    assert torch.equal(Checkpoint(folder).read(LAYER), Checkpoint(DATA / "gqa-aligned").read(LAYER))


def test_four_bits_without_bitsandbytes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = f"{LAYER}.weight"
    rewrite(folder, lambda t: t.update({f"{key}.quant_state.bitsandbytes__nf4": torch.zeros(4, dtype=torch.uint8)}))
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(CheckpointError, match="without bitsandbytes"):
        Checkpoint(folder, quantised=True).weight(LAYER)


def test_four_bits_that_are_damaged(folder: Path) -> None:
    pytest.importorskip("bitsandbytes")
    key = f"{LAYER}.weight"
    rewrite(folder, lambda t: t.update({f"{key}.quant_state.bitsandbytes__nf4": torch.zeros(4, dtype=torch.uint8)}))
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        Checkpoint(folder, quantised=True).weight(LAYER)


def test_digest_tells_values_shapes_and_dtypes_apart() -> None:
    tensor = torch.arange(6.0)
    different = [tensor + 1, tensor.view(2, 3), tensor.half(), tensor[:5]]
    assert len({digest(t) for t in (tensor, *different)}) == 5
    assert digest(tensor) == digest(tensor.clone())
