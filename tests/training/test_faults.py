"""Killed while training and while saving, and a full disk: no incomplete file passes for a whole one, and the next run resumes."""

import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.utils import compare_versions
from safetensors.torch import load_file

from tests import processes, tiny
from trl_safety import AlignmentSubspace
from trl_safety.errors import ConfigurationError, ReportError
from trl_safety.reports.report import REPORT, verify

ROOT = Path(__file__).parent.parent.parent
ASFT = {"asft": {"weight": 2.0}}


def run(output: Path, source: Path, mode: str = "whole", *, resume: bool = False) -> int:
    (done,) = processes.run("tests.training.fault_run", output, source, mode, "resume" if resume else "new")
    return done.returncode


def run_two(output: Path, source: Path, mode: str = "whole", *, resume: bool = False) -> int:
    """Under torchrun, which stops the other process when one dies."""
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "tests.training.fault_run"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    arguments = [str(output), str(source), mode, "resume" if resume else "new"]
    return subprocess.run([*line, *arguments], cwd=ROOT, env=environment, capture_output=True, check=False).returncode


@pytest.fixture
def source(tmp_path: Path, gqa_subspace: AlignmentSubspace) -> Path:
    return gqa_subspace.save(tmp_path / "S.safetensors")


def adapter(folder: Path) -> dict[str, object]:
    return load_file(folder / "adapter_model.safetensors")


def test_killed_in_a_step(tmp_path: Path, source: Path) -> None:
    assert run(tmp_path / "out", source, "step") == -signal.SIGKILL
    assert not (tmp_path / "out" / REPORT).exists()
    assert run(tmp_path / "out", source, resume=True) == 0
    assert verify(tmp_path / "out").methods[0].steps == (1, 6)
    assert run(tmp_path / "at_once", source) == 0
    assert tiny.largest_difference(adapter(tmp_path / "out"), adapter(tmp_path / "at_once")) == 0


def test_killed_while_a_checkpoint_is_saved(tmp_path: Path, source: Path, gqa_subspace: AlignmentSubspace) -> None:
    out = tmp_path / "out"
    assert run(out, source, "checkpoint") == -signal.SIGKILL
    half = out / "checkpoint-4"
    assert (half / "adapter_model.safetensors").is_file()
    with pytest.raises(ReportError):
        verify(half)
    # Transformers would resume from the weights alone, at step 0 and with a new optimizer.
    trainer = tiny.trainer(out, safety=ASFT, subspace=gqa_subspace)
    for checkpoint in (True, str(half)):
        with pytest.raises(ConfigurationError, match=r"checkpoint-4.*the save was interrupted; remove it"):
            trainer.train(resume_from_checkpoint=checkpoint)
    shutil.rmtree(half)
    assert run(out, source, resume=True) == 0
    assert verify(out).methods[0].steps == (1, 6)


def test_killed_while_the_result_is_saved(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    assert run(out, source) == 0
    earlier = (out / REPORT).read_bytes()
    (out / "adapter_model.safetensors").rename(tmp_path / "earlier.safetensors")
    assert run(out, source, "save", resume=True) == -signal.SIGKILL
    assert (out / REPORT).read_bytes() == earlier
    tensors = {name: value + 1 for name, value in load_file(tmp_path / "earlier.safetensors").items()}
    assert adapter(out).keys() == tensors.keys()
    assert run(out, source, resume=True) == 0
    verify(out)


def test_one_of_two_processes_dies(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    assert run_two(out, source, "step") != 0
    assert not (out / REPORT).exists()
    assert (out / "checkpoint-2").is_dir()
    if compare_versions("transformers", "<", "5.23"):
        pytest.skip("Transformers 5.16 cannot load an optimizer into several processes of a CPU; what died was tested")
    assert run_two(out, source, resume=True) == 0
    assert verify(out).methods[0].steps == (1, 6)


def test_a_full_disk_while_saving(tmp_path: Path, gqa_subspace: AlignmentSubspace) -> None:
    """A limit on files' sizes stands in for the disk, as in tests/adapters/test_subspace_build.py."""
    trainer = tiny.trainer(tmp_path, safety=ASFT, subspace=gqa_subspace)
    trainer.train()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        with pytest.raises(Exception, match=r"(?i)large|space|safetensor|i/o|written"):
            trainer.save_model()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    with pytest.raises(ReportError):
        verify(tmp_path)
    trainer.save_model()
    verify(tmp_path)


def test_a_checkpoint_of_another_weight_is_not_reported_as_this_one(tmp_path: Path, gqa_subspace: AlignmentSubspace) -> None:
    options = {"subspace": gqa_subspace, "save_strategy": "steps", "save_steps": 2}
    tiny.trainer(tmp_path, safety={"asft": {"weight": 1e-9}}, **options).train()
    for weight, steps in ((1e-9, (1, 4)), (2.0, (3, 4))):
        trainer = tiny.trainer(tmp_path, safety={"asft": {"weight": weight}}, **options)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert trainer.safety_report.methods[0].steps == steps
        assert trainer.safety_report.methods[0].acted == (steps[0] == 1)
