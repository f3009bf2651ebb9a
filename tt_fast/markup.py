"""Pieces of a self-contained HTML page. Every text is escaped here and nowhere else."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path

#: Videos up to this size go into the page; larger ones are linked where they lie.
MAX_INLINE_BYTES = 8 * 2**20


def escape(value: object) -> str:
    """`value` as text that HTML takes literally, in elements and in quoted attributes."""
    return html.escape(str(value))


def page(title: str, subtitle: str, parts: Sequence[str]) -> str:
    """A whole document with the package's style sheet inside it; empty parts are left out."""
    css = resources.files("tt_fast").joinpath("assets/report.css").read_text(encoding="utf-8")
    head = [
        "<!doctype html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title>",
        f"<style>\n{css}</style>",
        "</head>",
        "<body>",
        "<main>",
        f'<h1>{escape(title)}</h1>\n<p class="sub">{escape(subtitle)}</p>',
    ]
    tail = ["</main>", "</body>", "</html>", ""]
    return "\n".join([*head, *filter(None, parts), *tail])


def tiles(values: Sequence[tuple[str, str, str]]) -> str:
    """Key figures side by side: (name, value, what it is); the first one stands out."""
    boxes = [
        f'<div class="tile"><span>{escape(name)}</span><b>{escape(value)}</b>'
        f"<small>{escape(about)}</small></div>"
        for name, value, about in values
    ]
    return f'<div class="tiles">{"".join(boxes)}</div>'


def section(title: str, *parts: str) -> str:
    """A titled card; nothing at all where all parts are empty."""
    if not any(parts):
        return ""
    return (
        f"<section>\n<h2>{escape(title)}</h2>\n" + "\n".join(filter(None, parts)) + "\n</section>"
    )


def bullets(items: Sequence[str]) -> str:
    """A list of sentences; nothing where there are none."""
    lines = "".join(f"<li>{escape(item)}</li>" for item in items)
    return f"<ul>{lines}</ul>" if lines else ""


def columns(titled: Iterable[tuple[str, str]]) -> str:
    """Titled parts beside each other where there is room."""
    boxes = (f"<div><h3>{escape(title)}</h3>{part}</div>" for title, part in titled)
    return f'<div class="columns">{"".join(boxes)}</div>'


def table(rows: Sequence[Sequence[object]], heads: Sequence[str] = ()) -> str:
    """Rows whose first cell names them; with `heads` the other cells are right-aligned numbers."""
    if not rows:
        return ""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in heads)
    lines = [
        f'<tr><th scope="row">{escape(first)}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in rest)
        + "</tr>"
        for first, *rest in rows
    ]
    body = (f"<thead><tr>{head}</tr></thead>" if heads else "") + f"<tbody>{''.join(lines)}</tbody>"
    kind = ' class="numbers"' if heads else ""
    return f'<div class="scroll"><table{kind}>{body}</table></div>'


def code(lines: Sequence[str]) -> str:
    """Shell lines as they are typed; nothing where there are none."""
    return f"<pre>{escape(chr(10).join(lines))}</pre>" if lines else ""


def image(path: Path, alt: str, caption: str, css_class: str = "chart") -> str:
    """A PNG inside the page. "chart" turns over on a dark screen, "map" does not."""
    source = _data_uri(path, "image/png")
    picture = f'<img class="{escape(css_class)}" alt="{escape(alt)}" src="{source}">'
    return f"<figure>{picture}<figcaption>{escape(caption)}</figcaption></figure>"


def video(path: Path, caption: str) -> str:
    """An MP4 inside the page, or linked by name if it is large: it then lies beside the page."""
    inline = path.stat().st_size <= MAX_INLINE_BYTES
    source = _data_uri(path, "video/mp4") if inline else escape(path.name)
    player = f'<video controls loop muted playsinline src="{source}"></video>'
    return f"<figure>{player}<figcaption>{escape(caption)}</figcaption></figure>"


def _data_uri(path: Path, media_type: str) -> str:
    return f"data:{media_type};base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"
