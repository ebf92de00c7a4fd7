"""Every code block of the README and of the documentation runs, or is checked where its page says why it cannot; links, generated parts and
what pages say of the code are true."""

from __future__ import annotations

import ast
import glob
import importlib
import inspect
import json
import re
import shlex
import shutil
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml
from typer.testing import CliRunner

from docs.tools import pages
from tests import tiny
from tests.test_house import ROOMS
from trl_safety import AlignmentSubspace, SafeLoraConfig, SafetyConfig, correct
from trl_safety.adapters.adopt import adopt
from trl_safety.cli.app import app
from trl_safety.config.block import METHODS
from trl_safety.config.options import validate

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(
    r'(?:^<!-- checked, not run: (?P<why>[^>]+) -->\n)?^```(?P<language>\w*)(?: title="(?P<title>[^"]+)")?\n(?P<code>.*?)^```$', re.M | re.S
)
BASE, ALIGNED = "meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B-Instruct"
PASSED_ON = ("sft", "buffer", "reinforce")
"""Commands that hand their arguments to TRL."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    title: str | None
    code: str
    runs: bool

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = [
        Block(page, text.count("\n", 0, m.start("code")), m["language"], m["title"], m["code"], m["why"] is None)
        for m in BLOCK.finditer(text)
    ]
    assert len(found) * 2 == len(re.findall(r"^```", text, re.M)), f"{page}: a block that is not read"
    return found


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which everything that the pages name is there, and tiny."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("reader")
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    # 64 is the rank of V in the examples.
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, eos_token_id=2, pad_token_id=0, **sizes))
    with torch.no_grad():
        # The first hidden unit is large, and ends every answer: generation is most of the time.
        model.model.embed_tokens.weight[:, 0] = 10.0
        model.lm_head.weight[2, 0] = 10.0
        for name in (BASE, ALIGNED):
            model.save_pretrained(folder / name)
            tokenizer.save_pretrained(folder / name)
            # What alignment changes: one direction and a little of all others, so that V does not span everything.
            for weight in (weight for weight in model.model.layers.parameters() if weight.dim() == 2):
                left, right = torch.randn(weight.shape[0], 1), torch.randn(1, weight.shape[1])
                weight += 0.01 * left @ right + 0.001 * torch.randn_like(weight)
    for seed, name in enumerate(("my-adapter", "others-adapter", "buffer")):
        torch.manual_seed(seed)
        options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "init_lora_weights": False}
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder / ALIGNED), LoraConfig(**options))
        model.peft_config["default"].base_model_name_or_path = ALIGNED
        model.save_pretrained(str(folder / name))
        if name == "my-adapter":
            model.merge_and_unload().save_pretrained(str(folder / "merged"))
            tokenizer.save_pretrained(folder / "merged")
    adopt(folder / "buffer", folder / "llama3-buffer", "buffer", folder / ALIGNED)
    adopt(folder / "others-adapter", folder / "llama3-reinforce", "reinforce", folder / ALIGNED)
    subspace = AlignmentSubspace.from_pair(folder / BASE, folder / ALIGNED, target_modules="all-linear", rank=8, progress=False)
    correct(folder / "my-adapter", subspace, SafeLoraConfig(threshold=1.0), output=folder / "protected-adapter")
    (folder / "lab_results" / "pair-0").mkdir(parents=True)
    for name, source in (("base", BASE), ("aligned", ALIGNED), ("plain-0-0a1b2c3d", "my-adapter")):
        shutil.copytree(folder / source, folder / "lab_results" / "pair-0" / name)
    rows = list(tiny.rows(16))
    data = {
        "train": rows,
        "references": list(tiny.rows(8, seed=5)),
        "preferences": [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": "w1 w2"} for row in rows],
        "prompts": [{"prompt": f"w{n} w{n + 1}"} for n in range(8)],
        "harmful": [{"prompt": f"w{n} w{n + 1}"} for n in range(4)],
        "benign": [{"prompt": f"w{n}"} for n in range(4)],
        "task": [{"prompt": f"w{n}", "answer": "w5"} for n in range(4)],
    }
    for name, content in data.items():
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in content))
    return folder


@pytest.fixture
def small_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of two steps, on a machine without a GPU, where TRL's default of bfloat16 is an error."""
    from transformers import TrainingArguments

    parent = TrainingArguments.__post_init__

    def settled(self: Any) -> None:
        self.use_cpu, self.bf16, self.disable_tqdm, self.dataloader_pin_memory = True, False, True, False
        self.max_steps = self.max_steps if self.max_steps > 0 else 2
        parent(self)

    monkeypatch.setattr(TrainingArguments, "__post_init__", settled)


