"""The `safety` block, which is also the registry of the methods.

A field of `SafetyConfig` is the only line that a method needs outside its own rooms.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from pydantic import Field, create_model, model_validator

from trl_safety.config.alignment_buffer import AlignmentBufferConfig
from trl_safety.config.alignment_vector import AlignmentVectorConfig
from trl_safety.config.asft import AsftConfig
from trl_safety.config.buffer_reinforce import BufferReinforceConfig
from trl_safety.config.correction import CorrectionConfig
from trl_safety.config.csulora import CsuloraConfig
from trl_safety.config.dual_select import DualSelectConfig
from trl_safety.config.evaluation import SafetyEvalConfig
from trl_safety.config.method import STAGES, MethodOptions
from trl_safety.config.options import Options, models_in, read_yaml, validate
from trl_safety.config.safe_lora import SafeLoraConfig
from trl_safety.config.sbr import SbrConfig
from trl_safety.config.signed_vector import SignedVectorConfig
from trl_safety.config.subspace import SubspaceSource
from trl_safety.errors import ConfigurationError


class SafetyConfig(Options):
    """The `safety` block: which methods protect the model, and which alignment subspace they use."""

    subspace: SubspaceSource | None = None
    """A subspace file made by `trl-safety subspace`, a Hub id, or a {base, aligned, rank} pair to build it from."""
    skip_modules: list[str] = Field(default_factory=list)
    """Adapted modules (name or its ending) that every method leaves alone. The report lists them. Every entry must match a module."""
    alignment_buffer: AlignmentBufferConfig | None = None
    dual_select: DualSelectConfig | None = None
    asft: AsftConfig | None = None
    sbr: SbrConfig | None = None
    safe_lora: SafeLoraConfig | None = None
    csulora: CsuloraConfig | None = None
    alignment_vector: AlignmentVectorConfig | None = None
    signed_vector: SignedVectorConfig | None = None
    buffer_reinforce: BufferReinforceConfig | None = None
    eval: SafetyEvalConfig | None = None
    """Monitoring only, without protection."""

    @model_validator(mode="before")
    @classmethod
    def _nothing_empty(cls, data: Any) -> Any:
        # In YAML an empty key is null, which would switch off what the user asked for.
        if not isinstance(data, Mapping):
            return data
        known = cls.options_classes()
        if empty := [name for name in known if name in data and data[name] is None]:
            needs_options = any(field.is_required() for field in known[empty[0]].model_fields.values())
            write = "its options" if needs_options else f"`{empty[0]}: {{}}` for its defaults"
            raise ValueError(f"{empty[0]} is empty: write {write}, or remove the key")
        if "eval" in data and data["eval"] is None:
            raise ValueError("eval is empty: name the harmful prompts, or remove the key")
        return data

    @model_validator(mode="after")
    def _acts(self) -> SafetyConfig:
        methods = self.methods()
        if not methods:
            raise ValueError(f"names no method, so nothing would be protected: add one of {', '.join(known_methods())}")
        groups: dict[tuple[str, str], list[str]] = {}
        for name, options in methods.items():
            for group in options.groups:
                groups.setdefault(group, []).append(name)
        for (_, reason), names in groups.items():
            if len(names) > 1:
                raise ValueError(f"{' and '.join(names)} {reason}: keep one of them")
        for name, options in methods.items():
            if self.skip_modules and options.cannot_skip:
                raise ValueError(
                    f"skip_modules = {self.skip_modules!r}: {name} {options.cannot_skip} and cannot leave layers alone; remove one of the two"
                )
            if isinstance(options, CorrectionConfig) and options.idle:
                raise ValueError(f"{name}.{options.idle}, so it would do nothing: choose another value, or remove {name}")
        scaling = next(((name, options.scales_adapter) for name, options in methods.items() if options.scales_adapter), None)
        lost = next((name for name, options in methods.items() if options.loses_by_scaling), None)
        if scaling and lost:
            raise ValueError(f"{lost} would be scaled down by {scaling[0]}'s merge: keep one of them, or remove {'.'.join(scaling)}")
        uses = {options.subspace_use for options in methods.values()}
        unused = () if "reads" in uses else ("skip_modules",) if "names" in uses else ("subspace", "skip_modules")
        if ignored := [name for name in unused if getattr(self, name)]:
            raise ValueError(f"{ignored[0]} = {getattr(self, ignored[0])!r} is used by none of {', '.join(methods)}: remove it")
        return self

    def needs_subspace(self) -> bool:
        """Whether a method of the block reads an alignment subspace."""
        return any(options.subspace_use == "reads" for options in self.methods().values())

    @property
    def correction(self) -> CorrectionConfig | None:
        """The correction of the trained adapter, if there is one."""
        return next((options for options in self.methods().values() if isinstance(options, CorrectionConfig)), None)

    def methods(self) -> dict[str, MethodOptions]:
        """The methods that are switched on, by name, in the order in which they act."""
        return {name: getattr(self, name) for name in self.options_classes() if getattr(self, name) is not None}

    @classmethod
    def known_keys(cls) -> list[str]:
        """The block's own keys, and the methods of installed packages."""
        return sorted({*super().known_keys(), *known_methods()})

    @classmethod
    def options_classes(cls) -> dict[str, type[MethodOptions]]:
        """The methods that the class has a field for: name → options class, in the order in which they act."""
        found = {
            name: model
            for name, field in cls.model_fields.items()
            for model in models_in(field.annotation)
            if issubclass(model, MethodOptions)
        }
        return dict(sorted(found.items(), key=lambda entry: STAGES.index(entry[1].stage)))

    @classmethod
    def parse(cls, source: SafetyConfig | Mapping[str, Any] | str | Path) -> SafetyConfig:
        """Read a `safety` block.

        Args:
            source: an instance, a mapping with the block's keys, or a YAML file that holds either the block alone or other keys and
                the block under the key `safety`.

        Raises:
            ConfigurationError: the file cannot be read, or an option is unknown, out of range or contradictory. The
                message has one line per option with its full name, its value and the remedy.
        """
        if isinstance(source, cls):
            return source
        if isinstance(source, str | Path):
            source = _block_of(read_yaml(Path(source), "safety"))
        if not isinstance(source, Mapping):
            raise ConfigurationError(
                f"safety = {source!r}: expected a SafetyConfig, a mapping or the path of a YAML file, got {type(source).__name__}"
            )
        return validate(_with_fields_for(cls, source), source, "safety")


