"""What the documentation takes from the code.

`python docs/tools/pages.py` rewrites the parts of the repository that are generated and committed. MkDocs calls the hooks at every
build, and they fill the markers `<!-- generated: KIND ARGUMENT -->` of a page.
"""

from __future__ import annotations

import json
import posixpath
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    # A script's first place is its own folder.
    sys.path.insert(0, str(ROOT))

from axolotl_plugin import rules  # noqa: E402
from trl_safety import _HOMES  # noqa: E402
from trl_safety.config.block import METHODS, SafetyConfig, correction_options, options_class  # noqa: E402
from trl_safety.config.evaluation import SafetyEvalConfig  # noqa: E402
from trl_safety.config.options import Options  # noqa: E402
from trl_safety.config.requirements import EVERY_METHOD, FACTS, Requirement, cell, requirements_of  # noqa: E402
from trl_safety.config.subspace import SubspaceConfig  # noqa: E402

DOCS = ROOT / "docs"
MARKER = re.compile(r"^<!-- generated: (?P<kind>\w+)(?: (?P<argument>[^>]*?))? -->$", re.MULTILINE)
COMMITTED = re.compile(r"(<!-- begin generated: (\w+) -->\n)(?:(?!<!-- end).)*(<!-- end generated -->)", re.DOTALL)
LINK = re.compile(r"(?<!!)(\[[^\]\n]*\]\()([^)\s#]+)((?:#[^)\s]*)?\))")
SHIPPED = ("example_configs", "benchmarks", "tests/data/other_package")
"""Folders outside `docs` that pages link to; the site gets their files under `repository/`."""
STAGES = {
    "weights": "while training: it changes the weights that training sees",
    "selection": "while training: it selects samples and changes the gradient",
    "loss": "while training: it adds a term to the loss",
    "correction": "when training ends, or on a saved adapter",
    "merge": "while training, and once more when it ends",
}
HOSTS = {"axolotl": "in Axolotl", "trl": "in TRL"}
BLOCKS: Mapping[str, type[Options]] = {"eval": SafetyEvalConfig, "subspace": SubspaceConfig}
"""Blocks of options that are no method's."""
GROUPS = {
    "Trainers": ("training",),
    "Corrections": ("corrections",),
    "The alignment subspace": ("subspace",),
    "Options": ("config",),
    "Evaluation": ("evaluation", "scoring"),
    "Inspection and reports": ("inspection", "reports"),
    "Errors": ("errors",),
}
"""Headings of the Python reference → rooms of the package."""


def one_line(text: str | None) -> str:
    """A text for a cell of a table."""
    return " ".join((text or "").split()).replace("|", "\\|")


# The options of a method or of a block.


def kind(schema: Mapping[str, Any]) -> str:
    """What a JSON schema accepts, in words."""
    if "anyOf" in schema or "oneOf" in schema:
        return " or ".join(kind(part) for part in schema.get("anyOf") or schema["oneOf"])
    if "enum" in schema:
        return " or ".join(f"`{value}`" for value in schema["enum"])
    if "$ref" in schema:
        return "mapping"
    name = {"number": "number", "integer": "integer", "string": "text", "boolean": "true or false", "array": "list", "object": "mapping"}
    text = name.get(schema.get("type", ""), schema.get("type", "any"))
    bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    return " ".join([text, ", ".join(f"{sign} {schema[key]:g}" for key, sign in bounds.items() if key in schema)]).strip()


def options(name: str) -> str:
    """The table of a method's, a correction's or a block's options: `asft`, `eval`, `subspace`, `buffer_reinforce:correction`."""
    name, _, variant = name.partition(":")
    found = BLOCKS[name] if name in BLOCKS else correction_options()[name] if variant else options_class(name)
    properties = found.model_json_schema()["properties"]
    lines = ["| option | takes | default | meaning |", "|---|---|---|---|"]
    for option, field in found.model_fields.items():
        default = "required" if field.is_required() else _value(field.get_default(call_default_factory=True))
        lines.append(f"| `{option}` | {kind(properties[option])} | {default} | {one_line(field.description)} |")
    return "\n".join(lines)


