"""The command line."""

from trl_safety.cli.app import app

__all__ = ["app"]
