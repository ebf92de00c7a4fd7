"""The version, defined only here; the build reads it."""

__version__ = "0.2.0.dev0"
