"""Read and write JSON lines, with one reader for users' files and for our own logs."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from trl_safety.errors import ConfigurationError

OTHERS = (".csv", ".tsv", ".parquet", ".arrow", ".xlsx", ".zip", ".zst")
"""Files that are told by their names."""
GZIP = b"\x1f\x8b"
BYTE_ORDER_MARK = "\ufeff"


def read_lines(
    path: Path, named: str, *, error: type[Exception] = ConfigurationError, whole: bool = False, remedy: str = "give a .jsonl file"
) -> list[tuple[int, dict[str, Any]]]:
    """The objects of a JSON-lines file, each with its line number, from 1. Blank lines are counted but skipped.

    A file packed by gzip is unpacked. Lines end only with \n, because U+2028, U+2029 and U+0085 may occur within a JSON string. A byte order
    mark is skipped.

    Args:
        path: the file.
        named: how the user named it, for messages.
        error: what to raise.
        whole: skip a last line without a line end, as a killed run leaves it.
        remedy: what to do if the file cannot be read.

    Raises:
        error: the file cannot be read, is not UTF-8, or a line is not a JSON object.
    """
    if path.suffix in OTHERS and path.is_file():
        raise error(f"{named}: is a file of the kind {path.suffix!r}, which holds no JSON lines; {remedy}")
    try:
        content = path.read_bytes()
    except OSError as failure:
        raise error(f"{named}: cannot be read ({failure.strerror or failure}); {remedy}") from failure
    if content.startswith(GZIP):
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as failure:
            raise error(f"{named}: cannot be read (it is packed by gzip, and damaged: {failure}); {remedy}") from failure
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise error(f"{named}: cannot be read (it is UTF-16); save it as UTF-8")
    pieces = content.split(b"\n")
    found = []
    for number, piece in enumerate(pieces[:-1] if whole else pieces, 1):
        try:
            # Concatenated files can have a byte order mark in the middle.
            line = piece.decode("utf-8").removeprefix(BYTE_ORDER_MARK).strip()
        except UnicodeDecodeError as failure:
            raise error(
                f"{named}, line {number}: cannot be read ({failure.reason} at byte {failure.start + 1}); save it as UTF-8"
            ) from failure
        if line:
            found.append((number, _object(line, f"{named}, line {number}", error)))
    return found


def _object(line: str, where: str, error: type[Exception]) -> dict[str, Any]:
    try:
        value = json.loads(line, object_pairs_hook=_once)
        # Half of a surrogate pair could not be tokenised or written back.
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as failure:
        raise error(
            f"{where}: contains half of a character (\\u{ord(failure.object[failure.start]):04x}); write the whole one"
        ) from failure
    except (ValueError, RecursionError) as failure:
        raise error(f"{where}: is not an object (not JSON: {failure}); write one object per line") from failure
    if not isinstance(value, dict):
        raise error(f"{where}: is not an object but {kind_of(value)}; write one object per line")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"`{next(name for name in names if names.count(name) > 1)}` is there twice")
    return found


def kind_of(value: Any) -> str:
    """The kind of a JSON value, in JSON's own terms."""
    if value is None:
        return "null"
    names = {bool: "true or false", str: "a string", int: "a number", float: "a number", list: "an array", dict: "an object"}
    return names.get(type(value), f"a {type(value).__name__}")


def to_lines(rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows as JSON lines, as `read_lines` reads them."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
