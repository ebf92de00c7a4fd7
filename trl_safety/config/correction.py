"""The options that all corrections share."""

from __future__ import annotations

from trl_safety.config.options import Options


class CorrectionConfig(Options):
    """What all corrections of a trained adapter share."""

    corrected_checkpoints: bool = False
    """Write a corrected copy into `checkpoint-N/safety/corrected/`; the checkpoint itself stays resumable, uncorrected."""

    @property
    def idle(self) -> str | None:
        """Why these options change nothing on any adapter; None where they may. A sweep may hold such a point, a run may not."""
        return None
