"""Pieces of the report pages: HTML text with its style and pictures inside, no script, no network."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

STYLE = Path(__file__).parents[1] / "assets" / "report.css"


def document(title: str, parts: Sequence[str], footer: str) -> str:
    """The whole page as text; empty parts are left out."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{STYLE.read_text()}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(filter(None, parts))
        + f"\n<footer>{escape(footer)}</footer>\n</main>\n</body>\n</html>\n"
    )


def section(title: str, words: str, body: str) -> str:
    if not body:
        return ""
    caption = f'<p class="caption">{escape(words)}</p>' if words else ""
    return f"<section><h2>{escape(title)}</h2>{caption}{body}</section>"


def card(title: str, words: str, body: str, wide: bool = False) -> str:
    """A framed part of a section; `wide` takes the whole row of `cards`."""
    kind = "card wide" if wide else "card"
    return f'<div class="{kind}"><h3>{escape(title)}</h3><p class="caption">{escape(words)}</p>{body}</div>'


def cards(parts: Sequence[str]) -> str:
    return f'<div class="cards">{"".join(filter(None, parts))}</div>'


def note(text: str | None) -> str:
    return f'<p class="note">{escape(text)}</p>' if text else ""


def figure(uri: str, name: str) -> str:
    return f"<figure>{image(uri, name)}<figcaption>{escape(name)}</figcaption></figure>"


def image(uri: str, text: str) -> str:
    return f'<img class="px" src="{uri}" alt="{escape(text, quote=True)}">'


def columns(count: int, first: str = "") -> str:
    """The style of a grid of `count` equal columns, after a `first` one where given."""
    return f"grid-template-columns:{first}{' ' if first else ''}repeat({count},minmax(0,1fr))"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], best: Sequence[int | None] = ()) -> str:
    """A table whose first column names the rows; `best` has the column, counted from 1, to set off in each row.

    Wider than the page, it scrolls by itself.
    """
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = []
    for number, row in enumerate(rows):
        mark = best[number] if number < len(best) else None
        cells = "".join(
            f'<td class="best">{escape(cell)}</td>' if place == mark else f"<td>{escape(cell)}</td>"
            for place, cell in enumerate(row)
            if place
        )
        lines.append(f"<tr><th>{escape(row[0])}</th>{cells}</tr>")
    body = f"<thead><tr>{top}</tr></thead><tbody>{''.join(lines)}</tbody>"
    return f'<div class="scroll"><table>{body}</table></div>'
