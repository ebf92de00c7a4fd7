"""`axolotl safety …`: Axolotl's commands for configurations with a `safety:` block, and the `trl-safety` commands.

From Axolotl 0.21 on, plain `axolotl train` does the same. Earlier versions split a plugin's name at a dot before they import
anything, so `plugins: [safety]` cannot work there; these commands replace it by the full name and call Axolotl. They also refuse a
`safety:` block without the plugin line, which an Axolotl before 0.21 would ignore.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

from axolotl_plugin import PLUGIN, SHORT_NAME

PASS_ON = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}


@click.group(short_help="train with trl-safety; inspect, correct and verify adapters")
def safety() -> None:
    """Fine-tune without losing the model's safety: Axolotl's own commands with a `safety:` block, and those of trl-safety."""


def _hand_over(command: str, config: str, arguments: list[str]) -> None:
    """Run an Axolotl command on the configuration with the plugin's full name, and exit with its status."""
    from trl_safety.errors import SafetyError

    try:
        resolved = resolve(Path(config))
    except SafetyError as error:
        raise click.ClickException(str(error)) from error
    with tempfile.TemporaryDirectory() as folder:
        path = Path(config)
        if resolved is not None:
            path = Path(folder) / Path(config).name
            path.write_text(resolved, encoding="utf-8")
        done = subprocess.run([sys.executable, "-m", "axolotl.cli.main", command, str(path), *arguments], check=False)  # noqa: S603
    raise click.exceptions.Exit(done.returncode)


def resolve(path: Path) -> str | None:
    """The configuration's text with the short plugin name spelt out, or None if it needs no change.

    Raises:
        ConfigurationError: the file is not YAML; or it has no safety block or, before Axolotl 0.21, no plugin line, so nothing would be
            protected.
    """
    import yaml

    from axolotl_plugin.plugin import loaded_by_axolotl
    from trl_safety.config.options import read_yaml
    from trl_safety.errors import ConfigurationError

    config: Any = read_yaml(path, "config")
    if not isinstance(config, dict) or not config.get("safety"):
        raise ConfigurationError(
            f"config = {str(path)!r}: safety is missing: nothing would be protected; add a `safety:` block or use plain `axolotl`"
        )
    plugins = config.get("plugins") or []
    if SHORT_NAME not in plugins and PLUGIN not in plugins and not loaded_by_axolotl():
        raise ConfigurationError(
            f"config = {str(path)!r}: plugins = {plugins!r}: Axolotl would ignore the `safety:` block; add `plugins: [{SHORT_NAME}]` or `plugins: [{PLUGIN}]`"
        )
    if SHORT_NAME not in plugins:
        return None
    config["plugins"] = [PLUGIN if name == SHORT_NAME else name for name in plugins]
    return yaml.safe_dump(config, sort_keys=False)


def _axolotl_command(name: str, text: str) -> None:
    @safety.command(name, short_help=text, context_settings=PASS_ON)
    @click.argument("config", type=click.Path(exists=True, dir_okay=False))
    @click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
    def command(config: str, arguments: tuple[str, ...]) -> None:
        _hand_over(name, config, list(arguments))

    command.help = f"{text}; further arguments are passed to Axolotl."


def _own_command(name: str, text: str) -> None:
    @safety.command(name, short_help=text, context_settings=PASS_ON)
    @click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
    def command(arguments: tuple[str, ...]) -> None:
        from trl_safety.cli.app import app

        app([name, *arguments], prog_name="axolotl safety")

    command.help = f"{text}: `trl-safety {name}`."


for _name, _text in {
    "train": "axolotl train, with `plugins: [safety]` resolved",
    "preprocess": "axolotl preprocess, likewise",
    "merge-lora": "axolotl merge-lora, likewise",
}.items():
    _axolotl_command(_name, _text)
for _name, _text in {
    "subspace": "build an alignment subspace",
    "buffer": "train a BufferLoRA with TRL",
    "reinforce": "train a ReinforceLoRA with TRL",
    "merge-reinforce": "merge a user's adapter with a ReinforceLoRA",
    "correct": "correct a saved adapter",
    "inspect": "show what an adapter changed",
    "verify": "check that an adapter was protected",
}.items():
    _own_command(_name, _text)
