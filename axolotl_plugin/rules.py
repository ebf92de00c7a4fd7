"""Axolotl options beside which a method could not act: refused when the configuration is validated.

`python -m axolotl_plugin.rules` prints the table of example_configs/axolotl/README.md from these rules.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl_safety.config.block import CORRECTIONS, METHODS, SafetyConfig
from trl_safety.errors import ConfigurationError


@dataclass(frozen=True)
class Rule:
    """One refused option.

    Attributes:
        key: Axolotl's key, or keys.
        meaning: what its refused values are, for the table.
        refused: whether a configuration has such a value.
        reason: why no method can act.
        remedy: the key to change.
        methods: which methods it concerns.
    """

    key: str
    meaning: str
    refused: Callable[[Mapping[str, Any]], bool]
    reason: str
    remedy: str
    methods: tuple[str, ...] = METHODS


def _on(*keys: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda cfg: any(bool(cfg.get(key)) for key in keys)


def _above_one(*keys: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda cfg: any(int(cfg.get(key) or 1) > 1 for key in keys)


def _zero3(cfg: Mapping[str, Any]) -> bool:
    given = cfg.get("deepspeed")
    path = Path(str(given))
    content = json.loads(path.read_text(encoding="utf-8")) if isinstance(given, str) and path.is_file() else given
    return isinstance(content, Mapping) and int((content.get("zero_optimization") or {}).get("stage") or 0) == 3


REFUSED = (
    Rule(
        "adapter",
        "not lora or qlora (full fine-tuning included)",
        lambda c: c.get("adapter") not in ("lora", "qlora"),
        "the methods act on an update ΔW = s·B·A",
        "set adapter: lora or qlora",
    ),
    Rule("peft_use_dora", "true", _on("peft_use_dora"), "DoRA's update is not s·B·A", "remove peft_use_dora"),
    Rule(
        "peft_init_lora_weights, loftq",
        "anything that changes the base weights (pissa, olora, loftq, …)",
        lambda c: (
            str(c.get("peft_init_lora_weights") or True).lower() not in ("true", "false", "gaussian", "eva", "orthogonal")
            or bool((c.get("peft") or {}).get("loftq_config"))
        ),
        "part of the aligned weight moves into the adapter",
        "remove peft_init_lora_weights and peft.loftq_config",
    ),
    Rule(
        "lora_target_parameters",
        "set",
        _on("lora_target_parameters"),
        "fused expert weights have no alignment subspace",
        "use lora_target_modules",
    ),
    Rule(
        "relora, jagged_restart_steps",
        "set",
        _on("relora", "relora_steps", "jagged_restart_steps"),
        "merges the adapter into the base again and again, so that ΔW is no longer what training changed",
        "remove relora and its steps",
    ),
    Rule(
        "rl, reward_model, process_reward_model",
        "set (dpo, kto, grpo, …)",
        _on("rl", "reward_model", "process_reward_model"),
        "only supervised fine-tuning has been shown to work",
        "remove rl / reward_model",
    ),
    Rule(
        "fsdp, fsdp_config",
        "set, without fsdp_version: 2",
        lambda c: _on("fsdp", "fsdp_config")(c) and str(c.get("fsdp_version") or (c.get("fsdp_config") or {}).get("fsdp_version")) != "2",
        "the first FSDP flattens the LoRA factors with other parameters, where no method can read them",
        "set fsdp_version: 2",
    ),
    Rule(
        "fsdp_version",
        "2",
        _on("fsdp", "fsdp_config"),
        "the gradients of whole LoRA factors are spread over the processes",
        "use DDP",
        ("dual_select",),
    ),
    Rule(
        "deepspeed",
        "a file with ZeRO stage 3",
        _zero3,
        "keeps every LoRA factor in pieces that only its own hooks put together",
        "use stage 2, or FSDP with fsdp_version: 2",
    ),
    Rule(
        "deepspeed",
        "set (any stage)",
        _on("deepspeed"),
        "the gradients of whole LoRA factors are spread over the processes",
        "use DDP",
        ("dual_select",),
    ),
    Rule(
        "context_parallel_size, tensor_parallel_size, sequence_parallel_degree, expert_parallel_size",
        "above 1",
        _above_one("context_parallel_size", "tensor_parallel_size", "sequence_parallel_degree", "expert_parallel_size"),
        "splits the model or the loss over processes, which has not been shown to work",
        "set it to 1 and use DDP",
    ),
    Rule(
        "trainer_cls",
        "set",
        _on("trainer_cls"),
        "the method is part of the plugin's own trainer class, which Axolotl prefers in silence",
        "remove trainer_cls",
        tuple(method for method in METHODS if method not in CORRECTIONS),
    ),
    Rule(
        "lora_qkv_kernel, lora_o_kernel, lora_mlp_kernel",
        "true (Axolotl's own default on a GPU)",
        _on("lora_qkv_kernel", "lora_o_kernel", "lora_mlp_kernel"),
        "fused kernels bypass the modules in which the samples' gradients are read and on which the buffer acts",
        "set lora_qkv_kernel, lora_o_kernel and lora_mlp_kernel: false",
        ("dual_select", "buffer_reinforce"),
    ),
    Rule(
        "load_in_8bit",
        "true",
        _on("load_in_8bit"),
        "8-bit weights cannot be exchanged and quantised again as they were",
        "use load_in_4bit, or full precision",
        ("alignment_buffer",),
    ),
    Rule(
        "sample_packing",
        "true",
        _on("sample_packing"),
        "the samples of a packed row cannot be told apart",
        "set sample_packing: false and micro_batch_size: 8",
        ("dual_select",),
    ),
    Rule(
        "torch_compile",
        "true",
        lambda c: c.get("torch_compile") is True,
        "compiled layers cannot be read, and go by the buffer",
        "remove torch_compile",
        ("dual_select", "buffer_reinforce"),
    ),
    Rule(
        "streaming, pretraining_dataset",
        "set",
        _on("streaming", "pretraining_dataset"),
        "rows of a stream have no numbers",
        "remove them and use datasets",
        ("dual_select",),
    ),
    Rule(
        "lora_modules_to_save, unfrozen_parameters",
        "set",
        _on("lora_modules_to_save", "unfrozen_parameters"),
        "their gradient is not part of the samples' gradients",
        "remove them",
        ("dual_select",),
    ),
    Rule(
        "save_safetensors",
        "false",
        lambda c: c.get("save_safetensors") is False,
        "no report covers an adapter saved as a pickle",
        "remove save_safetensors",
    ),
)

NO_DUAL_SELECT = tuple(method for method in METHODS if method != "dual_select")
WORKS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    (
        "lora_qkv_kernel, lora_o_kernel, lora_mlp_kernel",
        "they bypass the adapter's modules, on which these methods do not hook: they read the factors themselves; not run here, for want of a GPU",
        tuple(method for method in NO_DUAL_SELECT if method != "buffer_reinforce"),
    ),
    ("sample_packing, pad_to_sequence_len", "tested", NO_DUAL_SELECT),
    (
        "gradient_accumulation_steps, gradient_checkpointing",
        "tested; λ counts once per optimizer step, DualSelect chooses in every batch",
        METHODS,
    ),
    ("load_in_4bit (qlora)", "tested on CPU kernels; V comes from the full-precision pair", METHODS),
    ("several processes (DDP)", "tested with two gloo processes", METHODS),
    ("lora_modules_to_save, unfrozen_parameters", "trained, and listed in the report as covered by no method", NO_DUAL_SELECT),
)


def refuse(cfg: Mapping[str, Any], safety: SafetyConfig) -> None:
    """Refuse an Axolotl configuration beside which one of the block's methods could not act.

    Raises:
        ConfigurationError: naming the key, its value, the method, the reason and the remedy.
    """
    for rule in REFUSED:
        concerned = [method for method in safety.methods() if method in rule.methods]
        if concerned and rule.refused(cfg):
            values = (
                ", ".join(f"{key} = {cfg.get(key)!r}" for key in rule.key.split(", ") if cfg.get(key) is not None)
                or f"{rule.key} is not set"
            )
            raise ConfigurationError(f"{values}: {', '.join(concerned)} cannot act: {rule.reason}; {rule.remedy}")


def table() -> str:
    """The table of example_configs/axolotl/README.md, in Markdown."""
    lines = ["| Axolotl key | | " + " | ".join(f"`{method}`" for method in METHODS) + " |", "|---|---|" + "---|" * len(METHODS)]
    for rule in REFUSED:
        cells = " | ".join("refused" if method in rule.methods else "works" for method in METHODS)
        keys = ", ".join(f"`{key}`" for key in rule.key.split(", "))
        lines.append(f"| {keys}: {rule.meaning} | {rule.reason} | {cells} |")
    for keys, note, methods in WORKS:
        lines.append(f"| {keys} | {note} | " + " | ".join("works" if method in methods else "see above" for method in METHODS) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())  # noqa: T201
