"""The facts of an Axolotl configuration that the methods' requirements check.

`python -m axolotl_plugin.rules` prints Axolotl's table of docs/compatibility.md from the same requirements.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from trl_safety.config.block import METHODS, SafetyConfig, options_class
from trl_safety.config.requirements import Fact, Facts, Requirement, cell, requirements_of, resolve

PARALLEL = ("context_parallel_size", "tensor_parallel_size", "sequence_parallel_degree", "expert_parallel_size")
KERNELS = ("lora_qkv_kernel", "lora_o_kernel", "lora_mlp_kernel")
BESIDES = ("lora_modules_to_save", "unfrozen_parameters")
PLAIN = ("true", "false", "gaussian", "eva", "orthogonal")
"""`peft_init_lora_weights` that leave the base weights as they are."""

KEYS: Mapping[str, tuple[str, ...]] = {
    "adapter": ("adapter",),
    "dora": ("peft_use_dora",),
    "initialisation": ("peft_init_lora_weights", "peft.loftq_config"),
    "expert_parameters": ("lora_target_parameters",),
    "restarts": ("relora", "relora_steps", "jagged_restart_steps"),
    "objective": ("rl", "reward_model", "process_reward_model"),
    "reference": ("precompute_ref_log_probs", "rl_adapter_ref_model"),
    "engine": ("fsdp", "fsdp_config", "fsdp_version", "deepspeed"),
    "split_model": PARALLEL,
    "trainer_class": ("trainer_cls",),
    "fused_kernels": KERNELS,
    "base_weights": ("load_in_8bit", "load_in_4bit"),
    "rows": ("sample_packing", "batch_flattening", "attn_implementation"),
    "compiled": ("torch_compile",),
    "precision": ("fp16",),
    "streamed": ("streaming", "pretraining_dataset"),
    "batch": ("micro_batch_size", "gradient_accumulation_steps"),
    "trained_besides": BESIDES,
    "pickled": ("save_safetensors",),
}
"""Fact → the keys that decide it, which the table names."""


def axolotl_facts(cfg: Any, written: Collection[str] | None = None) -> Facts:
    """The facts of an Axolotl configuration, before or after Axolotl validates it.

    Args:
        cfg: a mapping.
        written: the keys that the user wrote; by default all of them.
    """
    get = cfg.get
    initial = str(get("peft_init_lora_weights") if get("peft_init_lora_weights") is not None else True).lower()
    values: dict[str, Any] = {
        "adapter": get("adapter") or "none",
        "dora": bool(get("peft_use_dora")),
        "initialisation": initial not in PLAIN or bool((get("peft") or {}).get("loftq_config")),
        "expert_parameters": bool(get("lora_target_parameters")),
        "restarts": any(get(key) for key in KEYS["restarts"]),
        "objective": _objective(cfg),
        "reference": _reference(cfg),
        "engine": _engine(cfg),
        "split_model": any(int(get(key) or 1) > 1 for key in PARALLEL),
        "trainer_class": bool(get("trainer_cls")),
        "fused_kernels": any(get(key) for key in KERNELS),
        "base_weights": "8bit" if get("load_in_8bit") else "4bit" if get("load_in_4bit") or get("adapter") == "qlora" else None,
        "rows": _rows(cfg),
        "compiled": get("torch_compile") is True,
        "precision": "fp16" if get("fp16") is True else "other",
        "streamed": bool(get("streaming") or get("pretraining_dataset")),
        "batch": _batch(cfg),
        "trained_besides": any(get(key) for key in BESIDES),
        "pickled": get("save_safetensors") is False,
    }
    return Facts("axolotl", {fact: Fact(value, *_told(cfg, fact, written)) for fact, value in values.items()})


def _rows(cfg: Any) -> str:
    if cfg.get("sample_packing"):
        # Axolotl's validation derives it, but does not know every build of flash attention: the first step tests those.
        known = "flash" not in str(cfg.get("attn_implementation"))
        return "mixed" if cfg.get("attn_decontaminates_packing") is False and known else "packed"
    return "padding_free" if cfg.get("batch_flattening") else "plain"


def _batch(cfg: Any) -> int | None:
    if cfg.get("sample_packing") or not cfg.get("micro_batch_size"):
        return None
    batch, accumulated = int(cfg.get("micro_batch_size")), cfg.get("gradient_accumulation_steps")
    return batch if batch > 1 or not accumulated else int(accumulated)


OBJECTIVES = {"ipo": "dpo", "simpo": "cpo", "gdpo": "grpo"}
"""Value of `rl` → the TRL trainer that it uses, if that has another name."""


def _objective(cfg: Any) -> str:
    if cfg.get("reward_model") or cfg.get("process_reward_model"):
        return "reward" if cfg.get("reward_model") else "prm"
    given = cfg.get("rl")
    name = str(getattr(given, "value", given) or "sft").lower()
    trl = cfg.get("trl") or {}
    if name in ("grpo", "gdpo") and (trl.get("async_prefetch") or trl.get("use_data_producer")):
        return "asyncgrpo"
    return OBJECTIVES.get(name, name)


def _reference(cfg: Any) -> str | None:
    if not cfg.get("rl"):
        return None
    return "precomputed" if cfg.get("precompute_ref_log_probs") else "second_model" if cfg.get("rl_adapter_ref_model") else None


def _engine(cfg: Any) -> str:
    if cfg.get("fsdp") or cfg.get("fsdp_config"):
        version = cfg.get("fsdp_version") or (cfg.get("fsdp_config") or {}).get("fsdp_version")
        return "fsdp2" if str(version) == "2" else "fsdp1"
    given = cfg.get("deepspeed")
    if not given:
        return "single"
    path = Path(str(given))
    content = json.loads(path.read_text(encoding="utf-8")) if isinstance(given, str) and path.is_file() else given
    zero3 = isinstance(content, Mapping) and int((content.get("zero_optimization") or {}).get("stage") or 0) == 3
    return "zero3" if zero3 else "deepspeed"


def _told(cfg: Any, fact: str, written: Collection[str] | None) -> tuple[str, bool, Callable[[], None] | None]:
    """The setting with its value, whether the user wrote it, and how to switch it off."""
    given = {key: cfg.get(key) for key in KEYS[fact] if cfg.get(key) is not None}
    setting = ", ".join(f"{key} = {value!r}" for key, value in given.items()) or f"{KEYS[fact][0]} is not set"
    spelt_out = written is None or any(key in written for key in given)
    return setting, spelt_out, partial(_switch_off, cfg, list(given))


def _switch_off(cfg: Any, keys: list[str]) -> None:
    for key in keys:
        cfg[key] = False


def refuse(cfg: Mapping[str, Any], safety: SafetyConfig) -> None:
    """Refuse an Axolotl configuration that keeps one of the block's methods from acting; the configuration is not changed.

    Raises:
        ConfigurationError, AdapterError: with a line for every setting: its value, the methods, the reason and the remedy.
    """
    resolve(safety.methods(), axolotl_facts(cfg), dry=True)


def check(cfg: Any, safety: SafetyConfig, written: Collection[str]) -> list[str]:
    """Like `refuse`, after Axolotl has added its own choices; switches off what changes no result, and what the user did not write.

    Returns:
        What was switched off.

    Raises:
        ConfigurationError, AdapterError: see `refuse`.
    """
    return resolve(safety.methods(), axolotl_facts(cfg, written))


def table() -> str:
    """Axolotl's table of docs/compatibility.md, in Markdown."""
    methods = {name: options_class(name) for name in METHODS}
    lines = ["| Axolotl key | | " + " | ".join(f"`{method}`" for method in methods) + " |", "|---|---|" + "---|" * len(methods)]
    rows: dict[tuple[str, str], list[Requirement]] = {}
    tests: dict[str, int] = {}
    for requirement in requirements_of(methods):
        if requirement.fact in KEYS:
            rows.setdefault((requirement.fact, requirement.meaning), []).append(requirement)
    for (fact, meaning), requirements in rows.items():
        keys = ", ".join(f"`{key}`" for key in KEYS[fact])
        reasons = "; ".join(dict.fromkeys(requirement.reason.replace(" of {value}", "") for requirement in requirements))
        cells = [cell(requirements, options) for options in methods.values()]
        for place, text in enumerate(cells):
            if text.startswith("works ("):
                number = tests.setdefault(text.removeprefix("works "), len(tests) + 1)
                cells[place] = f"works [{number}]"
        lines.append(f"| {keys}: {meaning} | {reasons} | {' | '.join(cells)} |")
    shown = [f"[{number}] shown by {test.strip('()')}" for test, number in tests.items()]
    return "\n".join([*lines, "", "; ".join(shown) + ". Where nothing has been tried the table says so."])


if __name__ == "__main__":
    print(table())  # noqa: T201
