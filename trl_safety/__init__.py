"""Keep an aligned language model's safety through LoRA and QLoRA fine-tuning.

The names below are loaded on first use, so that `import trl_safety` and the command line start without importing torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from trl_safety.version import __version__

_HOMES = {
    "AdapterError": "trl_safety.errors",
    "AlignmentBufferConfig": "trl_safety.config.alignment_buffer",
    "AlignmentSubspace": "trl_safety.subspace.artifact",
    "AlignmentVectorCallback": "trl_safety.corrections.alignment_vector",
    "AlignmentVectorConfig": "trl_safety.config.alignment_vector",
    "AsftConfig": "trl_safety.config.asft",
    "BufferReinforceConfig": "trl_safety.config.buffer_reinforce",
    "BufferTrainer": "trl_safety.training.trainer",
    "CSULoRACallback": "trl_safety.corrections.csulora",
    "CSULoRAConfig": "trl_safety.config.csulora",
    "CheckpointError": "trl_safety.errors",
    "ConfigurationError": "trl_safety.errors",
    "Correction": "trl_safety.corrections.base",
    "CorrectionCallback": "trl_safety.corrections.callback",
    "CorrectionConfig": "trl_safety.config.correction",
    "CsuloraConfig": "trl_safety.config.csulora",
    "DualSelectConfig": "trl_safety.config.dual_select",
    "Judge": "trl_safety.scoring",
    "MethodOptions": "trl_safety.config.method",
    "Prompt": "trl_safety.scoring",
    "ReinforceMergeConfig": "trl_safety.config.buffer_reinforce",
    "ReinforceTrainer": "trl_safety.training.trainer",
    "ReportError": "trl_safety.errors",
    "Requirement": "trl_safety.config.requirements",
    "SafeDPOConfig": "trl_safety.training.dpo",
    "SafeDPOTrainer": "trl_safety.training.dpo",
    "SafeGRPOConfig": "trl_safety.training.grpo",
    "SafeGRPOTrainer": "trl_safety.training.grpo",
    "SafeKTOConfig": "trl_safety.training.kto",
    "SafeKTOTrainer": "trl_safety.training.kto",
    "SafeLoRACallback": "trl_safety.corrections.safe_lora",
    "SafeLoRAConfig": "trl_safety.config.safe_lora",
    "SafeLoraConfig": "trl_safety.config.safe_lora",
    "SafeSFTConfig": "trl_safety.training.trainer",
    "SafeSFTTrainer": "trl_safety.training.trainer",
    "SafetyConfig": "trl_safety.config.block",
    "SafetyError": "trl_safety.errors",
    "SafetyEvalCallback": "trl_safety.training.safety_eval",
    "SafetyEvalConfig": "trl_safety.config.evaluation",
    "SafetyMixin": "trl_safety.training.mixin",
    "SafetyReport": "trl_safety.reports.report",
    "SbrConfig": "trl_safety.config.sbr",
    "ServedVectorConfig": "trl_safety.config.signed_vector",
    "SignedVectorConfig": "trl_safety.config.signed_vector",
    "SubspaceConfig": "trl_safety.config.subspace",
    "SubspaceError": "trl_safety.errors",
    "TrainingMethod": "trl_safety.training.method",
    "apply_alignment_vector": "trl_safety.corrections.alignment_vector",
    "apply_csulora": "trl_safety.corrections.csulora",
    "apply_safe_lora": "trl_safety.corrections.safe_lora",
    "asft_penalty": "trl_safety.training.asft",
    "build_subspace": "trl_safety.subspace.build",
    "correct": "trl_safety.corrections.registry",
    "evaluate": "trl_safety.evaluation.evaluate",
    "inspect_adapter": "trl_safety.inspection.layers",
    "load_model": "trl_safety.evaluation.loading",
    "merge_reinforce": "trl_safety.corrections.buffer_reinforce",
    "read_report": "trl_safety.reports.report",
    "sweep": "trl_safety.evaluation.sweep",
    "verify": "trl_safety.reports.report",
}
"""Name → the module that defines it. A test compares the block below with it."""

if TYPE_CHECKING:
    from trl_safety.config.alignment_buffer import AlignmentBufferConfig as AlignmentBufferConfig
    from trl_safety.config.alignment_vector import AlignmentVectorConfig as AlignmentVectorConfig
    from trl_safety.config.asft import AsftConfig as AsftConfig
    from trl_safety.config.block import SafetyConfig as SafetyConfig
    from trl_safety.config.buffer_reinforce import BufferReinforceConfig as BufferReinforceConfig
    from trl_safety.config.buffer_reinforce import ReinforceMergeConfig as ReinforceMergeConfig
    from trl_safety.config.correction import CorrectionConfig as CorrectionConfig
    from trl_safety.config.csulora import CSULoRAConfig as CSULoRAConfig
    from trl_safety.config.csulora import CsuloraConfig as CsuloraConfig
    from trl_safety.config.dual_select import DualSelectConfig as DualSelectConfig
    from trl_safety.config.evaluation import SafetyEvalConfig as SafetyEvalConfig
    from trl_safety.config.method import MethodOptions as MethodOptions
    from trl_safety.config.requirements import Requirement as Requirement
    from trl_safety.config.safe_lora import SafeLoRAConfig as SafeLoRAConfig
    from trl_safety.config.safe_lora import SafeLoraConfig as SafeLoraConfig
    from trl_safety.config.sbr import SbrConfig as SbrConfig
    from trl_safety.config.signed_vector import ServedVectorConfig as ServedVectorConfig
    from trl_safety.config.signed_vector import SignedVectorConfig as SignedVectorConfig
    from trl_safety.config.subspace import SubspaceConfig as SubspaceConfig
    from trl_safety.corrections.alignment_vector import AlignmentVectorCallback as AlignmentVectorCallback
    from trl_safety.corrections.alignment_vector import apply_alignment_vector as apply_alignment_vector
    from trl_safety.corrections.base import Correction as Correction
    from trl_safety.corrections.buffer_reinforce import merge_reinforce as merge_reinforce
    from trl_safety.corrections.callback import CorrectionCallback as CorrectionCallback
    from trl_safety.corrections.csulora import CSULoRACallback as CSULoRACallback
    from trl_safety.corrections.csulora import apply_csulora as apply_csulora
    from trl_safety.corrections.registry import correct as correct
    from trl_safety.corrections.safe_lora import SafeLoRACallback as SafeLoRACallback
    from trl_safety.corrections.safe_lora import apply_safe_lora as apply_safe_lora
    from trl_safety.errors import AdapterError as AdapterError
    from trl_safety.errors import CheckpointError as CheckpointError
    from trl_safety.errors import ConfigurationError as ConfigurationError
    from trl_safety.errors import ReportError as ReportError
    from trl_safety.errors import SafetyError as SafetyError
    from trl_safety.errors import SubspaceError as SubspaceError
    from trl_safety.evaluation.evaluate import evaluate as evaluate
    from trl_safety.evaluation.loading import load_model as load_model
    from trl_safety.evaluation.sweep import sweep as sweep
    from trl_safety.inspection.layers import inspect_adapter as inspect_adapter
    from trl_safety.reports.report import SafetyReport as SafetyReport
    from trl_safety.reports.report import read_report as read_report
    from trl_safety.reports.report import verify as verify
    from trl_safety.scoring import Judge as Judge
    from trl_safety.scoring import Prompt as Prompt
    from trl_safety.subspace.artifact import AlignmentSubspace as AlignmentSubspace
    from trl_safety.subspace.build import build_subspace as build_subspace
    from trl_safety.training.asft import asft_penalty as asft_penalty
    from trl_safety.training.dpo import SafeDPOConfig as SafeDPOConfig
    from trl_safety.training.dpo import SafeDPOTrainer as SafeDPOTrainer
    from trl_safety.training.grpo import SafeGRPOConfig as SafeGRPOConfig
    from trl_safety.training.grpo import SafeGRPOTrainer as SafeGRPOTrainer
    from trl_safety.training.kto import SafeKTOConfig as SafeKTOConfig
    from trl_safety.training.kto import SafeKTOTrainer as SafeKTOTrainer
    from trl_safety.training.method import TrainingMethod as TrainingMethod
    from trl_safety.training.mixin import SafetyMixin as SafetyMixin
    from trl_safety.training.safety_eval import SafetyEvalCallback as SafetyEvalCallback
    from trl_safety.training.trainer import BufferTrainer as BufferTrainer
    from trl_safety.training.trainer import ReinforceTrainer as ReinforceTrainer
    from trl_safety.training.trainer import SafeSFTConfig as SafeSFTConfig
    from trl_safety.training.trainer import SafeSFTTrainer as SafeSFTTrainer

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
