"""A plugin that brings a trainer class of its own."""

from typing import Any

from axolotl.core.trainers import AxolotlTrainer
from axolotl.integrations.base import BasePlugin


class OtherTrainer(AxolotlTrainer):
    pass


class OtherPlugin(BasePlugin):
    def get_trainer_cls(self, cfg: Any) -> Any:
        return OtherTrainer
