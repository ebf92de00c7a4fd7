"""Shared fixtures: the two small pairs of `tests/data`, their adapters and subspaces, and a tiny training set."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import pytest
import torch

# No outcome may hang on how busy the machine is.
hypothesis.settings.register_profile("untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("untimed")

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="session", params=["mha", "gqa"])
def pair(request: pytest.FixtureRequest) -> str:
    """The name of a small base/aligned pair: multi-head and grouped-query attention."""
    return str(request.param)


@pytest.fixture(scope="session")
def gqa_subspace() -> Any:
    from trl_safety import AlignmentSubspace

    return AlignmentSubspace.from_pair(DATA / "gqa-base", DATA / "gqa-aligned", target_modules="all-linear", rank=8, progress=False)


@pytest.fixture
def gqa_model() -> Any:
    """The aligned model with its trained-looking adapter, trainable."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(DATA / "gqa-aligned")
    return PeftModel.from_pretrained(model, str(DATA / "gqa-adapter"), is_trainable=True)


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A Hub cache; calling it adds a model's revisions in `huggingface_hub`'s layout."""
    hub = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))

    def put(repo: str, **revisions: str) -> None:
        root = hub / f"models--{repo.replace('/', '--')}"
        for number, (name, source) in enumerate(revisions.items()):
            commit = f"{number:040x}"
            shutil.copytree(source, root / "snapshots" / commit)
            (root / "refs").mkdir(exist_ok=True)
            (root / "refs" / name).write_text(commit)

    return put


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    # The models are tiny: threads cost more than they gain, and sums in a fixed order are equal from run to run.
    torch.set_num_threads(1)
    torch.manual_seed(0)