@pytest.mark.usefixtures("small_cpu")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block(page: Path, template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "reader"
    shutil.copytree(template, here)
    monkeypatch.chdir(here)
    names: dict[str, Any] = {}
    for block in blocks(page):
        {"python": python, "sh": sh, "yaml": yaml_block, "toml": toml, "text": lambda *_: None}[block.language](block, names)


def python(block: Block, names: dict[str, Any]) -> None:
    tree = ast.parse(block.code)
    imported = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                imported[alias.asname or alias.name] = getattr(importlib.import_module(node.module or ""), alias.name)
    if block.runs:
        exec(compile("\n" * block.line + block.code, str(block.page), "exec"), names)  # noqa: S102  # our own pages
        return
    assert imported, f"{block}: nothing to check"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in imported:
            assert hasattr(imported[node.value.id], node.attr), f"{block}: {ast.unparse(node)}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in imported:
            inspect.signature(imported[node.func.id]).bind_partial(*node.args, **{word.arg: None for word in node.keywords if word.arg})


def commands(code: str) -> Iterator[list[str]]:
    for line in code.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


def sh(block: Block, names: dict[str, Any]) -> None:
    for program, *arguments in commands(block.code):
        if program == "trl-safety":
            run_or_parse(block, [found for word in arguments for found in (glob.glob(word) if "*" in word else [word])])
        elif program == "make":
            assert re.search(rf"^{arguments[0]}:", (ROOT / "Makefile").read_text(), re.M), f"{block}: make {arguments[0]}"
        elif program == "pip":
            extras = re.search(r"\[(.*)\]", arguments[-1])
            known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            assert arguments[0] == "install"
            assert extras is None or set(extras[1].split(",")) <= set(known), f"{block}: {arguments}"
        else:
            assert (program, arguments[0]) in {("axolotl", "train"), ("accelerate", "launch"), ("pre-commit", "install")}, (
                f"{block}: {program}"
            )
            assert not block.runs, block
            assert all((ROOT / word).is_file() for word in arguments if word.startswith("example_configs/")), f"{block}: {arguments}"


def run_or_parse(block: Block, arguments: list[str]) -> None:
    if block.runs:
        result = CliRunner(env={"COLUMNS": "200"}).invoke(app, arguments)
        assert result.exit_code == 0, f"{block}: {arguments}: {result.output[-2000:]} {result.exception!r}"
        return
    group: Any = typer.main.get_command(app)
    name, *rest = arguments
    if name in PASSED_ON:
        assert rest[0] == "--config", f"{block}: {arguments}"
        assert (ROOT / rest[1]).is_file() or any(other.title == rest[1] for other in blocks(block.page)), f"{block}: {rest[1]}"
    else:
        group.commands[name].make_context(name, rest)


def yaml_block(block: Block, names: dict[str, Any]) -> None:
    content = yaml.safe_load(block.code)
    known = set()
    if block.title:
        Path(block.title).write_text(block.code)
    if "safety" in content:
        assert SafetyConfig.parse(content["safety"]).methods(), block
        known |= {"safety"}
    if "plugins" in content:
        assert content["plugins"][0] in ("safety", "axolotl_plugin.SafetyPlugin"), block
        known |= {"plugins"}
    if "model_name_or_path" in content:
        from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments

        from trl_safety import SafeSFTConfig

        known |= {name for cls in (DatasetMixtureConfig, ModelConfig, ScriptArguments, SafeSFTConfig) for name in cls.__dataclass_fields__}
    elif "max_attack" in content:
        from trl_safety.evaluation.gate import GateConfig

        known |= validate(GateConfig, content, "gate").model_fields_set
    elif "refusals" in content:
        from trl_safety.evaluation.judges import Phrases

        known |= validate(Phrases, content, "words").model_fields_set
    assert set(content) <= known, f"{block}: {set(content) - known}"


def toml(block: Block, names: dict[str, Any]) -> None:
    (target,) = tomllib.loads(block.code)["project"]["entry-points"]["trl_safety.methods"].values()
    assert target in (ROOT / "tests/data/other_package/toy_decay-1.0.dist-info/entry_points.txt").read_text(), block


def test_a_block_that_does_not_run_says_why_and_a_wrong_one_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks see what they are for."""
    monkeypatch.chdir(tmp_path)
    page = ROOT / "README.md"
    wrong = [
        ("sh", "trl-safety eval m --no-such-option 1 -o e", "no-such-option"),
        ("sh", "make nothing-of-this-name", "make nothing-of-this-name"),
        ("sh", "pip install '.[nothing]'", "nothing"),
        ("sh", "accelerate launch --config_file example_configs/none.yaml", "none.yaml"),
        ("python", "from trl_safety import AlignmentSubspace\nAlignmentSubspace.nothing()", "nothing"),
        ("python", "from trl_safety import verify\nverify(no_such_argument=1)", "no_such_argument"),
        ("python", "from trl_safety import Nothing", "Nothing"),
        ("yaml", "safety: {asft: {wait: 1}}", "wait"),
        ("yaml", "model_name_or_path: m\nlora_rang: 3", "lora_rang"),
        ("toml", '[project.entry-points."trl_safety.methods"]\nx = "y:Z"', "y:Z"),
    ]
    for language, code, named in wrong:
        check = {"python": python, "sh": sh, "yaml": yaml_block, "toml": toml}[language]
        with pytest.raises(Exception, match=named):
            check(Block(page, 0, language, None, code, runs=False), {})


# Links and generated parts.


def slug(heading: str) -> str:
    """A heading's anchor, as GitHub and MkDocs make it."""
    text = re.sub(r"[`*]|\]\([^)]*\)|\[", "", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    text = BLOCK.sub("", pages.filled(page.read_text(encoding="utf-8")))
    return {slug(heading) for heading in re.findall(r"^#+ (.+)$", text, re.M)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_internal_links_resolve(page: Path) -> None:
    for _, target, anchor in re.findall(r"(\[[^\]\n]*\])\(([^)\s#]*)(#[^)\s]*)?\)", BLOCK.sub("", page.read_text(encoding="utf-8"))):
        if "://" in target:
            continue
        other = (page.parent / target).resolve() if target else page
        assert other.exists(), f"{page}: {target}"
        if anchor and other.suffix == ".md":
            assert anchor[1:] in anchors(other), f"{page}: {target}{anchor}"


def test_generated_parts_are_current() -> None:
    written = list(pages.committed())
    assert ROOT / "docs" / "compatibility.md" in written
    for page in written:
        text = page.read_text(encoding="utf-8")
        assert text.count("<!-- begin generated") == len(pages.COMMITTED.findall(text)), page
        assert pages.current(text) == text, f"{page}: `make docs-generated` writes it anew"


def test_every_marker_is_one() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert len(re.findall("<!-- generated", text)) == len(pages.MARKER.findall(text)), page
        assert "<!-- generated" not in pages.filled(text)


# What pages say of the code.


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_whole_page(method: str) -> None:
    text = (ROOT / "docs" / "methods" / f"{method}.md").read_text(encoding="utf-8")
    for marker in ("method", "options", "requirements"):
        assert f"<!-- generated: {marker} {method} -->" in text
    for heading in ("Formula", "Options", "What is refused beside it", "Cost", "Evidence", "When it fails", "Citation"):
        assert f"\n## {heading}\n" in text, heading
    assert method in (ROOT / "docs" / "methods" / "index.md").read_text(encoding="utf-8")


def test_every_error_message_is_one_of_ours() -> None:
    files = [*(ROOT / "trl_safety").rglob("*.py"), *(ROOT / "axolotl_plugin").rglob("*.py")]
    said = "\n".join(
        node.value
        for path in files
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    headings = re.findall(r"^### `(.+)`$", (ROOT / "docs" / "faq.md").read_text(encoding="utf-8"), re.M)
    assert len(headings) > 10
    for heading in headings:
        for part in filter(None, (piece.strip() for piece in heading.split("…"))):
            assert part in said, f"{heading}: {part!r} is in no message"


def test_the_figure_of_the_rooms_is_the_rules() -> None:
    figure = next(block.code for block in blocks(ROOT / "docs" / "ARCHITECTURE.md") if "cli  " in block.code)
    lines = [re.split(r" {3,}", line) for line in figure.splitlines()]
    rooms = {room for level in ROOMS for room in level}
    drawn = [tuple(part for part in line if part in rooms) for line in lines]
    assert [set(level) for level in reversed(drawn)] == [set(level) for level in ROOMS]


def test_the_readme_is_read_in_five_minutes() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) <= 1000
    assert "forgetting" in text
