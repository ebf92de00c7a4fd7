"""The answer in a model's output, without the thinking before it, and text normalised for comparison."""

from __future__ import annotations

import re
import unicodedata

THINKING: tuple[tuple[str, str, bool], ...] = (
    ("<think>", "</think>", True),
    ("<thinking>", "</thinking>", True),
    ("<thought>", "</thought>", True),
    ("<reasoning>", "</reasoning>", True),
    ("<seed:think>", "</seed:think>", True),
    ("[THINK]", "[/THINK]", True),
    ("◁think▷", "◁/think▷", True),
    ("<|begin_of_thought|>", "<|end_of_thought|>", True),
    ("<|START_THINKING|>", "<|END_THINKING|>", True),
    ("<|inner_prefix|>", "<|inner_suffix|>", True),
    ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>", True),
    ("<|channel>thought", "<channel|>", False),
    ("<unused94>thought", "<unused95>", False),
    ("Here is my thought process:", "Here is my response:", False),
    ("Here are my reasoning steps:", "[BEGIN FINAL RESPONSE]", False),
)
"""How models mark their thinking: the opening and closing markers, and whether the closing one suffices, since a template may open it."""

AROUND = ("<answer>", "</answer>", "[END FINAL RESPONSE]", "<|begin_of_box|>", "<|end_of_box|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>")
"""Markers that models put around an answer after their thinking."""

_PATTERNS = [(re.compile(re.escape(a), re.IGNORECASE), re.compile(re.escape(b), re.IGNORECASE), alone) for a, b, alone in THINKING]

_SPELLINGS = str.maketrans(
    {
        **dict.fromkeys("‘’‚‛ʼʹ′`´ˈ", "'"),
        **dict.fromkeys("“”„‟«»″", '"'),
        **dict.fromkeys("‐‑‒–—―−", "-"),
        "⁄": "/",
        # Invisible: soft hyphen, zero-width characters, direction marks, byte order mark.
        **dict.fromkeys("\u00ad\u200b\u200c\u200d\u200e\u200f\u2060\ufeff", ""),
    }
)


def answer_of(text: str) -> str | None:
    """The answer in a completion, without the thinking before or within it; None if the completion ended before the answer began.

    A marker that is never closed counts as thinking only at the start of a line, because an answer may mention `<think>`.
    """
    rest, thought, cut = text, False, False
    shorter = True
    while shorter:
        before = rest
        for opening, closing, alone in _PATTERNS:
            begin, end = opening.search(rest), closing.search(rest)
            if end and not (begin and begin.start() < end.start()):
                rest, thought = (rest[end.end() :], True) if alone else (rest, thought)
            elif begin and end:
                rest, thought = rest[: begin.start()] + rest[end.end() :], True
            elif begin and not rest[: begin.start()].rpartition("\n")[2].strip():
                rest, thought, cut = rest[: begin.start()], True, True
        shorter = len(rest) < len(before)
    if not thought:
        return text.strip()
    for mark in AROUND:
        rest = rest.replace(mark, "")
    return None if cut or not rest.strip() else rest.strip()


def opened_thinking(rendered: str) -> str:
    """The marker with which a template opened the model's thinking at the end of a prompt; empty if there is none."""
    end = rendered.rstrip()
    return next((opening for opening, _, _ in THINKING if end.endswith(opening)), "")


def as_written(text: str) -> str:
    """Text for comparison: lower case, one Unicode form, and quotes, apostrophes, dashes and spaces as on a keyboard."""
    for _ in range(2):  # Normalisation can produce such characters again: ŉ becomes ʼn.
        text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text.translate(_SPELLINGS)).casefold())
    return re.sub(r"\s+", " ", text.translate(_SPELLINGS))
