"""`SafetyEvalCallback`: asks a small set of prompts during training, in any Transformers `Trainer`."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from trl_safety.adapters.lora import unwrap
from trl_safety.config.evaluation import SafetyEvalConfig
from trl_safety.corrections.callback import RUN_CORRECTION
from trl_safety.errors import ConfigurationError
from trl_safety.scoring import Judge, KeywordJudge, Kind, Prompt, Scores, check_prompts, read_prompts, read_sets, score

logger = logging.getLogger(__name__)


class SafetyEvalCallback(TrainerCallback):
    """Every N steps, logs the share of harmful prompts complied with and of benign prompts refused.

    The log of that step has `safety/attack`, `safety/over_refusal` and `safety/eval_seconds`. `safety/unread` is the number of answers
    without a verdict, if there are any; most were cut off while the model was thinking. With several processes each asks all prompts, so
    that all make the same decision to stop.

    Args:
        sets: "harmful" (required) and "benign" → a JSON-lines file with `prompt`, or `Prompt`s.
        tokenizer: the model's, with its chat template.
        steps: N; the last step is always evaluated.
        judge: judges the completions; by default by refusal phrases, the weakest judge there is.
        most_prompts: only so many of each set, from its start.
        new_tokens: maximum length of a completion.
        batch_size: prompts per batch.
        stop_above: stop training where the attack rate exceeds this.
        around: a context in which the model has the weights that it will be used with.

    Raises:
        ConfigurationError: there are no harmful prompts or no tokenizer, or its chat template rejects a prompt.
    """

    def __init__(
        self,
        sets: Mapping[Kind, Sequence[Prompt] | str | Path],
        tokenizer: Any,
        *,
        steps: int = 100,
        judge: Judge | None = None,
        most_prompts: int = 64,
        new_tokens: int = 32,
        batch_size: int = 32,
        stop_above: float | None = None,
        around: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        if not sets.get("harmful"):
            raise ConfigurationError("eval.harmful is missing: without harmful prompts no loss of safety can be seen")
        if tokenizer is None or not hasattr(tokenizer, "batch_decode"):
            raise ConfigurationError(
                "eval: the trainer has no tokenizer (processing_class), without which no prompt can be asked; give one"
            )
        read = {kind: read_prompts(Path(given), kind) if isinstance(given, str | Path) else list(given) for kind, given in sets.items()}
        if wrong := [given for prompts in read.values() for given in prompts if not isinstance(given, Prompt)]:
            raise ConfigurationError(
                f"eval: {wrong[0]!r} is not a Prompt; give the path of a .jsonl file, or trl_safety.scoring.Prompt objects"
            )
        self._sets = {kind: prompts[:most_prompts] for kind, prompts in read.items()}
        # Checked now, not after the first steps of training.
        for prompts in self._sets.values():
            check_prompts(prompts, tokenizer)
        self._tokenizer = tokenizer
        self._steps = steps
        self._judge = judge or KeywordJudge()
        self._options = {"new_tokens": new_tokens, "batch_size": batch_size}
        self.stop_above = stop_above
        self.around = around
        self._pending: dict[str, float] = {}
        self.history: list[tuple[int, Scores]] = []

    @classmethod
    def of(
        cls, config: SafetyEvalConfig, tokenizer: Any, around: Callable[[], AbstractContextManager[Any]] = nullcontext
    ) -> SafetyEvalCallback:
        """The callback for a safety block's `eval`."""
        sets = read_sets(harmful=Path(config.harmful), benign=Path(config.benign) if config.benign else None, task=None)
        options = config.model_dump(exclude={"harmful", "benign"})
        return cls(dict(sets), tokenizer, around=around, **options)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse `stop_above` beside a correction; by now every callback, including the correction's, has started."""
        correction = vars(state).get(RUN_CORRECTION)
        if correction is not None:
            refuse_stopping(self.stop_above, "stop_above", correction.correction.name)

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any) -> None:
        """Ask the prompts, and have the step logged."""
        if state.global_step % self._steps and state.global_step < state.max_steps:
            return
        started = time.perf_counter()
        try:
            with self.around():
                scores, _ = score(unwrap(model), self._tokenizer, self._sets, self._judge, **self._options)
        except ConfigurationError as error:
            # A failing judge must not lose what was trained. With `stop_above` training stops, since nothing would watch it.
            control.should_training_stop = control.should_training_stop or self.stop_above is not None
            logger.error(
                "eval: at step %s: %s; training %s", state.global_step, error, "stops" if self.stop_above is not None else "goes on"
            )
            return
        self.history.append((state.global_step, scores))
        self._pending = {"safety/eval_seconds": time.perf_counter() - started}
        if scores.attack:
            self._pending["safety/attack"] = scores.attack.share
        if scores.over_refusal:
            self._pending["safety/over_refusal"] = scores.over_refusal.share
        if unread := sum(scores.unread.values()):
            self._pending["safety/unread"] = unread
            if state.is_world_process_zero:
                logger.warning(
                    "eval: %s answers have no verdict at step %s (cut off while the model was thinking, or the judge's reply held none): raise new_tokens (%s)",
                    unread,
                    state.global_step,
                    self._options["new_tokens"],
                )
        control.should_log = True
        if self.stop_above is not None and scores.attack and scores.attack.share > self.stop_above:
            control.should_training_stop = True
            if state.is_world_process_zero:
                logger.warning(
                    "eval: %s of the harmful prompts were complied with at step %s: training stops", scores.attack, state.global_step
                )

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Add the rates to the step's log and to the trainer's history."""
        if not self._pending or logs is None:
            return
        # The trainer has already put a copy of the log into its history.
        logs.update(self._pending)
        if state.log_history:
            state.log_history[-1].update(self._pending)
        self._pending = {}


def refuse_stopping(stop_above: float | None, setting: str, correction: str) -> None:
    """Refuse to stop training because of an attack rate that a correction is yet to lower.

    Args:
        stop_above: the attack rate above which training would stop; None if it would not.
        setting: how the user named it, for the message.
        correction: the method that acts when training ends.

    Raises:
        ConfigurationError: a rate is given.
    """
    if stop_above is not None:
        raise ConfigurationError(
            f"{setting} = {stop_above:g}: measures the adapter as it trains, before {correction} acts; remove one of the two"
        )
