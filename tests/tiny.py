"""A tiny training set and trainer for the pairs in `tests/data`."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

DATA = Path(__file__).parent / "data"
TARGETS = ["q_proj", "v_proj", "down_proj"]
LABELLED_LENGTHS = (1, 2, 3, 5)
WELL_CONDITIONED = {"adam_epsilon": 1e-3}
"""For runs that are compared: Adam's own ε turns the rounding of gradients near zero into whole steps."""


def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(61))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def rows(count: int, seed: int = 0) -> Dataset:
    """Prompts with completions of different lengths, so that a mean over tokens differs from a mean over rows."""
    rng = random.Random(seed)

    def text(length: int) -> str:
        return " ".join(f"w{rng.randrange(40)}" for _ in range(length))

    return Dataset.from_list([{"prompt": text(3) + " ", "completion": text(LABELLED_LENGTHS[i % 4])} for i in range(count)])


def model(name: str = "gqa-aligned", **kwargs: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(DATA / name, **kwargs)


def wide(folder: Path, seed: int = 0) -> str:
    """A model whose rows are whole blocks of 64, saved with a tokenizer: on a CPU bitsandbytes is wrong for other rows."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def lora(**kwargs: Any) -> LoraConfig:
    """LoRA with a non-zero initial update, so that penalties have gradients from the first step on."""
    options = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM", "init_lora_weights": False}
    return LoraConfig(**{**options, **kwargs})


OPTIONS: dict[str, Any] = {
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "bf16": False,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
    "seed": 3,
    "use_cpu": True,
    "dataloader_pin_memory": False,
}
"""What every tiny training has, whatever its kind."""


def arguments(output: Path, cls: Any = None, **kwargs: Any) -> Any:
    from trl_safety import SafeSFTConfig

    own = {"output_dir": str(output), "per_device_train_batch_size": 8, "max_steps": 4, "max_length": 16, "shuffle_dataset": False}
    return (cls or SafeSFTConfig)(**{**OPTIONS, **own, **kwargs})


def trainer(
    output: Path,
    *,
    cls: Any = None,
    base: Any = None,
    data: Dataset | None = None,
    peft_config: Any = "lora",
    args: Any = None,
    **kwargs: Any,
) -> Any:
    """A trainer on 32 rows; keyword arguments that are not trainer arguments go to `arguments`."""
    from trl_safety import SafeSFTTrainer

    own = {
        key: kwargs.pop(key)
        for key in ("safety", "subspace", "reference_dataset", "callbacks", "eval_dataset", "quantization_config", "compute_loss_func")
        if key in kwargs
    }
    torch.manual_seed(0)
    return (cls or SafeSFTTrainer)(
        model=base if base is not None else model(),
        args=args or arguments(output, **kwargs),
        train_dataset=data if data is not None else rows(32),
        processing_class=tokenizer(),
        peft_config=lora() if peft_config == "lora" else peft_config,
        **own,
    )


def factors(model: Any) -> dict[str, torch.Tensor]:
    """The model's LoRA factors, copied."""
    return {name: value.detach().clone() for name, value in model.state_dict().items() if "lora_" in name}


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Largest absolute difference, relative to the largest entry."""
    assert one.keys() == other.keys()
    return max(((one[key] - other[key]).abs().max() / other[key].abs().max().clamp(min=1e-30)).item() for key in one)


def identical(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def rewrite_json(path: Path, **changes: Any) -> None:
    """Change some keys of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
