"""SBR in training: the prompts, their states before fine-tuning, and the term that holds them there."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from trl_safety.adapters.lora import unwrap
from trl_safety.config.block import SafetyConfig
from trl_safety.config.sbr import SbrConfig
from trl_safety.errors import ConfigurationError
from trl_safety.messages import Messages, ShapeError, conversation, texts_of
from trl_safety.methods import sbr
from trl_safety.rendering import chat_template, render, text_tokenizer, token_ids
from trl_safety.scoring import KeywordJudge, Prompt, complete
from trl_safety.training.data import load_rows
from trl_safety.training.loss_term import LossTerm
from trl_safety.training.method import Context

logger = logging.getLogger(__name__)

ASKED_TOKENS = 32


class Sbr(LossTerm):
    """λ · mean_k mean_d (h_θ(x_k) − h_0(x_k))², with h the last layer's state at the last prompt token, once per optimizer step.

    h_0 is computed before the first step, without the adapter and without dropout; h_θ is computed in training mode. The prompts are
    padded on the right whatever the tokenizer's padding side, every process has all of them, and no logits are computed.

    Raises:
        ConfigurationError: there are too few prompts, an empty one, one that is longer than the model takes, or no tokenizer.
    """

    name = "sbr"
    action = "held"
    covers_past = True
    config: SbrConfig

    def __init__(self, config: SbrConfig, context: Context) -> None:
        super().__init__(config, context)
        trainer = context.trainer
        self._tokenizer = trainer.processing_class
        if self._tokenizer is None or not callable(self._tokenizer):
            raise ConfigurationError("sbr: the trainer has no tokenizer (processing_class), which reads the prompts; give one")
        self._prompts = read_prompts(config)
        self._ids = [_tokens(prompt, self._tokenizer) for prompt in self._prompts]
        self._check(unwrap(trainer.model))
        self._reference: Tensor | None = None
        self.distances: tuple[float, float] | None = None
        """At the start of the run, and at the last measurement."""

    @classmethod
    def ready(cls, config: SbrConfig, block: SafetyConfig, trainer: Any, references: Any) -> None:
        """See `TrainingMethod.ready`.

        Raises:
            ConfigurationError: gradients of several processes would not be averaged.
        """
        selecting = next((name for name, options in block.methods().items() if options.stage == "selection"), None)
        if selecting and trainer.accelerator.num_processes > 1:
            raise ConfigurationError(
                f"sbr beside {selecting} on {trainer.accelerator.num_processes} processes: {selecting} averages only its own gradients, and the states' differ "
                "with every process's dropout; use one process, or one of the two"
            )

    def _check(self, model: Any) -> None:
        empty = next((i for i, ids in enumerate(self._ids) if not ids), None)
        if empty is not None:
            raise ConfigurationError(f"sbr.prompts: number {empty + 1} is empty; remove it")
        config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
        most = getattr(config, "max_position_embeddings", None)
        longest = max(range(len(self._ids)), key=lambda i: len(self._ids[i]))
        if most is not None and len(self._ids[longest]) > most:
            raise ConfigurationError(
                f"sbr.prompts: number {longest + 1} has {len(self._ids[longest])} tokens, but the model takes {most}; shorten or remove it"
            )

    # The states.

    def _states(self) -> Tensor:
        """The model's current states, (K, d), float32."""
        trainer = self.context.trainer
        model: Any = unwrap(trainer.model)
        causal = model.get_base_model() if hasattr(model, "get_base_model") else model
        device = next(model.parameters()).device
        lengths = torch.tensor([len(ids) for ids in self._ids])
        width = int(lengths.max())
        ids = torch.tensor([row + [row[-1]] * (width - len(row)) for row in self._ids], device=device)
        mask = (torch.arange(width) < lengths.unsqueeze(1)).long().to(device)
        with trainer.compute_loss_context_manager():
            # Without the head, whose logits are not needed.
            output = causal.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
        hidden = getattr(output, "last_hidden_state", None)
        if hidden is None:
            raise ConfigurationError(
                f"sbr: {type(causal.base_model).__name__} returns no last hidden state, which sbr bounds; use another method, or a model class that does"
            )
        return sbr.last_states(hidden, lengths)

    @torch.no_grad()
    def _still(self) -> Tensor:
        """The states without dropout; the model's mode is restored."""
        model: Any = unwrap(self.context.trainer.model)
        training = model.training
        model.eval()
        try:
            return self._states()
        finally:
            model.train(training)

    def term(self) -> Tensor:
        """See `LossTerm.term`."""
        assert self._reference is not None  # noqa: S101  # set when training began
        states = self._states()
        with torch.autocast(states.device.type, enabled=False):
            return sbr.distance(states, self._reference)

    def share(self, steps: int) -> float:
        """The whole term with the last accumulated micro-batch, since the weights are the same in all of them."""
        return 1.0 if self.context.trainer.accelerator.sync_gradients else 0.0

    # The run.

    def begin(self, checkpoint: Path | None) -> None:
        """Compute h_0 without the adapter, before a buffer changes the weights; a resumed run gets the same."""
        super().begin(checkpoint)
        trainer = self.context.trainer
        model: Any = unwrap(trainer.model)
        if not hasattr(model, "disable_adapter"):
            raise ConfigurationError(
                f"{type(model).__name__} has no disable_adapter, which sbr needs to compute its reference states: give the trainer a PeftModel or peft_config"
            )
        with model.disable_adapter():
            self._reference = self._still()
            answers = self._answers(model) if self.config.ask_first else []
        if trainer.state.is_world_process_zero:
            self._warn(answers)
        now = self._measure()
        self.distances = (now, now)

    def _answers(self, model: Any) -> list[str]:
        prompts = [Prompt(prompt) for prompt in self._prompts]
        return complete(model, self._tokenizer, prompts, new_tokens=ASKED_TOKENS, batch_size=len(prompts))

    def _warn(self, answers: Sequence[str]) -> None:
        judge = KeywordJudge()
        verdicts = judge.verdicts([Prompt(_short(prompt)) for prompt in self._prompts], list(answers)) if answers else []
        for prompt, verdict in zip(self._prompts, verdicts, strict=False):
            if verdict == "complied":
                logger.warning("sbr.prompts: the starting model does not refuse %r, so holding its state keeps no refusal", _short(prompt))
        data = self.context.trainer.train_dataset
        # TRL's DPO and KTO keep prompts and answers apart.
        column = next((name for name in ("input_ids", "prompt_ids") if isinstance(data, Dataset) and name in data.column_names), None)
        if column is not None:
            wanted = {tuple(ids): prompt for ids, prompt in zip(self._ids, self._prompts, strict=True)}
            found: set[int] = set()
            for row in data.select_columns(column):
                for place, ids in enumerate(wanted):
                    if place not in found and tuple(row[column][: len(ids)]) == ids:
                        found.add(place)
                        logger.warning(
                            "sbr.prompts: %r is also a prompt of the training data; sbr works against learning its answer",
                            _short(wanted[ids]),
                        )

    def _measure(self) -> float:
        assert self._reference is not None  # noqa: S101
        distance = float(sbr.distance(self._still(), self._reference))
        if self.distances is not None:
            self.distances = (self.distances[0], distance)
        return distance

    def before_save(self) -> None:
        """Measure the distance for the report that is saved next."""
        self._measure()

    def metrics(self) -> dict[str, float]:
        """The distance without dropout and without its weight."""
        return {"sbr": self._measure()} if self._reference is not None else {}

    # The report.

    @property
    def idle(self) -> str | None:
        """With a weight of 0 the distance is only measured."""
        return "weight 0: the distance was measured, nothing was protected" if self.config.weight == 0 else None

    @property
    def settings(self) -> dict[str, Any]:
        """The prompts stay out of the report, which may be published; it has their number and a digest of their tokens."""
        settings = super().settings
        where = settings["prompts"] if isinstance(settings["prompts"], str) else f"{len(self._prompts)} given"
        return {**settings, "prompts": where, "prompts_sha256": hashlib.sha256(json.dumps(self._ids).encode()).hexdigest()[:16]}

    def describe(self, first: int, last: int) -> str:
        """See `TrainingMethod.describe`."""
        start, end = self.distances or (float("nan"), float("nan"))
        return (
            f"the states of {len(self._prompts)} prompts held with weight {self.config.weight:g} in optimizer steps {first} to {last}; their mean squared "
            f"distance from the model without the adapter was {start:.3g} at the start and {end:.3g} at the end"
        )


