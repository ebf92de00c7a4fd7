"""Every function that reads a user's files gets each file damaged in every way: it raises an error of ours, or the damage is harmless."""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.tiny import DATA
from trl_safety import AlignmentSubspace
from trl_safety.adapters.adopt import adopt
from trl_safety.adapters.checkpoint import Checkpoint
from trl_safety.adapters.folder import AdapterFolder
from trl_safety.adapters.record import open_kind
from trl_safety.config.safe_lora import SafeLoraConfig
from trl_safety.corrections.buffer_reinforce import merge_reinforce
from trl_safety.corrections.folder import correct_folder
from trl_safety.corrections.safe_lora import SafeLoraCorrection
from trl_safety.errors import SafetyError
from trl_safety.evaluation.loading import load_model
from trl_safety.reports.report import read_report, verify, write_report
from trl_safety.subspace.build import build_subspace

SHARDED = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of each kind of file, none of them damaged."""
    root = tmp_path_factory.mktemp("whole")
    shutil.copytree(DATA / "gqa-base", root / "base")
    shutil.copytree(DATA / "gqa-aligned", root / "aligned")
    tiny.tokenizer().save_pretrained(root / "aligned")
    tensors = load_file(root / "base" / "model.safetensors")
    (root / "base" / "model.safetensors").unlink()
    save_file(tensors, root / "base" / "model-1.safetensors", metadata={"format": "pt"})
    (root / "base" / SHARDED).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "model-1.safetensors")}))
    shutil.copytree(DATA / "gqa-adapter", root / "adapter")
    tiny.rewrite_json(root / "adapter" / "adapter_config.json", base_model_name_or_path=str(root / "aligned"))
    space = build_subspace(root / "S.safetensors", root / "base", root / "aligned", target_modules="all-linear", rank=6, progress=False)
    correct_folder(root / "adapter", root / "protected", space, SafeLoraCorrection(SafeLoraConfig(threshold=1.0)))
    adopt(root / "adapter", root / "reinforce", "reinforce", root / "aligned")
    return root


def correction(root: Path, out: Path) -> None:
    space = AlignmentSubspace.load(root / "S.safetensors")
    correct_folder(root / "adapter", out, space, SafeLoraCorrection(SafeLoraConfig(threshold=1.0)))


def subspace(root: Path, out: Path, **options: Any) -> None:
    options = options or {"target_modules": "all-linear"}
    build_subspace(out / "S.safetensors", root / "base", root / "aligned", rank=2, progress=False, **options)


CALLS: dict[str, tuple[Callable[[Path, Path], Any], list[str]]] = {
    "open": (lambda root, _: AdapterFolder.open(root / "adapter"), ["adapter/adapter_config.json", "adapter/adapter_model.safetensors"]),
    "correct": (
        correction,
        ["adapter/adapter_config.json", "adapter/adapter_model.safetensors", "S.safetensors", "aligned/model.safetensors"],
    ),
    "load_subspace": (lambda root, _: AlignmentSubspace.from_pretrained(root / "S.safetensors"), ["S.safetensors"]),
    "subspace": (
        subspace,
        ["base/config.json", f"base/{SHARDED}", "base/model-1.safetensors", "aligned/config.json", "aligned/model.safetensors"],
    ),
    "subspace_of_an_adapter": (
        lambda root, out: subspace(root, out, adapter=root / "adapter"),
        ["adapter/adapter_config.json", "adapter/adapter_model.safetensors"],
    ),
    "checkpoint": (lambda root, _: Checkpoint(root / "aligned").modules, ["aligned/config.json", "aligned/model.safetensors"]),
    "verify": (
        lambda root, _: verify(root / "protected"),
        ["protected/adapter_config.json", "protected/adapter_model.safetensors", "protected/safety_report.json"],
    ),
    "verify_without_a_report": (lambda root, _: verify(root / "adapter"), ["adapter/adapter_config.json"]),
    "write_report": (
        lambda root, _: write_report(root / "protected", read_report(root / "protected")),
        ["protected/adapter_config.json", "protected/adapter_model.safetensors"],
    ),
    "open_kind": (
        lambda root, _: open_kind(root / "reinforce", "reinforce", "reinforce"),
        ["reinforce/adapter_config.json", "reinforce/adapter_model.safetensors", "reinforce/safety_adapter.json"],
    ),
    "merge": (
        lambda root, out: merge_reinforce(root / "adapter", root / "reinforce", out / "merged"),
        ["reinforce/safety_adapter.json", "adapter/adapter_model.safetensors", "aligned/model.safetensors", "aligned/config.json"],
    ),
    "adopt": (
        lambda root, out: adopt(root / "adapter", out / "ours", "buffer", root / "aligned"),
        ["adapter/adapter_config.json", "adapter/adapter_model.safetensors", "aligned/model.safetensors", "aligned/config.json"],
    ),
    "load_model": (
        lambda root, _: load_model(None, root / "adapter"),
        ["adapter/adapter_config.json", "adapter/adapter_model.safetensors", "aligned/model.safetensors", "aligned/tokenizer_config.json"],
    ),
}
INPUTS = [(name, file) for name, (_, files) in CALLS.items() for file in files]
CONTENTS: dict[str, bytes] = {
    "empty": b"",
    "no JSON": b"{",
    "a list": b"[]",
    "a number": b"3",
    "null": b"null",
    "an empty object": b"{}",
    "no UTF-8": b'{"a": "\xff\xfe"}',
    "a huge header": (2**60).to_bytes(8, "little") + b"{}",
}


@contextlib.contextmanager
def only_ours() -> Iterator[None]:
    with contextlib.suppress(SafetyError):
        yield


def copied(whole: Path, folder: Path) -> Path:
    root = folder / "files"
    shutil.copytree(whole, root)
    for config in root.glob("*/adapter_config.json"):
        tiny.rewrite_json(config, base_model_name_or_path=str(root / "aligned"))
    return root


@pytest.mark.parametrize(("call", "file"), INPUTS)
def test_files_that_are_damaged_as_a_whole(whole: Path, tmp_path: Path, call: str, file: str) -> None:
    act, _ = CALLS[call]
    root = copied(whole, tmp_path)
    with only_ours() if call == "verify_without_a_report" else contextlib.nullcontext():
        act(root, tmp_path / "fine")
    content = (root / file).read_bytes()
    for name, other in {**CONTENTS, "truncated": content[: len(content) // 2], "one byte short": content[:-1]}.items():
        (root / file).write_bytes(other)
        # Some of it is harmless, such as a configuration without its last newline.
        with only_ours():
            act(root, tmp_path / name.replace(" ", "-"))
            # A save is not read back: the trained adapter is kept with its report, and `verify` refuses it.
            assert name in {"one byte short", "an empty object"} or (call, file.rpartition(".")[2]) == ("write_report", "safetensors"), name
    (root / file).unlink()
    for name, make in (("missing", lambda: None), ("a folder", (root / file).mkdir)):
        make()
        with only_ours():
            act(root, tmp_path / name.replace(" ", "-"))
            assert file == "aligned/tokenizer_config.json" or file.endswith("config.json"), name


VALUES: list[Any] = [None, [], {}, "x", 3, -1, True, [1], {"a": [None]}, 1e400, "(", {"(": 1}]
JSON = [(call, file) for call, file in INPUTS if file.endswith(".json") and call in {"open", "verify", "open_kind", "subspace"}]


@pytest.mark.parametrize(("call", "file"), JSON)
def test_values_of_other_types(whole: Path, tmp_path: Path, call: str, file: str) -> None:
    act, _ = CALLS[call]
    root = copied(whole, tmp_path)
    content = json.loads((root / file).read_text())
    # A model class takes long to build; errors in a configuration are for Transformers to find.
    keys = (
        ["model_type", "architectures", "hidden_size", "vocab_size", "quantization_config"] if file.endswith("/config.json") else [*content]
    )
    for number, (key, value) in enumerate((key, value) for key in keys for value in VALUES):
        (root / file).write_text(json.dumps({**content, key: value}))
        with only_ours():
            act(root, tmp_path / str(number))


def test_a_subspaces_header_of_other_types(whole: Path, tmp_path: Path) -> None:
    path = whole / "S.safetensors"
    with safe_open(str(path), framework="pt") as handle:
        metadata = handle.metadata()
    key = next(key for key in metadata if key.startswith("trl_safety"))
    header, tensors = json.loads(metadata[key]), load_file(path)
    layer = next(iter(header["layers"]))
    changed = [{**header, part: value} for part in header for value in VALUES]
    changed += [{**header, "provenance": {**header["provenance"], part: value}} for part in header["provenance"] for value in VALUES]
    changed += [
        {**header, "layers": {**header["layers"], layer: {**header["layers"][layer], part: value}}}
        for part in header["layers"][layer]
        for value in VALUES
    ]
    for content in [*changed, *VALUES]:
        save_file(tensors, tmp_path / "S.safetensors", metadata={**metadata, key: json.dumps(content)})
        with only_ours():
            AlignmentSubspace.load(tmp_path / "S.safetensors")
    for part in ("left", "right", "singular_values", "samples"):
        for other in (torch.zeros(0), torch.zeros(3), torch.zeros(2, 2, 2), None):
            some = {**tensors, f"{layer}:{part}": other}
            save_file({name: tensor for name, tensor in some.items() if tensor is not None}, tmp_path / "S.safetensors", metadata=metadata)
            with pytest.raises(SafetyError, match="make"):
                AlignmentSubspace.load(tmp_path / "S.safetensors")


def test_tensors_of_other_shapes(whole: Path, tmp_path: Path) -> None:
    root = copied(whole, tmp_path)
    file = root / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    for number, name in enumerate(list(tensors)[:2]):
        for other in (
            torch.zeros(0),
            torch.zeros(3),
            torch.zeros(2, 2, 2),
            torch.zeros(2, 2),
            torch.zeros(4, 0),
            torch.ones(4, 4, dtype=torch.int8),
        ):
            save_file({**tensors, name: other}, file, metadata={"format": "pt"})
            for call in ("open", "correct", "adopt", "subspace_of_an_adapter", "merge", "load_model"):
                with only_ours():
                    CALLS[call][0](root, tmp_path / f"{number}-{call}-{list(other.shape)}")


@pytest.mark.parametrize("call", CALLS)
def test_a_file_for_a_folder_and_nothing_at_all(whole: Path, tmp_path: Path, call: str) -> None:
    act, files = CALLS[call]
    for top in {file.split("/")[0] for file in files}:
        for name in ("file", "empty-folder", "nothing"):
            root = copied(whole, tmp_path / f"{name}-{top}")
            gone = root / top
            shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
            if name == "file":
                gone.write_text("{}")
            elif name == "empty-folder":
                gone.mkdir()
            with only_ours():
                act(root, tmp_path / f"{name}-{top}-out")