GROUP = "trl_safety.methods"
"""Entry points of methods from other packages: the name in the block → its options class, a subclass of `MethodOptions`."""


def _entry_points() -> dict[str, EntryPoint]:
    return {found.name: found for found in entry_points(group=GROUP)}


def known_methods() -> list[str]:
    """The names of all methods: this package's, and those of installed packages, which are not imported."""
    return [*METHODS, *sorted(_entry_points().keys() - METHODS)]


def options_class(name: str) -> type[MethodOptions]:
    """The options class of a method, from this package or another one.

    Raises:
        ConfigurationError: there is no such method, its package cannot be imported, or the entry point is not an options class.
    """
    own = SafetyConfig.options_classes()
    if name in own:
        return own[name]
    found = _entry_points().get(name)
    if found is None:
        raise ConfigurationError(f"{name!r} is not a method; known: {', '.join(known_methods())}")
    where = f"the method {name!r} of {found.dist.name if found.dist else 'another package'} ({found.value})"
    try:
        loaded = found.load()
    except (ImportError, AttributeError) as error:
        raise ConfigurationError(f"{where} cannot be imported: {error}; repair or remove that package") from error
    if not isinstance(loaded, type) or not issubclass(loaded, MethodOptions):
        raise ConfigurationError(f"{where} is not a subclass of trl_safety.MethodOptions: ask its author, or remove that package")
    missing = [attribute for attribute in ("hook", "source", "stage", "costs") if not hasattr(loaded, attribute)]
    if missing:
        raise ConfigurationError(f"{where} does not define its {' and '.join(missing)}: ask its author, or remove that package")
    return loaded


def _with_fields_for(cls: type[SafetyConfig], source: Mapping[str, Any]) -> type[SafetyConfig]:
    """The block's class with a field for every method of another package that the source names."""
    further = [name for name in source if name not in cls.model_fields and name in _entry_points()]
    return _extended(cls, tuple(further)) if further else cls


@cache
def _extended(cls: type[SafetyConfig], names: tuple[str, ...]) -> type[SafetyConfig]:
    fields: dict[str, Any] = {name: (options_class(name) | None, None) for name in names}
    extended: type[SafetyConfig] = create_model(cls.__name__, __base__=cls, **fields)
    return extended


METHODS = tuple(SafetyConfig.options_classes())
"""This package's methods, in the order in which they act."""
CORRECTIONS = tuple(name for name, options in SafetyConfig.options_classes().items() if issubclass(options, CorrectionConfig))
"""The methods that rewrite a trained adapter and need no training."""


def correction_options_by_name(name: str) -> type[CorrectionConfig] | None:
    """The options of the correction that a method is, or provides for the trained adapter; None if it acts only during training.

    Raises:
        ConfigurationError: see `options_class`.
    """
    options = options_class(name).correction_options()
    return options if options is not None and issubclass(options, CorrectionConfig) else None


def correction_options() -> dict[str, type[CorrectionConfig]]:
    """Name → options of every correction of a saved adapter: the corrections, and the merges that other methods provide."""
    found = {name: correction_options_by_name(name) for name in known_methods()}
    return {name: options for name, options in found.items() if options is not None}


def source_of(name: str) -> str:
    """The paper of a method, as reports and tables name it."""
    return options_class(name).source


def _block_of(content: Any) -> Any:
    return content["safety"] if isinstance(content, Mapping) and "safety" in content else content
