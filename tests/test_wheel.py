"""The wheel in an environment that has nothing else."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_wheel_works_without_extras() -> None:
    done = subprocess.run(["make", "wheel"], cwd=ROOT, capture_output=True, text=True, check=False)  # noqa: S607  # the user's make
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert ".whl: works" in done.stdout