def _value(value: Any) -> str:
    if value is None:
        return "–"
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def block(_: str = "") -> str:
    """The keys of the `safety` block that are no method."""
    rows = [
        f"| `{name}` | {one_line(SafetyConfig.model_fields[name].description)} |"
        for name in SafetyConfig.model_fields
        if name not in METHODS
    ]
    return "\n".join(["| key | meaning |", "|---|---|", *rows])


# A method's page.


def method(name: str) -> str:
    """When a method acts, what it needs and costs, and its paper."""
    found = options_class(name)
    rows = [
        ("In a block", f"`safety: {{{name}: {{…}}}}`"),
        ("Acts", STAGES[found.stage]),
        ("Needs", found.needs),
        ("Costs", found.costs),
        ("Source", _linked(found.source)),
    ]
    if found.excludes:
        others = [other for other in METHODS if other != name and options_class(other).excludes == found.excludes]
        rows.append(("Not together with", ", ".join(f"[`{other}`]({other}.md)" for other in others)))
    if found.whole_model:
        rows.append(("`skip_modules`", f"refused: it {found.whole_model}"))
    return "\n".join(["| | |", "|---|---|", *(f"| {left} | {one_line(right)} |" for left, right in rows)])


def methods(_: str = "") -> str:
    """Every method in one table."""
    lines = ["| method | acts | needs | costs | source |", "|---|---|---|---|---|"]
    for name in METHODS:
        found = options_class(name)
        lines.append(f"| [`{name}`]({name}.md) | {STAGES[found.stage]} | {found.needs} | {found.costs} | {_linked(found.source)} |")
    return "\n".join(lines)


def requirements(name: str) -> str:
    """What a method cannot be combined with: why, and what to do instead."""
    found = options_class(name)
    lines = [f"- {_requirement(requirement)}" for requirement in found.requirements]
    logged = [f"`safety/{metric}` ({meaning})" for metric, meaning in found.curves.items()]
    if not lines:
        lines = ["Nothing beyond what every method refuses."]
    if logged:
        lines += ["", f"In every log: {', '.join(logged)}."]
    return "\n".join(lines)


def _requirement(found: Requirement) -> str:
    text = f"**{_upper(FACTS[found.fact].split(':')[0])}**: {found.meaning}{f' ({found.when_text})' if found.when_text else ''}. "
    text += f"{_upper(found.reason.replace(' of {value}', ''))}. "
    if found.switch_off == "always":
        return text + "It is switched off and reported."
    todo = "; ".join(
        remedy if host == "any" and len(found.remedy) == 1 else f"{'elsewhere' if host == 'any' else HOSTS[host]}, {remedy}"
        for host, remedy in found.remedy.items()
    )
    return text + (
        f"If you set it: {todo}. If a default did, it is switched off." if found.switch_off == "unless_spelt_out" else f"{_upper(todo)}."
    )


def _upper(text: str) -> str:
    return text[0].upper() + text[1:]


def _linked(source: str) -> str:
    return re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", source)


# Compatibility.


def axolotl(_: str = "") -> str:
    """What is refused beside which method, by Axolotl's keys."""
    return rules.table()


def every(_: str = "") -> str:
    """What every method refuses."""
    return "\n".join(f"- {_requirement(found)}" for found in EVERY_METHOD)


def facts(_: str = "") -> str:
    """What is refused beside which method, by the facts of a run, whatever the host."""
    classes = {name: options_class(name) for name in METHODS}
    rows: dict[tuple[str, str], list[Requirement]] = {}
    for found in requirements_of(classes):
        if found not in EVERY_METHOD:
            rows.setdefault((found.fact, found.meaning), []).append(found)
    lines = ["| a run with | " + " | ".join(f"`{name}`" for name in classes) + " |", "|---|" + "---|" * len(classes)]
    tests: dict[str, int] = {}
    for (fact, meaning), group in rows.items():
        cells = [cell(group, found) for found in classes.values()]
        for place, text in enumerate(cells):
            if text.startswith("works ("):
                cells[place] = f"works [{tests.setdefault(text.removeprefix('works '), len(tests) + 1)}]"
        lines.append(f"| {FACTS[fact].split(':')[0]}: {meaning} | {' | '.join(cells)} |")
    shown = [f"[{number}] shown by {test.strip('()')}" for test, number in tests.items()]
    return "\n".join([*lines, "", "; ".join(shown) + "."])


# Results.


