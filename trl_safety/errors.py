"""Every error that this package raises on purpose.

Each message names the setting, its value and the remedy. All concrete errors are also `ValueError`, so that code written
for TRL's own checks catches them.
"""


class SafetyError(Exception):
    """Base of all errors of this package."""


class ConfigurationError(SafetyError, ValueError):
    """An option is unknown, out of bounds, or asks for something that would not act."""


class CheckpointError(SafetyError, ValueError):
    """A model checkpoint cannot be read as what is needed here."""


class SubspaceError(SafetyError, ValueError):
    """A pair gives no alignment subspace, or a subspace does not belong to the model at hand."""


class AdapterError(SafetyError, ValueError):
    """An adapter is missing, is of a kind that the methods do not cover, or was corrected before."""


class ReportError(SafetyError, ValueError):
    """A safety report is missing, damaged, or does not describe the adapter beside it."""


def reason(error: BaseException) -> str:
    """What another library's error says, as part of a message of ours: its first line, or its class where it says nothing.

    Of pydantic's, whose first line is a count, the first value that is wrong is named.
    """
    wrong = getattr(error, "errors", None)
    if callable(wrong) and (found := wrong()):
        return ": ".join(text for text in (".".join(map(str, found[0]["loc"])), found[0]["msg"]) if text)
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
