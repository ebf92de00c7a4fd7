import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny import DATA
from trl_safety.adapters.checkpoint import Checkpoint, digest
from trl_safety.errors import CheckpointError

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
    with pytest.raises(CheckpointError, match="no local folder"):
        Checkpoint("someone/no-such-model")
    with pytest.raises(CheckpointError, match="no local folder"):
        Checkpoint(tmp_path / "missing" / "folder")
    with pytest.raises(CheckpointError, match="neither"):
        Checkpoint(tmp_path)


def test_digest_tells_values_shapes_and_dtypes_apart() -> None:
    tensor = torch.arange(6.0)
    different = [tensor + 1, tensor.view(2, 3), tensor.half(), tensor[:5]]
    assert len({digest(t) for t in (tensor, *different)}) == 5
    assert digest(tensor) == digest(tensor.clone())
