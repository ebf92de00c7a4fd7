"""The methods of trl-safety from an Axolotl YAML: a `safety:` block, and before Axolotl 0.21 `plugins: [axolotl_plugin.SafetyPlugin]`.

If a plugin cannot be imported, Axolotl prints the error and trains without it. So nothing is imported here that could fail: a missing
package raises in the plugin's hooks, whose errors Axolotl does not catch.
"""

from typing import Any

__all__ = ["SafetyPlugin"]

PLUGIN = "axolotl_plugin.SafetyPlugin"
SHORT_NAME = "safety"


def __getattr__(name: str) -> Any:
    if name == "SafetyPlugin":
        from axolotl_plugin.plugin import SafetyPlugin

        return SafetyPlugin
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
