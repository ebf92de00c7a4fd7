"""The `safety` key in Axolotl's schema, and what it may not be combined with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, SerializeAsAny, model_validator

from axolotl_plugin.rules import refuse
from trl_safety.config.block import SafetyConfig


class SafetyPluginArgs(BaseModel):
    """Merged by Axolotl into its own configuration class under this name."""

    # Serialised by its actual class: a block may hold another package's method, which the declared class does not know.
    safety: SerializeAsAny[SafetyConfig]

    @model_validator(mode="before")
    @classmethod
    def check_safety(cls, data: Any) -> Any:
        """Validate the block, with messages that name each option; then refuse the keys that keep a method from acting."""
        if isinstance(data, Mapping) and "safety" in data:
            block = data["safety"]
            config = SafetyConfig.parse(block.to_dict() if hasattr(block, "to_dict") else block)
            refuse(data, config)
            return {**data, "safety": config}
        return data
