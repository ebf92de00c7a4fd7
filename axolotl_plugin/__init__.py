"""The Axolotl plugin's package. The plugin itself is not part of this version.

Axolotl prints an `ImportError` and trains on unprotected, so that asking for the plugin raises another error here.
"""

from typing import Any

from trl_safety.errors import ConfigurationError


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    raise ConfigurationError(
        f"plugins: axolotl_plugin.{name} is not available in this version of trl-safety, and nothing would be protected: train with "
        "SafeSFTTrainer or `trl-safety sft`, or correct the adapter that Axolotl saved with `trl-safety correct`"
    )
