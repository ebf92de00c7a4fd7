"""Keep an aligned language model's safety through LoRA and QLoRA fine-tuning.

The names below are loaded on first use, so that `import trl_safety` and the command line start without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "AlignmentBufferConfig": "trl_safety.config",
    "AlignmentSubspace": "trl_safety.adapters.subspace",
    "AlignmentVectorCallback": "trl_safety.training.alignment_vector",
    "AlignmentVectorConfig": "trl_safety.config",
    "AsftConfig": "trl_safety.config",
    "BufferReinforceConfig": "trl_safety.config",
    "BufferTrainer": "trl_safety.training.trainer",
    "CSULoRACallback": "trl_safety.training.csulora",
    "CsuloraConfig": "trl_safety.config",
    "DualSelectConfig": "trl_safety.config",
    "ReinforceTrainer": "trl_safety.training.trainer",
    "SafeLoRACallback": "trl_safety.training.safe_lora",
    "SafeLoraConfig": "trl_safety.config",
    "SafeSFTConfig": "trl_safety.training.trainer",
    "SafeSFTTrainer": "trl_safety.training.trainer",
    "SafetyConfig": "trl_safety.config",
    "SafetyEvalCallback": "trl_safety.training.safety_eval",
    "SafetyEvalConfig": "trl_safety.config",
    "SafetyError": "trl_safety.errors",
    "SubspaceConfig": "trl_safety.config",
    "apply_alignment_vector": "trl_safety.training.alignment_vector",
    "apply_csulora": "trl_safety.training.csulora",
    "apply_safe_lora": "trl_safety.training.safe_lora",
    "asft_penalty": "trl_safety.training.asft",
    "merge_reinforce": "trl_safety.training.buffer_reinforce",
}

if TYPE_CHECKING:
    from trl_safety.adapters.subspace import AlignmentSubspace
    from trl_safety.config import (
        AsftConfig,
        BufferReinforceConfig,
        CsuloraConfig,
        DualSelectConfig,
        SafeLoraConfig,
        SafetyConfig,
        SafetyEvalConfig,
        SubspaceConfig,
    )
    from trl_safety.errors import SafetyError
    from trl_safety.training.alignment_vector import AlignmentVectorCallback, apply_alignment_vector
    from trl_safety.training.asft import asft_penalty
    from trl_safety.training.buffer_reinforce import merge_reinforce
    from trl_safety.training.csulora import CSULoRACallback, apply_csulora
    from trl_safety.training.safe_lora import SafeLoRACallback, apply_safe_lora
    from trl_safety.training.safety_eval import SafetyEvalCallback
    from trl_safety.training.trainer import BufferTrainer, ReinforceTrainer, SafeSFTConfig, SafeSFTTrainer

__all__ = [
    "AlignmentBufferConfig",
    "AlignmentSubspace",
    "AlignmentVectorCallback",
    "AlignmentVectorConfig",
    "AsftConfig",
    "BufferReinforceConfig",
    "BufferTrainer",
    "CSULoRACallback",
    "CsuloraConfig",
    "DualSelectConfig",
    "ReinforceTrainer",
    "SafeLoRACallback",
    "SafeLoraConfig",
    "SafeSFTConfig",
    "SafeSFTTrainer",
    "SafetyConfig",
    "SafetyError",
    "SafetyEvalCallback",
    "SafetyEvalConfig",
    "SubspaceConfig",
    "apply_alignment_vector",
    "apply_csulora",
    "apply_safe_lora",
    "asft_penalty",
    "merge_reinforce",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
