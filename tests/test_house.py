"""The rules of the house: who may import whom, one stem per method, light imports."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import trl_safety
from trl_safety.config.block import METHODS

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "trl_safety"

ADAPTERS = {"adapters", "linalg", "errors", "torch", "peft", "safetensors", "huggingface_hub", "transformers", "tqdm", "bitsandbytes"}
TRAINING = ADAPTERS | {"training", "methods", "config", "trl", "pydantic", "matplotlib", "datasets", "accelerate", "scipy"}
MAY_IMPORT = {
    "errors": set(),
    "config": {"errors", "pydantic", "yaml"},
    "linalg": {"linalg", "torch"},
    "methods": {"linalg", "errors", "torch"},
    # Transformers only to build a model class on the meta device (adapters/targets.py), as PEFT itself does.
    "adapters": ADAPTERS,
    "training": TRAINING,
    "evaluation": TRAINING | {"evaluation", "inspect_ai", "lm_eval"},
    "lab": TRAINING | {"lab", "tokenizers", "rich"},
}
IMPORTS_TRL = {"trainer.py", "sft.py"}


def imports(path: Path) -> set[str]:
    """Top-level packages that a file imports; our own by their room."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module or ""]
        for name in names:
            parts = name.split(".")
            found.add(parts[1] if parts[0] == "trl_safety" and len(parts) > 1 else parts[0])
    return found - sys.stdlib_module_names - {"trl_safety"}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nobody_imports_upward_or_sideways(path: Path) -> None:
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if room not in MAY_IMPORT:
        assert room in {"__init__", "cli"}
        return
    assert imports(path) <= MAY_IMPORT[room], path
    if "trl" in imports(path):
        assert path.name in IMPORTS_TRL
    if room == "methods":
        text = path.read_text(encoding="utf-8")
        assert not [other for other in METHODS if other != path.stem and f"methods.{other}" in text]


def test_axolotl_is_known_to_its_plugin_alone() -> None:
    assert not [path for path in PACKAGE.rglob("*.py") if "axolotl" in imports(path) or "axolotl_plugin" in imports(path)]


@pytest.mark.parametrize("method", METHODS)
def test_one_stem_per_method_everywhere(method: str) -> None:
    for place in (
        f"trl_safety/methods/{method}.py",
        f"trl_safety/training/{method}.py",
        f"tests/methods/test_{method}.py",
        f"example_configs/trl/{method}.yaml",
        f"example_configs/axolotl/{method}.yaml",
    ):
        assert (ROOT / place).is_file(), place


def test_import_is_light_and_help_is_quick() -> None:
    code = "import sys, trl_safety, trl_safety.cli, axolotl_plugin; print([m for m in ('torch', 'transformers', 'peft', 'trl') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_are_there() -> None:
    for name in trl_safety.__all__:
        assert getattr(trl_safety, name).__doc__, name
    with pytest.raises(AttributeError):
        trl_safety.nothing  # noqa: B018


@pytest.mark.parametrize("path", sorted([*PACKAGE.rglob("*.py"), *(ROOT / "axolotl_plugin").rglob("*.py")]), ids=lambda path: path.name)
def test_no_swallowed_errors_and_no_pickles(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, path
            assert "Exception" not in {n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)}, path
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
            assert node.attr not in {"load", "save"}, path
    assert "pickle" not in imports(path)
