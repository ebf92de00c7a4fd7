"""What Axolotl's GRPO needs from a module of the user's."""

from __future__ import annotations

from typing import Any

from tests.training.preference import reward


def different_words(completions: list[str], **kwargs: Any) -> list[float]:
    """See `reward`."""
    return reward(completions)
