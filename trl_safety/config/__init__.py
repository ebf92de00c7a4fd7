"""Every option of every method, defined once.

`SafeSFTConfig`, the CLI and the Axolotl plugin read these classes; nothing else defines an option. All of them reject unknown keys and
non-finite numbers.
"""

from trl_safety.config.alignment_buffer import AlignmentBufferConfig
from trl_safety.config.alignment_vector import AlignmentVectorConfig
from trl_safety.config.asft import AsftConfig
from trl_safety.config.block import CORRECTIONS, METHODS, SafetyConfig
from trl_safety.config.buffer_reinforce import BufferReinforceConfig, ReinforceMergeConfig
from trl_safety.config.correction import CorrectionConfig
from trl_safety.config.csulora import CsuloraConfig
from trl_safety.config.dual_select import DualSelectConfig
from trl_safety.config.evaluation import SafetyEvalConfig
from trl_safety.config.options import validate
from trl_safety.config.safe_lora import SafeLoraConfig
from trl_safety.config.signed_vector import ServedVectorConfig, SignedVectorConfig
from trl_safety.config.subspace import SubspaceConfig

__all__ = [
    "CORRECTIONS",
    "METHODS",
    "AlignmentBufferConfig",
    "AlignmentVectorConfig",
    "AsftConfig",
    "BufferReinforceConfig",
    "CorrectionConfig",
    "CsuloraConfig",
    "DualSelectConfig",
    "ReinforceMergeConfig",
    "SafeLoraConfig",
    "SafetyConfig",
    "SafetyEvalConfig",
    "ServedVectorConfig",
    "SignedVectorConfig",
    "SubspaceConfig",
    "validate",
]
