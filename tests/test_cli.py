"""The command line as a user runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from tests import tiny
from tests.tiny import DATA
from trl_safety.cli.app import app

PAIR = [str(DATA / "gqa-base"), str(DATA / "gqa-aligned")]
ADAPTER = str(DATA / "gqa-adapter")


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


@pytest.fixture
def subspace(tmp_path: Path) -> Path:
    run("subspace", *PAIR, "-o", tmp_path / "S.safetensors", "--adapter", ADAPTER, "--whole")
    return tmp_path / "S.safetensors"


@pytest.fixture
def ranked(tmp_path: Path) -> Path:
    run("subspace", *PAIR, "-o", tmp_path / "R.safetensors", "--target-modules", "all-linear", "--rank", 8)
    return tmp_path / "R.safetensors"


def test_subspace_forms(tmp_path: Path) -> None:
    out = tmp_path / "S.safetensors"
    assert "6 layers, rank 4 to 4" in run("subspace", *PAIR, "-o", out, "--target-modules", "q_proj, v_proj", "--rank", 4)
    assert "21 layers" in run("subspace", *PAIR, "-o", out, "--target-modules", "all-linear", "--tolerance", 0.01)
    assert "9 layers" in run("subspace", *PAIR, "-o", out, "--adapter", ADAPTER, "--whole")


@pytest.mark.parametrize(("option", "value", "reference"), [("--threshold", 0.35, "threshold-0.35"), ("--layers", 4, "number-4")])
def test_correct_gives_the_authors_adapter(tmp_path: Path, subspace: Path, option: str, value: float, reference: str) -> None:
    out = tmp_path / "out"
    output = run("correct", ADAPTER, "-o", out, "--subspace", subspace, "--method", "safe_lora", option, value)
    assert "layers corrected" in output
    expected = load_file(DATA / f"gqa-safelora-{reference}" / "adapter_model.safetensors")
    assert tiny.largest_difference(load_file(out / "adapter_model.safetensors"), expected) < 1e-6
    assert "protected, and it matches its report" in run("verify", out)


def test_csulora_and_orthogonal(tmp_path: Path, ranked: Path) -> None:
    assert "reconstruction" in run("correct", ADAPTER, "-o", tmp_path / "a", "-s", ranked, "--method", "csulora", "--lambda-partial", 2)
    run("correct", ADAPTER, "-o", tmp_path / "b", "-s", ranked, "--method", "safe_lora", "--operator", "orthogonal", "--threshold", 1)
    report = json.loads((tmp_path / "b" / "safety_report.json").read_text())
    assert report["methods"][0]["settings"]["operator"] == "orthogonal"


def test_inspect(tmp_path: Path, ranked: Path, subspace: Path) -> None:
    output = run("inspect", ADAPTER, "--subspace", ranked, "--plot", tmp_path / "p.png", "--json", tmp_path / "p.json")
    assert "0.self_attn.q_proj" in output
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    layers = json.loads((tmp_path / "p.json").read_text())["layers"]
    assert len(layers) == 9
    assert all(abs(row["inside"] + row["partial"] + row["outside"] - 1) < 1e-5 for row in layers)
    assert "–" in run("inspect", ADAPTER, "--subspace", subspace)
    assert "base model: not verified: gqa-aligned is not available here" in " ".join(run("inspect", ADAPTER, "--subspace", ranked).split())


def test_verify_fails_on_an_unprotected_adapter() -> None:
    assert "no method of trl-safety protected it" in run("verify", ADAPTER, code=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["subspace", *PAIR, "-o", "{tmp}/S.safetensors", "--adapter", ADAPTER], "exactly one of rank"),
        (["subspace", PAIR[0], PAIR[0], "-o", "{tmp}/S.safetensors", "--target-modules", "q_proj", "--rank", "4"], "identical"),
        (["subspace", *PAIR, "-o", "{tmp}/S.safetensors", "--target-modules", "q_proj", "--rank", "400"], "rank = 400"),
        (["subspace", *PAIR, "-o", "/proc/nowhere/S.safetensors", "--target-modules", "q_proj", "--rank", "4"], "cannot be written"),
        (["correct", ADAPTER, "-o", "{tmp}/o", "-s", "{tmp}/none.safetensors", "--method", "safe_lora"], "no such file"),
        (["correct", ADAPTER, "-o", "{tmp}/o", "-s", "{S}", "--method", "safe_lora", "--threshold", "7"], "safe_lora.threshold = 7"),
        (
            ["correct", ADAPTER, "-o", "{tmp}/o", "-s", "{S}", "--method", "safe_lora", "--lambda-partial", "1"],
            "lambda_partial = 1.0: unknown option",
        ),
        (
            ["correct", ADAPTER, "-o", "{tmp}/o", "-s", "{S}", "--method", "csulora", "--operator", "scaled"],
            "csulora.operator = 'scaled': unknown option",
        ),
        (["correct", ADAPTER, "-o", "{tmp}/o", "-s", "{S}", "--method", "csulora"], "keeps V whole"),
        (["correct", ADAPTER, "-o", ADAPTER, "-s", "{S}", "--method", "safe_lora"], "is the input"),
        (["correct", "{tmp}/nothing", "-o", "{tmp}/o", "-s", "{S}", "--method", "safe_lora"], "has no adapter_config.json"),
        (["inspect", str(DATA / "mha-adapter"), "-s", "{S}"], "belongs to another model"),
        (["sft", "--config", "{tmp}/none.yaml"], "none.yaml"),
    ],
    ids=lambda value: None,
)
def test_errors_are_one_message_and_leave_nothing(tmp_path: Path, subspace: Path, arguments: list[str], message: str) -> None:
    before = sorted(tmp_path.rglob("*"))
    output = run(*[a.replace("{tmp}", str(tmp_path)).replace("{S}", str(subspace)) for a in arguments], code=1)
    assert message in output
    assert "Traceback" not in output
    assert sorted(tmp_path.rglob("*")) == before


def test_a_correction_that_changes_nothing_says_so(tmp_path: Path, subspace: Path) -> None:
    output = run("correct", ADAPTER, "-o", tmp_path / "o", "-s", subspace, "--method", "safe_lora", "--threshold", -1)
    assert "Warning: safe_lora changed nothing" in output
    assert "NOT protected" in run("verify", tmp_path / "o", code=1)
    assert "no such folder" in run("verify", tmp_path / "nowhere", code=1)


def test_verify_names_a_method_that_did_not_act(tmp_path: Path, subspace: Path) -> None:
    run("correct", ADAPTER, "-o", tmp_path / "o", "-s", subspace, "--method", "safe_lora", "--threshold", 1)
    report = json.loads((tmp_path / "o" / "safety_report.json").read_text())
    idle = {**report["methods"][0], "name": "asft", "acted": False}
    (tmp_path / "o" / "safety_report.json").write_text(json.dumps({**report, "methods": [*report["methods"], idle]}))
    assert "protected, but not by asft, and" in " ".join(run("verify", tmp_path / "o").split())


def test_full_disk_leaves_nothing(tmp_path: Path, subspace: Path) -> None:
    code = (
        "import resource, signal; from trl_safety.cli import app\n"
        "import torch, peft, trl_safety.corrections.folder\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))\n"
        f"app(['correct', {ADAPTER!r}, '-o', {str(tmp_path / 'out')!r}, '-s', {str(subspace)!r}, '--method', 'safe_lora'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ), check=False)
    assert done.returncode == 1
    assert "cannot be written" in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["S.safetensors"]


def test_help_of_every_command() -> None:
    for command in ("subspace", "correct", "verify", "inspect", "lab"):
        assert "Usage" in run(command, "--help")
