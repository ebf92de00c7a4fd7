"""Two gloo processes end where one with twice the batch does."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import processes, tiny
from tests.training import providers
from trl_safety import AlignmentSubspace
from trl_safety.corrections.buffer_reinforce import USER_ADAPTER
from trl_safety.reports.report import read_report, verify
from trl_safety.reports.selection import SELECTION, read_choices


def launch(count: int, *arguments: object, script: str = "two_processes") -> None:
    for done in processes.run(f"tests.training.{script}", *arguments, processes=count):
        assert done.returncode == 0, done.output[-3000:]


def test_two_processes_equal_one(tmp_path: Path, gqa_subspace: AlignmentSubspace) -> None:
    path = gqa_subspace.save(tmp_path / "S.safetensors")
    launch(1, tmp_path / "one", 8, path)
    launch(2, tmp_path / "two", 4, path)
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert tiny.largest_difference(two, one) < 2e-5
    for name in ("one", "two"):
        assert verify(tmp_path / name).methods[1].acted
        assert not read_report(tmp_path / name / "checkpoint-3").methods[1].acted
    plain = tiny.trainer(tmp_path / "plain", optim="sgd", max_steps=3)
    plain.train()
    saved = {name.replace(".default", ""): value for name, value in tiny.factors(plain.model).items()}
    assert torch.stack([(saved[name] - one[name]).norm() for name in one]).max() > 1e-3


@pytest.mark.parametrize("reference_gradient", ["cached", "fresh"])
def test_dual_select_chooses_alike(tmp_path: Path, reference_gradient: str) -> None:
    """Two processes equal one with twice the accumulation; the pool of 13 does not divide evenly."""
    launch(1, tmp_path / "one", 2, reference_gradient, script="two_processes_dual_select")
    launch(2, tmp_path / "two", 1, reference_gradient, script="two_processes_dual_select")
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert tiny.largest_difference(two, one) < 2e-5
    chosen = []
    for name in ("one", "two"):
        assert verify(tmp_path / name).methods[0].acted
        lines = read_choices(tmp_path / name / SELECTION)
        chosen.append(sorted((line.step, line.kind, tuple(line.indices)) for line in lines))
    assert chosen[0] == chosen[1]
    assert len(chosen[0]) == 2 + 2 * 2


def test_buffer_and_merge_are_alike(tmp_path: Path) -> None:
    providers.make(tmp_path)
    launch(1, tmp_path / "one", 8, tmp_path, script="two_processes_buffer_reinforce")
    launch(2, tmp_path / "two", 4, tmp_path, script="two_processes_buffer_reinforce")
    for folder in (Path(), USER_ADAPTER):
        one, two = (load_file(tmp_path / name / folder / "adapter_model.safetensors") for name in ("one", "two"))
        assert tiny.largest_difference(two, one) < 2e-5
    assert verify(tmp_path / "two").methods[0].summary == verify(tmp_path / "one").methods[0].summary
