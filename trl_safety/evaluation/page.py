"""Self-contained HTML: one style, tables and pictures inside the file, nothing fetched."""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

STYLE = (
    ":root{color-scheme:light}body{font:15px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#222;background:#fff;"
    "overflow-wrap:break-word}"
    "table{border-collapse:collapse;font-size:13px;width:100%;margin:1rem 0}.t{overflow-x:auto}"
    "td,th{padding:.3rem .5rem;border-bottom:1px solid #ddd;text-align:left;vertical-align:top}th{white-space:nowrap}"
    ".facts td+td{overflow-wrap:anywhere}img{max-width:100%}.bad{color:#b5483a}h2{margin-top:2.5rem}"
)
FEW = 5
"""A longer list of facts is folded."""


def page(title: str, *parts: str) -> str:
    """A whole page."""
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{html.escape(title)}</title><style>{STYLE}</style><h1>{html.escape(title)}</h1>{''.join(parts)}</html>\n"
    )


def paragraph(text: str, kind: str = "") -> str:
    """Plain text as a paragraph; `kind` is "bad" or nothing."""
    return f"<p{f' class={kind}' if kind else ''}>{html.escape(text)}</p>"


def heading(text: str) -> str:
    """A section's heading."""
    return f"<h2>{html.escape(text)}</h2>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of plain text, which scrolls sideways where the screen is too narrow."""
    return f"<div class=t tabindex=0><table>{_line(head, 'th')}{''.join(_line(cells, 'td') for cells in rows)}</table></div>"


def _line(cells: Sequence[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(_unbroken(cell))}</{tag}>" for cell in cells) + "</tr>"


def _unbroken(cell: str) -> str:
    """A number stays with what is before it: an option with its value, a rate with its interval."""
    return re.sub(r" (?=[\d\[])", "\u00a0", cell)


def facts(rows: Iterable[tuple[str, str | list[str]]]) -> str:
    """A table of names and what is said of each; long lists are folded."""
    lines = "".join(f"<tr><td>{html.escape(name)}</td><td>{_value(value)}</td></tr>" for name, value in rows)
    return f"<table class=facts>{lines}</table>"


def _value(value: str | list[str]) -> str:
    if isinstance(value, str):
        return html.escape(value)
    text = html.escape(", ".join(value))
    return text if len(value) <= FEW else f"<details><summary>{len(value)} in all</summary>{text}</details>"


def short(name: str) -> str:
    """The last two parts of an absolute local path; any other name as it is."""
    path = Path(name)
    return f"…/{'/'.join(path.parts[-2:])}" if path.is_absolute() and len(path.parts) > 3 else name


def png(figure: Any) -> bytes:
    """A matplotlib figure as PNG."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=130)
    return file.getvalue()


def picture(content: bytes, text: str) -> str:
    """A PNG inside the page, with what it shows in words."""
    return f"<img alt='{html.escape(text, quote=True)}' src='data:image/png;base64,{base64.b64encode(content).decode()}'>"
