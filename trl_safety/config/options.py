"""The base class of all option blocks, their validation, and a strict YAML reader."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from trl_safety.errors import ConfigurationError

Operator = Literal["scaled", "orthogonal"]


def _takes_boolean(annotation: Any) -> bool:
    return annotation in (bool, Any) or any(_takes_boolean(part) for part in get_args(annotation))


class Options(BaseModel):
    """Base of all option blocks: unknown keys are errors, numbers are finite, instances are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    @classmethod
    def known_keys(cls) -> list[str]:
        """The keys that a block of these options accepts."""
        return sorted(cls.model_fields)

    @model_validator(mode="before")
    @classmethod
    def _no_booleans_for_numbers(cls, data: Any) -> Any:
        # Otherwise YAML's `weight: off` would be 0, and `max_attack: yes` a threshold of 1.
        for name, value in data.items() if isinstance(data, Mapping) else ():
            if isinstance(value, bool) and name in cls.model_fields and not _takes_boolean(cls.model_fields[name].annotation):
                raise ValueError(f"{name} = {value}: is a boolean, which this option does not take")
        return data


T = TypeVar("T", bound=Options)


def validate(cls: type[T], options: Mapping[str, Any], where: str) -> T:
    """Build `cls` from a mapping; every error names the option under `where`, its value and the remedy.

    Raises:
        ConfigurationError: an option is wrong; the message has one line per wrong option.
    """
    try:
        return cls.model_validate(dict(options))
    except ValidationError as error:
        lines = [_explain(cls, item, where) for item in error.errors()]
    raise ConfigurationError("\n".join(lines))


def _explain(cls: type[BaseModel], item: Any, where: str) -> str:
    location = [str(part) for part in item["loc"] if not str(part).startswith(("<", "function-"))]
    name = ".".join([where, *location])
    if item["type"] == "extra_forbidden":
        known = _known_keys(cls, location[:-1])
        close = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.6)
        hint = f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(known)}"
        return f"{name} = {item['input']!r}: unknown option; {hint}"
    message = item["msg"].removeprefix("Value error, ")
    return f"{name} = {item['input']!r}: {message}"


def _known_keys(cls: type[BaseModel], path: list[str]) -> list[str]:
    for key in path:
        field = cls.model_fields.get(key)
        nested = models_in(field.annotation) if field else []
        if not nested:
            return []
        cls = nested[0]
    return cls.known_keys() if issubclass(cls, Options) else sorted(cls.model_fields)


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """The pydantic models in an annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in getattr(annotation, "__args__", ()) for model in models_in(argument)]


def read_yaml(path: Path, setting: str) -> Any:
    """The content of a YAML file.

    Raises:
        ConfigurationError: it cannot be read, is not YAML, or has a duplicate key, of which YAML silently keeps the last.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses duplicate keys."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
            if twice := [key for key in keys if keys.count(key) > 1]:
                raise yaml.YAMLError(f"the key {twice[0]!r} appears twice")
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=Loader)  # noqa: S506  # a subclass of the safe loader
    except OSError as error:
        raise ConfigurationError(f"{setting} = {str(path)!r}: cannot be read ({error.strerror}); give the path of a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{setting} = {str(path)!r}: is not valid YAML: {error}") from error
