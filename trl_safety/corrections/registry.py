"""Options → the correction that they ask for."""

from __future__ import annotations

from trl_safety.config.alignment_vector import AlignmentVectorConfig
from trl_safety.config.correction import CorrectionConfig
from trl_safety.config.csulora import CsuloraConfig
from trl_safety.config.safe_lora import SafeLoraConfig
from trl_safety.corrections.alignment_vector import AlignmentVectorCorrection
from trl_safety.corrections.base import Correction
from trl_safety.corrections.csulora import CsuloraCorrection
from trl_safety.corrections.safe_lora import SafeLoraCorrection
from trl_safety.errors import ConfigurationError


def correction_for(config: CorrectionConfig) -> Correction:
    """The correction that a config block asks for."""
    if isinstance(config, SafeLoraConfig):
        return SafeLoraCorrection(config)
    if isinstance(config, CsuloraConfig):
        return CsuloraCorrection(config)
    if isinstance(config, AlignmentVectorConfig):
        return AlignmentVectorCorrection(config)
    raise ConfigurationError(f"{type(config).__name__} is no correction of a trained adapter")
