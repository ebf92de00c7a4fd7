"""The methods of trl-safety from an Axolotl YAML: `plugins: [axolotl_plugin.SafetyPlugin]` and a `safety:` block.

Axolotl prints an `ImportError` of a plugin and trains on without it. Nothing is imported here that could fail: what is missing
is raised from the plugin's hooks, whose errors Axolotl does not catch.
"""

from typing import Any

__all__ = ["SafetyPlugin"]


def __getattr__(name: str) -> Any:
    if name == "SafetyPlugin":
        from axolotl_plugin.plugin import SafetyPlugin

        return SafetyPlugin
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
