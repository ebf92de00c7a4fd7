"""A plugin that provides its own trainer class."""

from typing import Any

from axolotl.core.trainers import AxolotlTrainer
from axolotl.integrations.base import BasePlugin


class OtherTrainer(AxolotlTrainer):
    pass


class OtherPlugin(BasePlugin):
    def get_trainer_cls(self, cfg: Any) -> Any:
        return OtherTrainer
