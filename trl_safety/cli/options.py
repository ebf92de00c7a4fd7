"""Command-line options built from the options classes, so that no option of a method is written twice."""

from __future__ import annotations

import enum
import inspect
from collections.abc import Callable, Iterator
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from trl_safety.config.block import correction_options_by_name, known_methods
from trl_safety.config.correction import CorrectionConfig
from trl_safety.errors import ConfigurationError


def corrections() -> dict[str, type[CorrectionConfig]]:
    """Name → options of every correction that can be imported; a broken one gives its error when requested by name."""
    found = {}
    for name in known_methods():
        try:
            options = correction_options_by_name(name)
        except ConfigurationError:
            continue
        if options is not None:
            found[name] = options
    return found


def with_correction_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add an option for every field of every correction to a command's `**options`; it is None if it was not given."""
    fields: dict[str, list[tuple[str, FieldInfo]]] = {}
    for method, options in corrections().items():
        for name, field in options.model_fields.items():
            if name not in CorrectionConfig.model_fields:
                fields.setdefault(name, []).append((method, field))
    signature = inspect.signature(command, eval_str=True)
    own = [parameter for parameter in signature.parameters.values() if parameter.kind is not inspect.Parameter.VAR_KEYWORD]
    made = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_annotation(name, owners))
        for name, owners in fields.items()
        if name not in signature.parameters
    ]
    command.__signature__ = signature.replace(parameters=[*own, *made])  # type: ignore[attr-defined]
    return command


def _annotation(name: str, owners: list[tuple[str, FieldInfo]]) -> Any:
    kinds = {_kind(field.annotation) for _, field in owners}
    kind = kinds.pop() if len(kinds) == 1 else str
    help_text = "; ".join(f"{method}: {_summary(field)}" for method, field in owners)
    if kind is bool:
        return Annotated[bool | None, typer.Option(f"--{name.replace('_', '-')}", help=help_text)]
    if isinstance(kind, tuple):
        choice: Any = enum.StrEnum(name, {str(value): str(value) for value in kind})  # type: ignore[misc]
        return Annotated[choice | None, typer.Option(help=help_text)]
    return Annotated[kind | None, typer.Option(help=help_text)]


def _summary(field: FieldInfo) -> str:
    """The first sentence of an option's description, and its default."""
    text = " ".join((field.description or "").split()).split(". ")[0].rstrip(".")
    shown = "" if field.default is None or "Default" in text else f" (default {field.default})"
    return text + shown


def _kind(annotation: Any) -> Any:
    """bool, int, float or str; the values of a Literal."""
    parts = list(_parts(annotation))
    if len(parts) == 1 and get_origin(parts[0]) is Literal:
        return get_args(parts[0])
    return parts[0] if len(parts) == 1 and parts[0] in (bool, int, float, str) else str


def _parts(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) is Annotated:
        yield from _parts(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, UnionType):
        for part in get_args(annotation):
            if part is not type(None):
                yield from _parts(part)
    else:
        yield annotation
