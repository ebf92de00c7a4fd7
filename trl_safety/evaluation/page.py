"""Self-contained HTML: one style, tables and pictures inside the file, nothing fetched."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from typing import Any

STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;font-size:13px;width:100%;margin:1rem 0}td,th{padding:.3rem .5rem;border-bottom:1px solid #ddd;text-align:left;"
    "vertical-align:top;overflow-wrap:anywhere}img{max-width:100%}.good{color:#2a7f62}.bad{color:#b5483a}h2{margin-top:2.5rem}code{font-size:.9em}"
)


def page(title: str, *parts: str) -> str:
    """A whole page."""
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{html.escape(title)}</title><style>{STYLE}</style><h1>{html.escape(title)}</h1>{''.join(parts)}</html>\n"
    )


def paragraph(text: str, kind: str = "") -> str:
    """Plain text as a paragraph; `kind` is "good", "bad" or nothing."""
    return f"<p{f' class={kind}' if kind else ''}>{html.escape(text)}</p>"


def heading(text: str) -> str:
    """A section's heading."""
    return f"<h2>{html.escape(text)}</h2>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of plain text."""
    return f"<table>{_line(head, 'th')}{''.join(_line(cells, 'td') for cells in rows)}</table>"


def _line(cells: Sequence[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def png(figure: Any) -> bytes:
    """A matplotlib figure as PNG."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=130)
    return file.getvalue()


def picture(content: bytes, text: str) -> str:
    """A PNG inside the page, with what it shows in words."""
    return f"<img alt='{html.escape(text, quote=True)}' src='data:image/png;base64,{base64.b64encode(content).decode()}'>"
