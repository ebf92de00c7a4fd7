"""The errors that this package raises on purpose.

Each message names the setting, its value and the remedy. All concrete errors are also `ValueError`, so that code written
for TRL's own checks catches them.
"""


class SafetyError(Exception):
    """Base of all errors of this package."""


class ConfigurationError(SafetyError, ValueError):
    """An option is unknown, out of range, or asks for something that would not act."""


class CheckpointError(SafetyError, ValueError):
    """A model checkpoint cannot be read, or is not what is needed here."""


class SubspaceError(SafetyError, ValueError):
    """A pair has no alignment subspace, or a subspace does not belong to the model."""


class AdapterError(SafetyError, ValueError):
    """An adapter is missing, is of a kind that the methods do not cover, or was corrected before."""


class ReportError(SafetyError, ValueError):
    """A safety report is missing, damaged, or does not describe the adapter beside it."""


def reason(error: BaseException) -> str:
    """Another library's error for use in our messages: its first non-empty line, or its class name if it has no text.

    For a pydantic error, whose first line is a count, it is the first wrong value.
    """
    wrong = getattr(error, "errors", None)
    if callable(wrong) and (found := wrong()):
        return ": ".join(text for text in (".".join(map(str, found[0]["loc"])), found[0]["msg"]) if text)
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
