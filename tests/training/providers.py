"""A provider's buffer and reinforcing LoRAs for the tiny pair, trained by the real trainers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trl import SFTConfig

from tests import tiny

RECIPE: dict[str, Any] = {"max_steps": 3, "learning_rate": 5e-2, **tiny.WELL_CONDITIONED}


def make(folder: Path, *, base: str = "gqa-aligned", reinforce: dict[str, Any] | None = None, buffer: dict[str, Any] | None = None) -> Path:
    """`buffer/` and `reinforce/` in `folder`, for a model in `tests/data` or any folder; their LoraConfigs differ from the user's."""
    from trl_safety import BufferTrainer, ReinforceTrainer

    def options(name: str) -> Any:
        return tiny.arguments(folder / name, SFTConfig, **RECIPE)

    one = {"r": 6, "lora_alpha": 9, "target_modules": ["q_proj", "k_proj", "down_proj"], **(buffer or {})}
    trainer = tiny.trainer(
        folder / "buffer", cls=BufferTrainer, args=options("buffer"), peft_config=tiny.lora(**one), base=tiny.model(base)
    )
    trainer.train()
    trainer.save_model()
    other = {"r": 3, "lora_alpha": 5, "use_rslora": True, "target_modules": ["q_proj", "o_proj", "down_proj"], **(reinforce or {})}
    trainer = tiny.trainer(
        folder / "reinforce",
        cls=lambda **kwargs: ReinforceTrainer(**kwargs, buffer=folder / "buffer"),
        args=options("reinforce"),
        peft_config=tiny.lora(**other),
        data=tiny.rows(32, seed=5),
        base=tiny.model(base),
    )
    trainer.train()
    trainer.save_model()
    return folder