def kept(pattern: str) -> list[dict[str, Any]]:
    """The rows of the result files whose names match; of two files, the later one's row counts."""
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for file in sorted((ROOT / "benchmarks" / "results").glob(pattern)):
        for row in json.loads(file.read_text(encoding="utf-8")):
            rows[row["method"], row["seed"]] = {**row, "file": file.name}
    return list(rows.values())


HEADLINES = (
    ("English pair", "plain SFT"),
    ("English pair", "Buffer-and-Reinforce, buffer alone"),
    ("English pair", "Buffer-and-Reinforce: plain SFT shrunk to the same ‖ΔW‖"),
    ("English pair", "alignment buffer, γ = 1.5"),
    ("innocent lab", "plain SFT"),
    ("innocent lab", "alignment buffer, γ = 0.5"),
    ("innocent lab", "Buffer-and-Reinforce, buffer alone"),
    ("innocent lab", "DualSelect, ρ = 0.2"),
    ("innocent lab", "DualSelect, ρ = 0.2: the references mixed into the data (SafeInstruct)"),
)
"""The README's rows of results: world and name."""
WORLDS = {"English pair": "nano_pair-*.json", "innocent lab": "innocent_base-*.json"}
"""World → the names of its result files."""


def headlines(_: str = "") -> str:
    """The README's rows of results, each with its files."""
    lines = ["| world | | attack ↓ | task ↑ | seeds | kept in |", "|---|---|---|---|---|---|"]
    for world, name in HEADLINES:
        rows = [row for row in kept(WORLDS[world]) if row["method"] == name]
        rates = " | ".join(f"{statistics.fmean(row[key] for row in rows):.2f}" for key in ("attack", "task"))
        label, _, control = name.partition(": ")
        label = f"– {control}" if control else label
        files = ", ".join(f"[{file.removesuffix('.json')}](benchmarks/results/{file})" for file in sorted({row["file"] for row in rows}))
        lines.append(f"| {world} | {label} | {rates} | {len(rows)} | {files} |")
    return "\n".join(lines)


def results(_: str = "") -> str:
    """`benchmarks/RESULTS.md` as part of a page."""
    return included("benchmarks/RESULTS.md")


def costs(_: str = "") -> str:
    """`benchmarks/README.md` as part of a page."""
    return included("benchmarks/README.md")


def included(name: str) -> str:
    """A Markdown file of the repository without its title; its links are made relative to a page in `docs`."""
    text = (ROOT / name).read_text(encoding="utf-8").partition("\n")[2].strip()

    def moved(found: re.Match[str]) -> str:
        target = found[2]
        if "://" in target:
            return found[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(name), target))
        return f"{found[1]}{'results.md' if path == 'benchmarks/RESULTS.md' else f'../{path}'}{found[3]}"

    return LINK.sub(moved, text)


def chart(rows: list[dict[str, Any]]) -> str:
    """Attack and task of every row, as SVG: two marks on a line for each, told apart by shape and size as well as by colour."""
    import io

    from matplotlib import rc_context
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["method"] for row in rows))
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "trl-safety", "font.family": "sans-serif"}):
        figure = Figure(figsize=(8, 0.27 * len(names) + 1), layout="constrained")
        axes = figure.subplots()
        for place, name in enumerate(names):
            attack, task = (statistics.fmean(row[key] for row in rows if row["method"] == name) for key in ("attack", "task"))
            axes.plot([attack, task], [place, place], color="#999999", linewidth=1, zorder=1)
            axes.scatter(attack, place, marker="o", s=70, color="#d55e00", zorder=2, label=None if place else "attack ↓")
            axes.scatter(task, place, marker="s", s=20, color="#0072b2", zorder=3, label=None if place else "task ↑")
        labels = [f"– {name.partition(': ')[2]}" if ": " in name else name for name in names]
        axes.set_yticks(range(len(names)), labels, color="#808080", fontsize=8)
        axes.tick_params(colors="#808080")
        axes.set_xlim(-0.03, 1.03)
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#808080")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, labelcolor="#808080")
        written = io.StringIO()
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None})
    return written.getvalue()


CHARTS = {"innocent_base": "innocent_base-*.json", "english_pair": "nano_pair-*.json"}


