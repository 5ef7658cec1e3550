"""Pieces of an HTML page that needs nothing else: text escaped, tables, pictures inside of it."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from typing import Any

from matplotlib.figure import Figure

# Told apart by the colour-blind too (Okabe & Ito); markers and dashes tell lines apart without any colour.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS, DASHES = "os^Dvp*", ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin: 1.6rem 0 .3rem; }
table { border-collapse: collapse; margin: .6rem 0; } td, th { padding: .15rem .8rem .15rem 0; text-align: left;
  vertical-align: top; border-bottom: 1px solid #eee; } img { max-width: 100%; }
.serious { color: #a01818; } .none { color: #2a7a2a; } summary { cursor: pointer; color: #555; }
code { word-break: break-word; } .wide { overflow-x: auto; } .note { color: #555; }
"""


def document(title: str, parts: Iterable[str]) -> str:
    """The page.

    Args:
      title: plain text.
      parts: HTML, one after the other.
    """
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{text(title)}</title>'
        f"<style>{_STYLE}</style></head><body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def text(value: Any) -> str:
    """Anything as HTML that shows it as it is."""
    return html.escape(str(value))


def table(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table of plain values; no head where all names are empty."""
    head = "".join(f"<th>{text(name)}</th>" for name in names) if any(names) else ""
    body = "".join("<tr>" + "".join(f"<td>{text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table>{f'<tr>{head}</tr>' if head else ''}{body}</table>"


def folded(summary: str, content: str) -> str:
    """Content (HTML) that opens at a click on its summary (plain text)."""
    return f"<details><summary>{text(summary)}</summary>{content}</details>"


def picture(png: bytes, alt: str = "") -> str:
    """A PNG inside of the page."""
    return f'<img alt="{text(alt)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def png_of(figure: Figure, dpi: int = 110) -> bytes:
    """A figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()
