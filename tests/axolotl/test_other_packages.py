"""A method from another package in the real `axolotl train`."""

from pathlib import Path
from typing import Any

import pytest

from tests.axolotl.conftest import Axolotl, protect
from trl_safety.adapters.folder import AdapterFolder
from trl_safety.reports.report import verify

PACKAGE = Path(__file__).parent.parent / "data" / "other_package"


def test_it_acts_and_is_reported(
    world: Path, config: dict[str, Any], axolotl: Axolotl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(PACKAGE))
    monkeypatch.setenv("PYTHONPATH", str(PACKAGE))
    norms = {}
    for weight in (0.0, 30.0):
        output = tmp_path / str(weight)
        options = protect({**config, "output_dir": str(output)}, world, toy_decay={"weight": weight})
        del options["safety"]["subspace"]
        axolotl("train", options)
        norms[weight] = sum((f.scaling * f.B.double() @ f.A.double()).square().sum() for f in AdapterFolder.open(output).factors.values())
    assert norms[30.0] < norms[0.0]
    assert [method.name for method in verify(tmp_path / "30.0").methods] == ["toy_decay"]