def plot(name: str) -> str:
    """A picture of kept rows, which the build draws."""
    return f"![Attack and task of every row of {CHARTS[name]}](images/{name}.svg)"


# References.


def python(heading: str) -> str:
    """The public names of some rooms, for mkdocstrings."""
    homes = {name: home for name, home in _HOMES.items() if home.split(".")[1] in GROUPS[heading]}
    return "\n\n".join(f"::: {home}.{name}" for name, home in homes.items())


def cli(_: str = "") -> str:
    """Every command of `trl-safety`, with its arguments and options."""
    import typer

    from trl_safety.cli.app import app

    group: Any = typer.main.get_command(app)
    return "\n\n".join(_command(name, command) for name, command in sorted(group.commands.items()))


def _command(name: str, command: Any) -> str:
    arguments = [found for found in command.params if found.param_type_name == "argument"]
    chosen = [found for found in command.params if found.param_type_name == "option" and not found.hidden]
    names = [(found.metavar or found.name).upper() for found in arguments]
    further = "[OPTIONS]" if chosen else "[OPTIONS OF trl sft]" if command.context_settings.get("ignore_unknown_options") else ""
    usage = " ".join(["trl-safety", name, *names, further]).strip()
    lines = [f"## {name}", "", " ".join((command.help or "").split("\f")[0].split()), "", f"Usage: `{usage}`"]
    if not arguments and not chosen:
        return "\n".join(lines)
    rows = [(f"`{shown}`", found) for shown, found in zip(names, arguments, strict=True)]
    rows += [(", ".join(f"`{part}`" for part in found.opts + found.secondary_opts), found) for found in chosen]
    lines += ["", "| | default | |", "|---|---|---|"]
    return "\n".join(lines + [f"| {shown} | {_default(found)} | {one_line(found.help)} |" for shown, found in rows])


def _default(found: Any) -> str:
    if found.required:
        return "required"
    value = found.default
    return "" if value is None or value == [] or callable(value) else f"`{getattr(value, 'value', value)}`"


KINDS: Mapping[str, Callable[[str], str]] = {
    found.__name__: found
    for found in (options, block, method, methods, requirements, axolotl, every, facts, headlines, results, costs, plot, python, cli)
}


def filled(text: str) -> str:
    """A page's Markdown with its markers filled."""
    return MARKER.sub(lambda found: KINDS[found["kind"]](found["argument"] or ""), text)


def current(text: str) -> str:
    """A file's Markdown with its committed generated parts made anew."""
    return COMMITTED.sub(lambda found: f"{found[1]}{KINDS[found[2]]('')}\n{found[3]}", text)


def committed() -> Iterator[Path]:
    """The files that hold generated parts."""
    for path in (ROOT / "README.md", *sorted(DOCS.rglob("*.md"))):
        if COMMITTED.search(path.read_text(encoding="utf-8")):
            yield path


# MkDocs.


def on_files(files: Any, config: Any) -> Any:
    """Add the pictures, and the files outside `docs` that pages link to."""
    from mkdocs.structure.files import File

    for name, pattern in CHARTS.items():
        files.append(File.generated(config, f"images/{name}.svg", content=chart(kept(pattern))))
    for folder in SHIPPED:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.is_file() and path.suffix in {".yaml", ".yml", ".json", ".py", ".txt"}:
                files.append(File.generated(config, f"repository/{path.relative_to(ROOT).as_posix()}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Fill the markers, and lead links that leave `docs` to the site's copy."""
    here = posixpath.dirname(page.file.src_uri)

    def inside(found: re.Match[str]) -> str:
        if "://" in found[2]:
            return found[0]
        target = posixpath.normpath(posixpath.join("docs", here, found[2]))
        if target == "docs" or target.startswith("docs/"):
            return found[0]
        if (ROOT / target).is_dir():
            # The site has files, no folders.
            return found[1][1:-2]
        return f"{found[1]}{posixpath.relpath(f'repository/{target}', here or '.')}{found[3]}"

    return LINK.sub(inside, filled(markdown))


def main() -> None:
    """Rewrite the generated parts of the repository."""
    for path in committed():
        text = path.read_text(encoding="utf-8")
        if text != current(text):
            path.write_text(current(text), encoding="utf-8")
            print(f"{path.relative_to(ROOT)}: written")


if __name__ == "__main__":
    main()
