"""What our TRL trainers share: the `safety` field of the arguments, and the block that the constructor takes."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Union

from trl_safety.config.block import SafetyConfig
from trl_safety.config.requirements import Facts, resolve
from trl_safety.errors import ConfigurationError
from trl_safety.subspace.artifact import AlignmentSubspace
from trl_safety.training.facts import objective, reference, trl_trainer
from trl_safety.training.mixin import SafetyMixin
from trl_safety.training.start import safety_section


@dataclass
class SafeArguments:
    """Adds one field to a TRL configuration: `class SafeXConfig(SafeArguments, XConfig)`. With `safety=None` nothing differs from the parent.

    Args:
        safety: the safety block: a `SafetyConfig`, a mapping, the path of a YAML file, or (on a command line) JSON. It is
            stored as a plain mapping, so that the arguments can be saved and logged.

    Raises:
        ConfigurationError: an option is unknown, out of bounds or contradictory.
    """

    _taken = False

    # HfArgumentParser reads the annotation at run time and accepts a union only in this form.
    safety: Optional[Union[dict, str]] = field(  # type: ignore[type-arg]  # noqa: UP007, UP045
        default=None, metadata={"help": "The safety block: a mapping, the path of a YAML file, or JSON."}
    )

    def __post_init__(self) -> None:
        parent: Any = super()
        parent.__post_init__()
        if self.safety is not None:
            self.safety = SafetyConfig.parse(self.safety).model_dump(mode="json", exclude_unset=True)

    @property
    def train_batch_size(self) -> int:
        """The parent's. Every Trainer reads it when created, so a trainer that would ignore the block is refused here."""
        if self.safety is not None and not self._taken:
            name = type(self).__name__.replace("Config", "Trainer")
            raise ConfigurationError(f"args.safety is set, but the trainer is not a {name} and would ignore it: use {name}")
        parent: Any = super()
        size: int = parent.train_batch_size
        return size

    def __getstate__(self) -> dict[str, Any]:
        """A copy, or what a checkpoint stores of it, belongs to no trainer."""
        return {name: value for name, value in vars(self).items() if name != "_taken"}


@contextmanager
def served(args: Any) -> Iterator[None]:
    """Within this context the arguments belong to a trainer of ours; any other trainer would ignore their block."""
    if not isinstance(args, SafeArguments) or args._taken:
        yield
        return
    args._taken = True
    try:
        yield
    finally:
        args._taken = False


class BlockTrainer(SafetyMixin):
    """`SafetyMixin` for a TRL trainer whose constructor takes the block, and whose arguments may hold it."""

    def __init__(
        self,
        *args: Any,
        safety: SafetyConfig | Mapping[str, Any] | str | Path | None = None,
        subspace: AlignmentSubspace | str | Path | None = None,
        **kwargs: Any,
    ) -> None:
        config, given = self.with_block(args, kwargs, safety)
        parent: Any = super()
        with served(given.get("args")):
            parent.__init__(**given)
        self.start_safety(config, subspace)

    @classmethod
    def with_block(
        cls, args: tuple[Any, ...], kwargs: Mapping[str, Any], safety: SafetyConfig | Mapping[str, Any] | str | Path | None
    ) -> tuple[SafetyConfig | None, dict[str, Any]]:
        """The block and the parent's arguments by name. Refuses what it can before a model is loaded and data is tokenised.

        Args:
            args: the user's positional arguments.
            kwargs: the user's other arguments.
            safety: the user's block.

        Raises:
            ConfigurationError: the block is wrong, given twice, or cannot act in this trainer or beside its arguments.
        """
        given = _by_name(trl_trainer(cls), args, kwargs)
        in_args = getattr(given.get("args"), "safety", None)
        if safety is not None and in_args is not None:
            raise ConfigurationError(f"safety is given to {cls.__name__} and in args.safety: keep one of them")
        block = safety if safety is not None else in_args
        if block is None:
            return None, given
        config = SafetyConfig.parse(block)
        known = {"objective": objective(cls), "reference": reference(given.get("args"), given.get("ref_model"))}
        resolve(config.methods(), Facts("trl", known), dry=True)
        if in_args is not None:
            # A copy, so that any other trainer still refuses the user's own arguments.
            given["args"] = copy.copy(given["args"])
        return config, given

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """The parent's."""
        trainer: Any = self
        with served(trainer.args):
            return super().train(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """The parent's."""
        trainer: Any = self
        with served(trainer.args):
            return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """The parent's."""
        trainer: Any = self
        with served(trainer.args):
            return super().predict(*args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The parent's model card with the safety section."""
        parent: Any = super()
        parent.create_model_card(*args, **kwargs)
        trainer: Any = self
        safety_section(self, Path(trainer.args.output_dir) / "README.md")


def _by_name(parent: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    signature = inspect.signature(parent)
    given = dict(signature.bind(*args, **kwargs).arguments)
    further = [name for name, parameter in signature.parameters.items() if parameter.kind is inspect.Parameter.VAR_KEYWORD]
    for name in further:
        given |= given.pop(name, {})
    return given
