"""Counts the examples of Axolotl that each method can be added to, and the reasons against the others.

    python benchmarks/axolotl_examples.py EXAMPLES.jsonl [--files]

EXAMPLES.jsonl has a line per example: {"file": …, "config": the parsed YAML}. With a block of one method, each goes through Axolotl's
own validation (as on one GPU of compute capability 9.0) and through the plugin's check before the model is loaded. Nothing is loaded
or trained. An example can be refused for several reasons. Needs Axolotl 0.21 or newer.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

os.environ.setdefault("AXOLOTL_DO_NOT_TRACK", "1")

from axolotl.integrations.base import PluginManager
from axolotl.utils.config import prepare_plugins, validate_config
from axolotl.utils.dict import DictDefault

from axolotl_plugin import PLUGIN
from trl_safety.config.block import METHODS, SafetyConfig, options_class
from trl_safety.errors import ConfigurationError, SafetyError

CAPABILITIES = {"bf16": True, "n_gpu": 1, "compute_capability": "sm_90", "fp8": False, "tf32": True}
ENVIRONMENT = {"torch_version": "2.10.0"}
OPTIONS: dict[str, dict[str, Any]] = {"dual_select": {"keep": 1}}
"""Options that suit most examples: many have a batch of two, and the default would keep both."""
OURS = re.compile(r"(?:Value error, )?(?P<setting>.+?): (?P<methods>[\w, ]+) cannot act: (?P<reason>.+?)(?: \[type=|$)")


def block(method: str) -> dict[str, Any]:
    """The shortest safety block with the method; the files it names are not opened here."""
    options = {name: f"somewhere/{name}" for name, field in options_class(method).model_fields.items() if field.is_required()}
    options |= OPTIONS.get(method, {})
    with_subspace = {"subspace": "S.safetensors", method: options}
    try:
        SafetyConfig.parse(with_subspace)
    except ConfigurationError:
        return {method: options}
    return with_subspace


def refusal(config: dict[str, Any], safety: dict[str, Any]) -> str | None:
    """The error when the example is validated with the safety block; None if it is accepted."""
    cfg = DictDefault({**copy.deepcopy(config), "safety": safety})
    # All configurations run in one process, in which Axolotl keeps the last one's plugins and the variables for its engine.
    PluginManager.get_instance().plugins.clear()
    environment = dict(os.environ)
    try:
        prepare_plugins(cfg)
        validated = validate_config(cfg, capabilities=CAPABILITIES, env_capabilities=ENVIRONMENT)
        PluginManager.get_instance().plugins[PLUGIN].pre_model_load(validated)
    except (ValueError, SafetyError) as error:
        return str(error)
    finally:
        os.environ.clear()
        os.environ.update(environment)
    return None


def reasons(said: str) -> list[str]:
    """The reasons in a refusal, without the example's own values; any other error unchanged."""
    found = [match for line in said.splitlines() if (match := OURS.match(line.strip()))]
    if not found:
        return [said.splitlines()["validation error" in said.splitlines()[0]].partition(" [type=")[0].strip()]
    return list(dict.fromkeys(f"{match['setting'].split()[0]}: {match['reason']}" for match in found))


def main() -> None:
    """Print a line per method, and one per reason below it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("examples", type=Path)
    parser.add_argument("--files", action="store_true", help="name the refused examples below each reason")
    arguments = parser.parse_args()
    examples = [json.loads(line) for line in arguments.examples.read_text(encoding="utf-8").splitlines()]
    for method in METHODS:
        refused: dict[str, list[str]] = defaultdict(list)
        files = set()
        for example in examples:
            if (said := refusal(example["config"], block(method))) is not None:
                files.add(example["file"])
                for reason in reasons(said):
                    refused[reason].append(example["file"])
        print(f"{method}: {len(examples) - len(files)} accepted, {len(files)} refused")
        for reason, names in sorted(refused.items(), key=lambda item: -len(item[1])):
            print(f"  {len(names):3} {reason}")
            for name in names if arguments.files else ():
                print(f"        {name}")


if __name__ == "__main__":
    main()