def read_prompts(config: SbrConfig) -> list[Messages]:
    """The first K prompts as messages; a text becomes one user message.

    Raises:
        ConfigurationError: there are fewer, the column is missing, or a row holds no prompt.
    """
    rows: list[dict[str, Any]]
    if isinstance(config.prompts, list):
        rows = [{"prompt": prompt} for prompt in config.prompts]
        if config.column is not None:
            raise ConfigurationError(f"sbr.column = {config.column!r}: is used only with a file or a data set; remove it")
    else:
        data = load_rows(config.prompts, "sbr.prompts")
        if config.column is not None and config.column not in data.column_names:
            raise ConfigurationError(
                f"sbr.column = {config.column!r}: the prompts in {config.prompts!r} have the columns {', '.join(data.column_names)}; name the one to use"
            )
        if "completion" in data.column_names:
            logger.warning("sbr.prompts: the column completion is ignored: only the prompts are used")
        rows = list(data.select(range(min(config.number, len(data)))))
        if config.column is not None:
            rows = [{"prompt": row[config.column]} for row in rows]
    if len(rows) < config.number:
        raise ConfigurationError(f"sbr.number = {config.number}: there are only {len(rows)} prompts; give more, or use a smaller number")
    return [_prompt(row, place) for place, row in enumerate(rows[: config.number], 1)]


def _prompt(row: dict[str, Any], place: int) -> Messages:
    """A row's prompt, without its answer."""
    try:
        asked, _ = conversation(row)
        messages = ({"role": "user", "content": asked},) if isinstance(asked, str) else asked
        empty = not any(text.strip() for text in texts_of(messages))
    except ShapeError as error:
        raise ConfigurationError(f"sbr.prompts: number {place}: {error}; give prompt, messages, or name the column") from error
    if empty:
        raise ConfigurationError(f"sbr.prompts: number {place} is empty; remove it")
    return messages


def _tokens(prompt: Messages, tokenizer: Any) -> list[int]:
    """A prompt's tokens up to where the answer would begin, rendered by the chat template if there is one."""
    rendered = render(prompt, tokenizer)
    return token_ids(rendered, tokenizer) if chat_template(tokenizer) else list(text_tokenizer(tokenizer)(rendered)["input_ids"])


def _short(prompt: Messages) -> str:
    text = texts_of(prompt)[-1]
    return text if len(text) <= 60 else text[:57] + "…"
