"""A tiny trainer of each of TRL's kinds that a block can be given to, with its data."""

from __future__ import annotations

import random
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

import trl_safety
from tests import tiny

KINDS = ("dpo", "kto", "grpo")
SGD = {"optim": "sgd", "learning_rate": 0.5, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
"""So that the size of a gradient matters."""

SPREADS: dict[str, dict[str, Any]] = {"kto": {"loss_type": "apo_zero_unpaired"}, "grpo": {"generation_kwargs": {"do_sample": False}}}
"""With which a run does not depend on how its batch is spread: KTO's own loss has an estimate over the batch, and every process draws its
completions by random numbers of its own."""


def rows(kind: str, count: int = 32, seed: int = 0) -> Dataset:
    """Prompts of one length, with what the kind is trained on."""
    rng = random.Random(seed)

    def text(length: int) -> str:
        return " ".join(f"w{rng.randrange(40)}" for _ in range(length))

    def answers(index: int) -> dict[str, Any]:
        if kind == "dpo":
            return {"chosen": " " + text(1 + index % 3), "rejected": " " + text(2)}
        return {"completion": " " + text(1 + index % 3), "label": index % 2 == 0} if kind == "kto" else {}

    return Dataset.from_list([{"prompt": text(3), **answers(index)} for index in range(count)])


def reward(completions: list[str], **kwargs: Any) -> list[float]:
    """How many different words a completion has, which differs from one to the next."""
    return [float(len(set(completion.split()))) for completion in completions]


def classes(kind: str, *, safe: bool = True) -> tuple[Any, Any]:
    """Trainer and configuration, ours or TRL's."""
    home: Any = trl_safety if safe else import_module("trl")
    name = f"{'Safe' if safe else ''}{kind.upper()}"
    return getattr(home, f"{name}Trainer"), getattr(home, f"{name}Config")


def arguments(kind: str, output: Path, *, safe: bool = True, **kwargs: Any) -> Any:
    own: dict[str, Any] = {"output_dir": str(output), "per_device_train_batch_size": 4, "max_steps": 3}
    if kind == "grpo":
        own |= {"num_generations": 2, "max_completion_length": 6, "beta": 0.1, "shuffle_dataset": False}
    else:
        own["train_sampling_strategy"] = "sequential"
    return classes(kind, safe=safe)[1](**{**tiny.OPTIONS, **own, **kwargs})


def trainer(kind: str, output: Path, *, safe: bool = True, base: Any = None, peft_config: Any = "lora", **kwargs: Any) -> Any:
    """A trainer on 32 rows; keyword arguments that are not the trainer's go to `arguments`."""
    names = ("safety", "subspace", "args", "callbacks", "eval_dataset", "ref_model", "train_dataset", "reward_funcs")
    own = {name: kwargs.pop(name) for name in names if name in kwargs}
    if kind == "grpo":
        own.setdefault("reward_funcs", reward)
    torch.manual_seed(0)
    own.setdefault("args", None)
    own["args"] = own["args"] or arguments(kind, output, safe=safe, **kwargs)
    own.setdefault("train_dataset", rows(kind))
    return classes(kind, safe=safe)[0](
        model=base if base is not None else tiny.model(),
        processing_class=tiny.tokenizer(),
        peft_config=tiny.lora() if peft_config == "lora" else peft_config,
        **own,
    )


def trained(kind: str, output: Path, **kwargs: Any) -> dict[str, torch.Tensor]:
    made = trainer(kind, output, **kwargs)
    made.train()
    return tiny.factors(made.model)
