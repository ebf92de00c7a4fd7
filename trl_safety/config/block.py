"""The `safety` block: the registry of the methods.

A field of `SafetyConfig` is the one line that a method needs outside its own rooms.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from trl_safety.config.alignment_buffer import AlignmentBufferConfig
from trl_safety.config.alignment_vector import AlignmentVectorConfig
from trl_safety.config.asft import AsftConfig
from trl_safety.config.buffer_reinforce import BufferReinforceConfig
from trl_safety.config.correction import CorrectionConfig
from trl_safety.config.csulora import CsuloraConfig
from trl_safety.config.dual_select import DualSelectConfig
from trl_safety.config.evaluation import SafetyEvalConfig
from trl_safety.config.options import Options, read_yaml, validate
from trl_safety.config.safe_lora import SafeLoraConfig
from trl_safety.config.subspace import SubspaceSource
from trl_safety.errors import ConfigurationError


class SafetyConfig(Options):
    """The `safety` block: what protects the model, and from which alignment subspace."""

    subspace: SubspaceSource | None = None
    """A subspace file made by `trl-safety subspace`, a Hub id, or a {base, aligned, rank} pair to build it from."""
    skip_modules: list[str] = Field(default_factory=list)
    """Adapted modules (name or its ending) that every method leaves alone. The report lists them. No entry may match nothing."""
    dual_select: DualSelectConfig | None = None
    asft: AsftConfig | None = None
    safe_lora: SafeLoraConfig | None = None
    csulora: CsuloraConfig | None = None
    alignment_vector: AlignmentVectorConfig | None = None
    alignment_buffer: AlignmentBufferConfig | None = None
    buffer_reinforce: BufferReinforceConfig | None = None
    eval: SafetyEvalConfig | None = None
    """Protects nothing: it shows."""

    @model_validator(mode="before")
    @classmethod
    def _no_empty_methods(cls, data: Any) -> Any:
        # In YAML `asft:` with nothing behind it is null, which would switch off what the user wrote down to have.
        if isinstance(data, Mapping) and (empty := [name for name in METHODS if name in data and data[name] is None]):
            write = f"`{empty[0]}: {{}}` for its defaults" if empty[0] != "buffer_reinforce" else "its options behind it"
            raise ValueError(f"{empty[0]} has nothing behind it: write {write}, or remove the key")
        if isinstance(data, Mapping) and "eval" in data and data["eval"] is None:
            raise ValueError("eval has nothing behind it: name the harmful prompts, or remove the key")
        return data

    @model_validator(mode="after")
    def _acts(self) -> SafetyConfig:
        if not self.methods():
            raise ValueError(f"names no method, so that nothing would be protected: add one of {', '.join(METHODS)}")
        corrections = [name for name in CORRECTIONS if getattr(self, name)]
        if len(corrections) > 1:
            raise ValueError(f"{' and '.join(corrections)} both rewrite the trained adapter: keep one of them")
        if self.skip_modules and (
            buffer := "alignment_buffer" if self.alignment_buffer else "buffer_reinforce" if self.buffer_reinforce else None
        ):
            raise ValueError(
                f"skip_modules = {self.skip_modules!r}: {buffer} acts on the whole model and cannot leave layers alone; remove one of the two"
            )
        if self.skip_modules and self.dual_select:
            raise ValueError(
                f"skip_modules = {self.skip_modules!r}: dual_select steers the whole update and cannot leave layers alone; remove one of the two"
            )
        if self.correction and self.correction.idle:
            name = next(name for name in CORRECTIONS if getattr(self, name))
            raise ValueError(f"{name}.{self.correction.idle}, so that it would do nothing: choose another value, or remove {name}")
        if self.alignment_buffer and self.buffer_reinforce:
            raise ValueError(
                "alignment_buffer and buffer_reinforce are two buffers, of which the second would be trained on the first: keep one of them"
            )
        if self.alignment_vector and self.buffer_reinforce and self.buffer_reinforce.reinforce:
            raise ValueError(
                "alignment_vector would be weighted down by buffer_reinforce's merge: keep one of them, or remove buffer_reinforce.reinforce"
            )
        if not self.needs_subspace():
            # The buffer may read from a subspace which pair it is of.
            named = self.alignment_buffer is not None and self.alignment_buffer.base and self.alignment_buffer.aligned
            settings = () if self.alignment_buffer and not named else ("subspace", "skip_modules")
            ignored = [name for name in settings if getattr(self, name)]
            if ignored:
                raise ValueError(f"{ignored[0]} = {getattr(self, ignored[0])!r} is used by none of {', '.join(self.methods())}: remove it")
        return self

    def needs_subspace(self) -> bool:
        """Whether a method of the block reads an alignment subspace."""
        low_rank = self.alignment_buffer is not None and self.alignment_buffer.how == "low_rank"
        return low_rank or any(name in NEED_SUBSPACE for name in self.methods())

    @property
    def correction(self) -> CorrectionConfig | None:
        """The correction of the trained adapter, where there is one."""
        return next((getattr(self, name) for name in CORRECTIONS if getattr(self, name)), None)

    def methods(self) -> dict[str, Options]:
        """The methods that are on, by name, in the order in which they act."""
        return {name: getattr(self, name) for name in METHODS if getattr(self, name) is not None}

    @classmethod
    def parse(cls, source: SafetyConfig | Mapping[str, Any] | str | Path) -> SafetyConfig:
        """Read a `safety` block.

        Args:
            source: an instance, a mapping with the block's keys, or a YAML file that holds the block or, under the key
                `safety`, the block among other keys.

        Raises:
            ConfigurationError: the file cannot be read, or an option is unknown, out of bounds or contradictory. The
                message has a line per option with its full name, its value and the remedy.
        """
        if isinstance(source, cls):
            return source
        if isinstance(source, str | Path):
            source = _block_of(read_yaml(Path(source), "safety"))
        if not isinstance(source, Mapping):
            raise ConfigurationError(
                f"safety = {source!r}: expected a SafetyConfig, a mapping or the path of a YAML file, got {type(source).__name__}"
            )
        return validate(cls, source, "safety")


METHODS = ("alignment_buffer", "dual_select", "asft", "safe_lora", "csulora", "alignment_vector", "buffer_reinforce")

CORRECTIONS = ("safe_lora", "csulora", "alignment_vector")

NEED_SUBSPACE = ("asft", *CORRECTIONS)


def _block_of(content: Any) -> Any:
    return content["safety"] if isinstance(content, Mapping) and "safety" in content else content
