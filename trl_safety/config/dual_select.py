"""The options of DualSelect."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from trl_safety.config.method import MethodOptions, Stage
from trl_safety.config.requirements import (
    HOOKS_BESIDE_COMPILATION,
    HOOKS_BESIDE_FUSED_KERNELS,
    PLUGIN_TRAINER,
    SHOWN,
    UNSLOTH,
    Requirement,
    is_true,
    one_of,
    revised,
)
from trl_safety.errors import AdapterError

_NO_SAMPLES = "per-sample gradients cannot be separated"
_REQUIREMENTS = (
    revised(HOOKS_BESIDE_FUSED_KERNELS, reason="fused kernels bypass the modules where per-sample gradients are read"),
    revised(HOOKS_BESIDE_COMPILATION, reason=f"{_NO_SAMPLES}: a compiled model bypasses the hooks that read them"),
    revised(UNSLOTH, reason=f"{_NO_SAMPLES}: Unsloth's kernels bypass the modules in which they are read"),
    PLUGIN_TRAINER,
    Requirement(
        "objective",
        lambda value, options: value != "sft",
        "any but supervised fine-tuning",
        "it chooses samples by the loss and the gradient of their own answer, which neither a pair nor a generated completion has",
        {"axolotl": "remove rl", "any": "use SafeSFTTrainer"},
    ),
    Requirement("precision", one_of("fp16"), "fp16", "it works only in float32 and bfloat16", {"any": "use bf16"}),
    Requirement(
        "rows",
        one_of("cut", "mixed"),
        "packed so that samples are cut anywhere (TRL's wrapped) or attend to each other",
        "a sample that is cut anywhere, or attends to others in its row, has no gradient of its own",
        {
            "trl": "set packing_strategy='bfd' or 'bfd_split', or packing=False",
            "axolotl": "set attn_implementation: flash_attention_2, flex_attention, sdpa or eager, or sample_packing: false",
        },
    ),
    Requirement(
        "engine",
        one_of("fsdp2"),
        "FSDP",
        "it reads and adds gradients of whole LoRA factors, which FSDP shards over the processes",
        {"any": "use DDP, or DeepSpeed's ZeRO stage 1 or 2"},
    ),
    Requirement(
        "streamed",
        is_true,
        "streamed",
        "rows of a stream have no index and cannot be read again",
        {"any": "load the data without streaming"},
    ),
    Requirement(
        "trained_besides",
        is_true,
        "set",
        "their gradients would be missing from the per-sample gradients",
        {"axolotl": "remove lora_modules_to_save and unfrozen_parameters", "any": "remove modules_to_save, bias and lora_bias"},
        error=AdapterError,
    ),
    Requirement(
        "batch_varies",
        is_true,
        "auto_find_batch_size",
        "it selects within a batch, whose size would change",
        {"any": "set auto_find_batch_size=False and choose a per_device_train_batch_size"},
    ),
    Requirement("label_smoothing", is_true, "above 0", "samples are scored by their plain loss", {"any": "set it to 0"}),
    Requirement("images", is_true, "images", "it has not been shown to work with images", {"any": "use text"}),
    Requirement(
        "replicated",
        is_true,
        "several GPUs in one process",
        "DataParallel replicates the adapter's modules",
        {"any": "start one process per GPU (accelerate launch)"},
    ),
    Requirement(
        "batch",
        lambda batch, options: batch < 2,
        "one sample, nothing accumulated",
        "it selects within a batch, or within an optimizer step if a batch is one sample",
        {"any": "use a per_device_train_batch_size (micro_batch_size) or gradient_accumulation_steps of at least 2"},
    ),
    Requirement(
        "batch",
        lambda batch, options: batch >= 2 and options.keep is not None and options.keep >= batch,
        "at most keep",
        "every sample of {value} would be kept, so nothing would be selected",
        {
            "any": "use a smaller keep, keep_tokens, or a larger per_device_train_batch_size (micro_batch_size; if that is 1, gradient_accumulation_steps)"
        },
        setting=lambda options: f"keep = {options.keep}",
    ),
)


class DualSelectConfig(MethodOptions):
    """DualSelect (arXiv 2606.09866): select references and samples by their gradients, and add the reference gradient as a correction."""

    hook: ClassVar[str] = "trl_safety.training.dual_select.method:DualSelect"
    source: ClassVar[str] = "DualSelect, arXiv 2606.09866"
    stage: ClassVar[Stage] = "selection"
    needs: ClassVar[str] = "a pool of safe references"
    curves: ClassVar[Mapping[str, str]] = {
        "kept_share": "share of samples that DualSelect kept",
        "conflict": "share of samples whose gradient opposes the safety references'",
    }
    shown: ClassVar[Mapping[str, str]] = SHOWN
    costs: ClassVar[str] = "a few per cent of a step, and one pass over the pool per epoch"
    whole_model: ClassVar[str | None] = "steers the whole update"
    reads_references: ClassVar[str | None] = "reference_dataset"
    requirements: ClassVar[tuple[Requirement, ...]] = _REQUIREMENTS

    reference_dataset: str | dict[str, Any] | None = None
    """The pool of safety references: a local file (.jsonl, .json, .csv, .parquet), a dataset folder or a Hub id; in Axolotl also an
    entry as under `datasets`. For rows with a prompt and no answer, a KL term keeps the model close to the starting model."""
    warmup_steps: Annotated[int, Field(ge=1)] = 10
    """n₀: plain optimizer steps before the first refresh; their gradients are the first task direction."""
    refresh_steps: Annotated[int, Field(ge=1)] | None = None
    """Score the pool again after this many optimizer steps; null: after the warm-up and then once per epoch."""
    selection: Literal["hard", "soft"] = "hard"
    """'hard' keeps samples with weight 1, 'soft' weights them by softmin(score / T)."""
    keep: Annotated[int, Field(ge=1)] | None = None
    """K: samples to keep from each per-device batch, or, if that is one sample, from those that a process accumulates for an optimizer step.
    Default 4. From a batch that is not full, the same share. In packed rows it counts documents, of which a batch holds any number:
    `keep_tokens` suits them better."""
    keep_tokens: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Instead of `keep`: the largest share of each batch's supervised tokens to keep (the paper: 0.9)."""
    references: Annotated[int, Field(ge=1)] | None = None
    """K_ref: references chosen at each refresh. Default 32."""
    reference_share: Annotated[float, Field(gt=0, le=1)] | None = None
    """Instead of `references`: a share of the pool, rounded up (the paper: 0.1)."""
    rho: Annotated[float, Field(ge=0)] = 0.2
    """ρ: weight of the reference gradient in each update. 0 only selects samples, without a correction."""
    mu_task: Annotated[float, Field(ge=0)] = 1.0
    """μ: weight of the loss in the samples' scores."""
    mu_reference: Annotated[float, Field(ge=0)] = 1.0
    """μ: weight of the loss in the references' scores."""
    nu: Annotated[float, Field(ge=0)] = 1.0
    """ν: weight of the gradient conflict in both scores."""
    task_temperature: Annotated[float, Field(gt=0)] = 0.1
    """T: temperature of the samples' soft weights."""
    reference_temperature: Annotated[float, Field(gt=0)] = 0.1
    """T: temperature of the references' soft weights."""
    reference_gradient: Literal["cached", "fresh"] = "cached"
    """'cached': the mean gradient at the last refresh (authors). 'fresh': the gradient of a batch of the chosen references in every step."""

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        data = dict(data)
        if data.get("keep") is None and data.get("keep_tokens") is None:
            data["keep"] = 4
        if data.get("references") is None and data.get("reference_share") is None:
            data["references"] = 32
        return data

    @model_validator(mode="after")
    def _one_of_each(self) -> DualSelectConfig:
        if (self.keep is None) == (self.keep_tokens is None):
            raise ValueError("give either keep (e.g. 4) or keep_tokens (e.g. 0.9), not both")
        if (self.references is None) == (self.reference_share is None):
            raise ValueError("give either references (e.g. 32) or reference_share (e.g. 0.1), not both")
        if self.selection == "hard" and (unused := [n for n in ("task_temperature", "reference_temperature") if getattr(self, n) != 0.1]):
            raise ValueError(
                f"{unused[0]} = {getattr(self, unused[0]):g} is used only with selection: soft: remove it, or set selection: soft"
            )
        if self.reference_gradient == "fresh" and self.rho == 0:
            raise ValueError(
                "reference_gradient = 'fresh' is not used with rho = 0, which adds no reference gradient: remove one of the two"
            )
        if self.nu == 0 and self.rho == 0:
            raise ValueError("nu = 0 and rho = 0: the references would be neither compared with the samples nor added to the update")
        return self
