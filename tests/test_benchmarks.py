"""Every benchmark runs at a tiny size. Timings are not tested."""

import json
import runpy
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def run(name: str, *arguments: object) -> str:
    """Run it in its own process."""
    done = subprocess.run([sys.executable, str(BENCHMARKS / name), *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def run_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run it in this process, which has already imported everything."""

    def run(name: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        monkeypatch.syspath_prepend(BENCHMARKS)
        with suppress(SystemExit):
            runpy.run_path(str(BENCHMARKS / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_asft_penalty(tmp_path: Path, run_here: Any) -> None:
    out = run_here(
        "asft_penalty.py", "--size", 64, "--hidden", 256, "--layers", 1, "--tokens", 16, "--subspace-rank", 8, "--json", tmp_path / "r.json"
    )
    assert "× faster" in out
    assert "% of the step" in out
    assert json.loads((tmp_path / "r.json").read_text())["adapted_layers"] == 7


def test_nano_pair_says_what_it_needs(run_here: Any) -> None:
    assert "FOLDER" in (BENCHMARKS / "nano_pair.py").read_text()
    assert "folder" in run_here("nano_pair.py", "--help")


def test_alignment_vector_says_what_it_needs(run_here: Any) -> None:
    assert "--gammas" in run_here("alignment_vector.py", "--help")


def test_training_step() -> None:
    out = run("training_step.py", "--hidden", 64, "--layers", 1, "--length", 16, "--batches", 4, "--pool", 8, "--rounds", 1, "--steps", 2)
    row = json.loads(out.splitlines()[-1])
    assert row["dual_select_to_plain"] > 0
    assert row["buffer_to_plain"] > 0
    assert set(row["peak_MB"]) == {"plain", "asft", "sbr", "dual_select", "buffer", "loop"}


def test_scale(tmp_path: Path) -> None:
    out = run("scale.py", tmp_path, "--model", "tiny", "--rank", 16, "--adapter-rank", 4, "--json", tmp_path / "r.json")
    found = json.loads((tmp_path / "r.json").read_text())
    assert {"read", "build", "safe_lora", "csulora", "alignment_vector", "inspect"} <= found.keys()
    assert "× reading" in out


def test_cost_curves(tmp_path: Path, run_here: Any) -> None:
    sizes = ["--hidden", 32, 64, "--ranks", 2, 4, "--subspace-ranks", 4, 8, "--layers", 1, 2, "--repeats", 1]
    out = run_here("cost_curves.py", *sizes, "--json", tmp_path / "r.json")
    assert len(json.loads((tmp_path / "r.json").read_text())) == len(out.splitlines()) == 21
