"""The command line: collects the commands of every module in this folder."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

from trl_safety.cli.base import app

for found in iter_modules([str(Path(__file__).parent)]):
    # A command registers itself when its module is imported.
    import_module(f"trl_safety.cli.{found.name}")

__all__ = ["app"]
