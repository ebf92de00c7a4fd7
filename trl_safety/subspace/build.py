"""Build the subspace of a large pair layer by layer on disk, so that an interrupted build can resume."""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import safe_open

from trl_safety.adapters.files import replacing
from trl_safety.errors import SubspaceError
from trl_safety.subspace.artifact import METADATA_KEY, AlignmentSubspace
from trl_safety.subspace.fit import PairFit

PARTIAL = ".partial"

ALIGNMENT = 8

COPIED_AT_A_TIME = 1 << 24


def build_subspace(path: str | Path, base: str | Path, aligned: str | Path, *, progress: bool = True, **options: Any) -> AlignmentSubspace:
    """Fit the subspace of a pair into a file, holding one layer in memory at a time.

    Finished layers are kept in `PATH.partial` until all are done, and are then joined into one file. If an interrupted build is
    started again, it resumes from there; if the pair's files or the options have changed, it starts over. A file that the same build
    has already finished is used as it is.

    Args:
        path: the file to write.
        base: the unaligned model.
        aligned: the aligned model.
        progress: show a progress bar.
        options: those of `AlignmentSubspace.from_pair`.

    Raises:
        CheckpointError, SubspaceError: as in `AlignmentSubspace.from_pair`; or the file cannot be written, in which case the finished
            layers are kept.
    """
    path = Path(path)
    fit = PairFit(base, aligned, **options)
    plan = fit.plan
    if path.is_file() and _plan_of(path) == plan:
        return AlignmentSubspace.load(path)
    parts = _Parts(path, plan, list(fit.targets))
    for layer in fit.layers(skip=parts.done, progress=progress):
        parts.add(AlignmentSubspace({layer.name: layer}, fit.provenance))
    parts.join(fit)
    return AlignmentSubspace.load(path)


class _Parts:
    """The layers of an unfinished build, one file each, in a folder beside the output file."""

    def __init__(self, path: Path, plan: str, names: list[str]) -> None:
        self._path, self._plan, self._names = path, plan, names
        self._folder = path.with_name(path.name + PARTIAL)
        self._left = f"the finished layers stay in {str(self._folder)!r}, and the same call resumes from there"
        self._asked = self._folder / "plan.json"
        if self._folder.is_dir() and _text(self._asked) != plan:
            shutil.rmtree(self._folder)
        self.done = [name for name in names if self._file(name).is_file()]

    def _file(self, name: str) -> Path:
        return self._folder / f"{self._names.index(name):05}.safetensors"

    def add(self, layer: AlignmentSubspace) -> None:
        if not self._asked.is_file():
            with replacing(self._asked, error=SubspaceError, setting="output") as temporary:
                temporary.write_text(self._plan, encoding="utf-8")
        (name,) = layer.layers
        layer.save(self._file(name), left=self._left)

    def join(self, fit: PairFit) -> None:
        files = [self._file(name) for name in self._names]
        headers = [_header(file) for file in files]
        contents = [json.loads(header["__metadata__"][METADATA_KEY]) for header, _ in headers]
        described = {name: row for content in contents for name, row in content["layers"].items()}
        # The fingerprint needs no factors: the metadata of the loaded parts is enough.
        identity = AlignmentSubspace(
            {n: x for file in files for n, x in AlignmentSubspace.load(file).layers.items()}, fit.provenance
        ).identity
        content = {"provenance": asdict(fit.provenance), "identity": identity, "layers": described, "plan": self._plan}
        with replacing(self._path, error=SubspaceError, setting="output", left=self._left) as temporary, temporary.open("wb") as out:
            _join(zip(files, headers, strict=True), {METADATA_KEY: json.dumps(content), "format": "pt"}, out)
        shutil.rmtree(self._folder)


def _join(parts: Iterable[tuple[Path, tuple[dict[str, Any], int]]], metadata: dict[str, str], out: BinaryIO) -> None:
    """Concatenate safetensors files. The safetensors library would need all tensors in memory to write them."""
    found = [
        (name, row, file, start + row["data_offsets"][0], row["data_offsets"][1] - row["data_offsets"][0])
        for file, (tensors, start) in parts
        for name, row in tensors.items()
        if name != "__metadata__"
    ]
    # As in the library, wider dtypes come first, so that every tensor is aligned to its element size.
    found.sort(key=lambda entry: -(entry[4] // max(math.prod(entry[1]["shape"]), 1)))
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for name, row, _, _, size in found:
        header[name] = {**row, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    out.write(struct.pack("<Q", len(text)) + text)
    for _, _, file, start, size in found:
        with file.open("rb") as source:
            source.seek(start)
            while size:
                size -= out.write(source.read(min(size, COPIED_AT_A_TIME)))


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """A safetensors file's header, and where its data begins."""
    with file.open("rb") as source:
        (length,) = struct.unpack("<Q", source.read(8))
        header: dict[str, Any] = json.loads(source.read(length))
        return header, 8 + length


def _plan_of(path: Path) -> str | None:
    """The plan that a finished file was built from, if it has one."""
    try:
        AlignmentSubspace.load(path)
    except SubspaceError:
        return None
    with safe_open(str(path), framework="pt") as handle:
        plan: str | None = json.loads(handle.metadata()[METADATA_KEY]).get("plan")
        return plan


def _text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None
