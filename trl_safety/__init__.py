"""Keep an aligned language model's safety through LoRA and QLoRA fine-tuning.

The names below are loaded on first use, so that `import trl_safety` and the command line start without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from trl_safety.version import __version__

_HOMES = {
    "AlignmentBufferConfig": "trl_safety.config.alignment_buffer",
    "AlignmentSubspace": "trl_safety.subspace.artifact",
    "AlignmentVectorCallback": "trl_safety.training.callbacks",
    "AlignmentVectorConfig": "trl_safety.config.alignment_vector",
    "AsftConfig": "trl_safety.config.asft",
    "BufferReinforceConfig": "trl_safety.config.buffer_reinforce",
    "BufferTrainer": "trl_safety.training.trainer",
    "CSULoRACallback": "trl_safety.training.callbacks",
    "CsuloraConfig": "trl_safety.config.csulora",
    "DualSelectConfig": "trl_safety.config.dual_select",
    "ReinforceTrainer": "trl_safety.training.trainer",
    "SafeLoRACallback": "trl_safety.training.callbacks",
    "SafeLoraConfig": "trl_safety.config.safe_lora",
    "SafeSFTConfig": "trl_safety.training.trainer",
    "SafeSFTTrainer": "trl_safety.training.trainer",
    "SafetyConfig": "trl_safety.config.block",
    "SafetyEvalCallback": "trl_safety.training.safety_eval",
    "SafetyEvalConfig": "trl_safety.config.evaluation",
    "SafetyError": "trl_safety.errors",
    "SubspaceConfig": "trl_safety.config.subspace",
    "apply_alignment_vector": "trl_safety.corrections.alignment_vector",
    "apply_csulora": "trl_safety.corrections.csulora",
    "apply_safe_lora": "trl_safety.corrections.safe_lora",
    "asft_penalty": "trl_safety.training.asft",
    "merge_reinforce": "trl_safety.corrections.buffer_reinforce",
}

if TYPE_CHECKING:
    from trl_safety.config.asft import AsftConfig
    from trl_safety.config.block import SafetyConfig
    from trl_safety.config.buffer_reinforce import BufferReinforceConfig
    from trl_safety.config.csulora import CsuloraConfig
    from trl_safety.config.dual_select import DualSelectConfig
    from trl_safety.config.evaluation import SafetyEvalConfig
    from trl_safety.config.safe_lora import SafeLoraConfig
    from trl_safety.config.subspace import SubspaceConfig
    from trl_safety.corrections.alignment_vector import apply_alignment_vector
    from trl_safety.corrections.buffer_reinforce import merge_reinforce
    from trl_safety.corrections.csulora import apply_csulora
    from trl_safety.corrections.safe_lora import apply_safe_lora
    from trl_safety.errors import SafetyError
    from trl_safety.subspace.artifact import AlignmentSubspace
    from trl_safety.training.asft import asft_penalty
    from trl_safety.training.callbacks import AlignmentVectorCallback, CSULoRACallback, SafeLoRACallback
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
