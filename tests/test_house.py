"""The rules of the house: who may import whom, one stem per method, one line per method, light imports."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import trl_safety
from trl_safety.config.block import CORRECTIONS, METHODS, options_class

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "trl_safety"

ROOMS = (
    ("version", "errors"),
    ("jsonl", "answers"),
    ("messages",),
    ("rendering",),
    ("linalg",),
    ("methods", "config"),
    ("adapters",),
    ("subspace",),
    ("reports",),
    ("corrections",),
    ("scoring",),
    ("training",),
    ("inspection",),
    ("evaluation",),
    ("lab",),
    ("cli",),
)
"""Low to high: a room imports from lower ones and from itself."""
LEVELS = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}
TORCH = {"torch", "peft", "safetensors", "huggingface_hub", "transformers", "tqdm", "accelerate"}
OTHERS = {
    "version": set(),
    "errors": set(),
    "jsonl": set(),
    "answers": set(),
    "messages": set(),
    "rendering": {"jinja2"},
    "config": {"pydantic", "yaml"},
    "linalg": {"torch"},
    "methods": {"torch"},
    # Transformers only to build a model class on the meta device (subspace/targets.py), as PEFT itself does.
    "adapters": TORCH | {"bitsandbytes"},
    "subspace": TORCH,
    "reports": TORCH | {"pydantic"},
    "corrections": TORCH | {"pydantic"},
    "scoring": TORCH | {"pydantic", "scipy"},
    # jinja2 for the error of a chat template alone, here, in rendering and in evaluation.
    "training": TORCH | {"pydantic", "datasets", "trl", "jinja2"},
    "inspection": TORCH | {"pydantic", "matplotlib", "datasets"},
    "evaluation": TORCH | {"pydantic", "matplotlib", "datasets", "inspect_ai", "lm_eval", "yaml", "jinja2"},
    "lab": TORCH | {"tokenizers", "rich", "datasets", "matplotlib", "trl", "numpy", "filelock"},
    "cli": {"typer", "rich", "pydantic"},
}
IMPORTS_TRL = {"trainer.py", "dpo.py", "kto.py", "grpo.py", "sft.py", "pair.py"}
STEMS = {name: re.compile(rf"\b{name}\b|{name.replace('_', '')}", re.IGNORECASE) for name in METHODS}
OWN_LINES = {"__init__.py", "config/__init__.py", "config/block.py"}
"""Where a method has its field and its exports."""


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def modules_in(path: Path) -> list[str]:
    """Everything that a file imports, by its full name."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.append(node.module or "")
    return found


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nobody_imports_upward(path: Path) -> None:
    room = room_of(path)
    if room == "__init__":
        return
    for name in modules_in(path):
        top, *rest = name.split(".")
        if top == "trl_safety":
            other = rest[0] if rest else "version"
            assert LEVELS[other] < LEVELS[room] or other == room, f"{path}: {name}"
        elif top not in sys.stdlib_module_names:
            assert top in OTHERS[room], f"{path}: {name}"
            assert top != "trl" or path.name in IMPORTS_TRL, path
    if room == "methods":
        text = path.read_text(encoding="utf-8")
        assert not [other for other in METHODS if other != path.stem and f"methods.{other}" in text]


def test_no_circle_of_imports() -> None:
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in sources()}
    graph = {name: {found for found in modules_in(path) if found in names and found != name} for name, path in names.items()}
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " → ".join((*above, name))
        if name not in done:
            for other in graph[name]:
                visit(other, (*above, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize(
    "path", [*sources(), *sorted((ROOT / "axolotl_plugin").rglob("*.py"))], ids=lambda path: f"{path.parent.name}/{path.name}"
)
def test_a_method_is_named_in_its_own_rooms_alone(path: Path) -> None:
    inside = path.relative_to(PACKAGE) if path.is_relative_to(PACKAGE) else path.relative_to(ROOT)
    if str(inside) in OWN_LINES or inside.parts[0] == "lab":
        return
    own = {method for method in METHODS if any(part.startswith(method) for part in inside.parts)}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        named = {method for method, pattern in STEMS.items() if pattern.search(line)}
        assert named <= own or (inside.parts[0] in {"methods", "config", "corrections", "training"} and own), (
            f"{inside}:{number}: {line.strip()}"
        )


def test_no_file_is_longer_than_it_says() -> None:
    for path in sources():
        lines = path.read_text(encoding="utf-8").splitlines()
        assert len(lines) <= 450 or any("lines" in line for line in lines[:8]), (
            f"{path}: {len(lines)} lines, and no reason in the first ones"
        )


def test_axolotl_is_known_to_its_plugin_alone() -> None:
    tops = {path: {name.split(".")[0] for name in modules_in(path)} for path in sources()}
    assert not [path for path, found in tops.items() if found & {"axolotl", "axolotl_plugin"}]


@pytest.mark.parametrize("method", METHODS)
def test_one_stem_per_method_everywhere(method: str) -> None:
    for place in (
        f"trl_safety/methods/{method}.py",
        f"trl_safety/config/{method}.py",
        f"tests/methods/test_{method}.py",
        f"example_configs/trl/{method}.yaml",
        f"example_configs/axolotl/{method}.yaml",
    ):
        assert (ROOT / place).is_file(), place
    room = "corrections" if method in CORRECTIONS else "training"
    assert any((ROOT / f"trl_safety/{room}" / place).exists() for place in (f"{method}.py", method))
    assert options_class(method).load_hook().name == method


def test_import_is_light_and_help_is_quick() -> None:
    code = "import sys, trl_safety, trl_safety.cli, axolotl_plugin; print([m for m in ('torch', 'transformers', 'peft', 'trl') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_are_there() -> None:
    for name in trl_safety.__all__:
        if name != "__version__":
            assert getattr(trl_safety, name).__doc__, name
    with pytest.raises(AttributeError):
        trl_safety.nothing  # noqa: B018


def test_type_checkers_see_every_public_name() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    guard = next(node for node in tree.body if isinstance(node, ast.If))
    typed = {alias.name: node.module for node in ast.walk(guard) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert typed == trl_safety._HOMES


@pytest.mark.parametrize("path", sorted([*PACKAGE.rglob("*.py"), *(ROOT / "axolotl_plugin").rglob("*.py")]), ids=lambda path: path.name)
def test_no_swallowed_errors_and_no_pickles(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, path
            assert "Exception" not in {n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)}, path
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
            assert node.attr not in {"load", "save"}, path
    assert "pickle" not in modules_in(path)
