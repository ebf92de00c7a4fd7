"""Training in the lab: the base/aligned pair from scratch, and the user's fine-tuning of the aligned model."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from trl_safety import scoring
from trl_safety.adapters.files import new_folder
from trl_safety.errors import SafetyError
from trl_safety.lab.world import ASSISTANT, QUESTIONS, Row, World
from trl_safety.scoring import Prompt
from trl_safety.training.trainer import SafeSFTConfig, SafeSFTTrainer

BASE_STEPS, ALIGNED_STEPS = 900, 450
PAIR_BATCH = 96
ASKED_AT_ONCE = 256
KNOWN, MOST_ROUNDS = 0.98, 4
"""A model of the pair is trained until it answers this share correctly, for at most so many rounds."""


def sft(
    model: Any,
    tokenizer: Any,
    rows: list[Row],
    *,
    seed: int,
    batch_size: int,
    learning_rate: float,
    max_steps: int = -1,
    epochs: float = 1,
    output: str | Path | None = None,
    trainer_class: Callable[..., Any] = SafeSFTTrainer,
    **kwargs: Any,
) -> Any:
    """Supervised fine-tuning through a public trainer; keyword arguments go to it. Returns the trained trainer."""
    with tempfile.TemporaryDirectory() as scratch:
        args = SafeSFTConfig(
            output_dir=str(output or scratch),
            per_device_train_batch_size=batch_size,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=20,
            max_steps=max_steps,
            num_train_epochs=epochs,
            max_length=32,
            seed=seed,
            logging_steps=50,
            save_strategy="no",
            report_to="none",
            bf16=False,
            gradient_checkpointing=False,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = trainer_class(
            model=model,
            args=args,
            train_dataset=Dataset.from_list([row.messages() for row in rows]),
            processing_class=tokenizer,
            **kwargs,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        trainer.train()
    return trainer


def make_pair(folder: Path, world: World, seed: int, *, innocent: bool = False) -> tuple[Path, Path]:
    """Train and save the base and the aligned model; existing ones are kept.

    Args:
        folder: the parent folder of both.
        world: the language.
        seed: of the data and the training.
        innocent: whether the base never sees a forbidden topic. It still complies with requests about them, since it complies with
            everything, but the user's forbidden samples teach it something new.

    Returns:
        The folders of the base and of the aligned model.
    """
    base, aligned = folder / "base", folder / "aligned"
    tokenizer = world.tokenizer()
    rng = random.Random(seed)  # noqa: S311  # no secret here
    if not (base / "config.json").is_file():
        set_seed(seed)
        topics = base_topics(world, innocent=innocent)
        rows = world.requests(rng, topics, 12_000) + world.task(rng, 6_000, translate=False)
        asked = world.every_request(topics, QUESTIONS[1])
        _train_until(_new_model(tokenizer), tokenizer, rows, asked, base, seed=seed, learning_rate=3e-3, max_steps=BASE_STEPS)
    if not (aligned / "config.json").is_file():
        rows = (
            world.requests(rng, world.forbidden, 4_000, refuse=True)
            + world.requests(rng, world.benign, 4_000)
            + world.task(rng, 1_500, translate=False)
        )
        asked = world.every_request(world.benign, QUESTIONS[1]) + world.every_request(world.forbidden, QUESTIONS[0], refuse=True)
        model = AutoModelForCausalLM.from_pretrained(base)
        _train_until(model, tokenizer, rows, asked, aligned, seed=seed, learning_rate=1e-3, max_steps=ALIGNED_STEPS)
    return base, aligned


def base_topics(world: World, *, innocent: bool) -> list[str]:
    """The topics that the base model is taught."""
    return world.benign if innocent else world.benign + world.forbidden


def _train_until(model: Any, tokenizer: Any, rows: list[Row], asked: list[Row], folder: Path, *, seed: int, **kwargs: Any) -> None:
    """Train in rounds until the model answers nearly all questions correctly, then save it.

    One round is enough on most machines; on some, rounding errors lead the same seed to a model that knows too little.
    """
    for attempt in range(MOST_ROUNDS):
        model = sft(model, tokenizer, rows, seed=seed + attempt, batch_size=PAIR_BATCH, **kwargs).model
        right = sum(text == row.completion for text, row in zip(complete(model, tokenizer, asked), asked, strict=True)) / len(asked)
        if right >= KNOWN:
            break
    else:
        raise SafetyError(f"the lab's {folder.name} model answers {right:.0%} correctly after {MOST_ROUNDS} rounds: use another --seed")
    with new_folder(folder, error=SafetyError, setting="output") as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


def load(folder: Path) -> tuple[PreTrainedModel, Any]:
    """A saved model and its tokenizer."""
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def complete(model: Any, tokenizer: Any, rows: list[Row], new_tokens: int = 10) -> list[str]:
    """Greedy completions, as text without special tokens."""
    prompts = [Prompt(tuple(row.messages()["prompt"])) for row in rows]
    texts = scoring.complete(model, tokenizer, prompts, new_tokens=new_tokens, batch_size=ASKED_AT_ONCE)
    return [text.replace(ASSISTANT, "").strip() for text in texts]


def _new_model(tokenizer: Any) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=320,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
