"""A build on disk equals the one in memory, whatever interrupted it."""

import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import DATA
from trl_safety import AlignmentSubspace
from trl_safety.errors import SubspaceError
from trl_safety.subspace import fit as subspace
from trl_safety.subspace.build import PARTIAL, build_subspace

PAIR = (DATA / "gqa-base", DATA / "gqa-aligned")
CUTS: list[dict[str, Any]] = [{"rank": 6}, {"tolerance": 0.1}, {"whole": True}, {"whole": True, "dtype": torch.bfloat16}]


def equal(one: AlignmentSubspace, other: AlignmentSubspace) -> bool:
    parts = ("left", "singular_values", "right", "whole", "samples")
    pairs = [(getattr(x, part), getattr(other.layers[name], part)) for name, x in one.layers.items() for part in parts]
    same = all((a is None and b is None) or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)
    return same and one.identity == other.identity and list(one.layers) == list(other.layers)


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_on_the_disk_as_in_memory(tmp_path: Path, cut: dict[str, Any]) -> None:
    built = build_subspace(tmp_path / "S.safetensors", *PAIR, target_modules="all-linear", progress=False, **cut)
    assert equal(built, AlignmentSubspace.from_pair(*PAIR, target_modules="all-linear", progress=False, **cut))
    assert [path.name for path in tmp_path.iterdir()] == ["S.safetensors"]
    again = AlignmentSubspace.load(tmp_path / "S.safetensors").save(tmp_path / "again.safetensors")
    assert equal(AlignmentSubspace.load(again), built)


@pytest.fixture
def fitted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the layers that are fitted."""
    names: list[str] = []
    fit = subspace._fit

    def noted(pair: Any, **kwargs: Any) -> Any:
        names.append(pair.name)
        return fit(pair, **kwargs)

    monkeypatch.setattr(subspace, "_fit", noted)
    return names


def test_a_finished_file_is_used_and_another_request_is_not(tmp_path: Path, fitted: list[str]) -> None:
    path = tmp_path / "S.safetensors"
    options: dict[str, Any] = {"target_modules": "all-linear", "progress": False}
    first = build_subspace(path, *PAIR, rank=4, **options)
    count = len(fitted)
    assert equal(build_subspace(path, *PAIR, rank=4, **options), first)
    assert len(fitted) == count
    assert build_subspace(path, *PAIR, rank=5, **options).layers.popitem()[1].rank == 5
    assert len(fitted) == 2 * count


KILLED = """
import sys, time
from trl_safety.subspace import fit as subspace
from trl_safety.subspace.build import build_subspace
fit = subspace._fit
def slow(*args, **kwargs):
    time.sleep(0.2)
    return fit(*args, **kwargs)
subspace._fit = slow
build_subspace(sys.argv[1], sys.argv[2], sys.argv[3], target_modules="all-linear", rank=6, progress=False)
"""


def test_killed_and_begun_again(tmp_path: Path, fitted: list[str]) -> None:
    path = tmp_path / "S.safetensors"
    partial = path.with_name(path.name + PARTIAL)
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(path), *map(str, PAIR)])
    while process.poll() is None and len(list(partial.glob("0*.safetensors"))) < 3:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = len(list(partial.glob("0*.safetensors")))
    assert done >= 3
    assert not path.exists()
    built = build_subspace(path, *PAIR, target_modules="all-linear", rank=6, progress=False)
    assert len(fitted) == len(built.layers) - done
    assert not partial.exists()
    assert equal(built, AlignmentSubspace.from_pair(*PAIR, target_modules="all-linear", rank=6, progress=False))


def test_what_another_request_left_is_not_continued(tmp_path: Path, fitted: list[str]) -> None:
    path = tmp_path / "S.safetensors"
    (tmp_path / f"S.safetensors{PARTIAL}").mkdir()
    (tmp_path / f"S.safetensors{PARTIAL}" / "plan.json").write_text("another")
    (tmp_path / f"S.safetensors{PARTIAL}" / "00000.safetensors").write_text("of another")
    built = build_subspace(path, *PAIR, target_modules="all-linear", rank=6, progress=False)
    assert len(fitted) == len(built.layers)


def test_a_full_disk_keeps_what_is_done(tmp_path: Path, fitted: list[str]) -> None:
    """A file-size limit stands in for a full disk: a write beyond it fails in the same way."""
    path = tmp_path / "S.safetensors"
    options: dict[str, Any] = {"target_modules": "all-linear", "rank": 6, "progress": False}
    whole = build_subspace(tmp_path / "whole.safetensors", *PAIR, **options)
    largest = max((tmp_path / "whole.safetensors").stat().st_size // 2, 1)
    fitted.clear()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, limits[1]))
        with pytest.raises(SubspaceError, match=r"the finished layers stay in .*partial"):
            build_subspace(path, *PAIR, **options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert not path.exists()
    assert not [file for file in tmp_path.iterdir() if file.suffix == ".tmp"]
    done = len(fitted)
    assert equal(build_subspace(path, *PAIR, **options), whole)
    assert len(fitted) == done == len(whole.layers)


def test_a_file_that_is_overwritten_or_replaced_after_loading(tmp_path: Path) -> None:
    """A memory mapping changes with the file's bytes; replacing the file leaves it unchanged."""
    options: dict[str, Any] = {"target_modules": "all-linear", "progress": False}
    path, other = tmp_path / "S.safetensors", tmp_path / "other.safetensors"
    loaded = build_subspace(path, *PAIR, rank=6, **options)
    build_subspace(other, *PAIR, rank=6, dtype=torch.bfloat16, **options)
    (name,) = list(loaded.layers)[:1]
    before = loaded.layers[name].factors()[0].clone()
    content = path.read_bytes()
    path.unlink()
    other.replace(path)
    assert torch.equal(loaded.layers[name].factors()[0], before)
    again = AlignmentSubspace.load(path)
    path.write_bytes(content)
    with pytest.raises(SubspaceError, match="was overwritten since it was loaded"):
        again.layers[name].factors()
