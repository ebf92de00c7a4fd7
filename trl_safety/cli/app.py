"""The command line: every module of commands, and the rooms that methods have here."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

import trl_safety.cli as rooms
from trl_safety.cli.base import app

for found in iter_modules(rooms.__path__):
    # A command registers itself when its module is imported.
    import_module(f"{rooms.__name__}.{found.name}")

__all__ = ["app"]
