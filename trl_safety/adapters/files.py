"""Files that are either whole or absent: written aside, flushed, then renamed."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from trl_safety.version import __version__


@contextlib.contextmanager
def replacing(path: Path, *, error: type[Exception], setting: str, left: str = "nothing was left behind") -> Iterator[Path]:
    """Yield a temporary sibling of `path` to write to; rename it to `path` when the block succeeds, and remove it otherwise.

    Args:
        path: the file to create or replace. Its folder is created.
        error: what to raise when the file system refuses.
        setting: how the user named the path, for the message.
        left: what is left after a failure, for the message.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        # mkstemp makes the file private; what we write should be as readable as the user's other files.
        temporary.chmod(0o666 & ~_umask())
        yield temporary
        _flush(temporary)
        temporary.replace(path)
        temporary = None
    except OSError as failure:
        raise error(_refused(path, setting, failure, left)) from failure
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: Path, *, error: type[Exception], setting: str, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` when the block succeeds and is removed otherwise.

    Raises:
        error: `path` already exists, is not an empty folder and is not to be replaced, or the file system refuses.
    """
    temporary: Path | None = None
    try:
        if not replace:
            refuse_full(path, error=error, setting=setting)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
        temporary.chmod(0o777 & ~_umask())
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _flush(file)
        if path.exists():
            shutil.rmtree(path)
        temporary.rename(path)
        temporary = None
    except OSError as failure:
        raise error(_refused(path, setting, failure)) from failure
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def is_newer(one: str, other: str) -> bool:
    """Whether one version, as programs write it into their files, is newer than another."""
    first, second = ([int(part) for part in re.findall(r"\d+", version)[:3]] for version in (one, other))
    return first > second


def other_schema(found: object, reads: int, wrote: object, again: str) -> str:
    """What a message says about a file of ours with another schema version, including the remedy.

    Args:
        found: the file's schema version.
        reads: the one that this version reads.
        wrote: the version that the file says it was written by.
        again: how to make the file again.
    """
    update = (
        f"; it was written by trl-safety {wrote}: pip install trl-safety=={wrote}, or "
        if isinstance(wrote, str) and wrote != __version__
        else "; "
    )
    return f"has schema version {found!r}, but trl-safety {__version__} reads {reads}{update}{again}"


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def refuse_full(path: Path, *, error: type[Exception], setting: str) -> None:
    """Refuse an output folder that is not empty, before the work whose result goes there.

    Raises:
        error: it exists and is not empty.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise error(f"{setting} = {str(path)!r}: already exists and is never overwritten; name a new folder")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _refused(path: Path, setting: str, failure: OSError, left: str = "nothing was left behind") -> str:
    return (
        f"{setting} = {str(path)!r}: cannot be written ({failure.strerror or failure}); {left}. "
        "Free space or name a folder that you may write to"
    )
