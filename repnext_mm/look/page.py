"""One HTML page with everything in it: no script, no network, readable on a phone."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..files import replacing, write_text

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0; color: #1b1b1b; background: #fafafa;
  overflow-wrap: anywhere; }
table { overflow-wrap: normal; }
header, main { max-width: 1100px; margin: 0 auto; padding: 0 16px; }
header { padding-top: 20px; }
h1 { font-size: 1.5em; margin: 0; }
h2 { font-size: 1.2em; margin: 0 0 8px; }
h3 { font-size: 1em; margin: 16px 0 4px; }
section { background: #fff; border: 1px solid #e2e2e2; border-radius: 8px; padding: 16px;
  margin: 16px 0; }
nav a { margin-right: 14px; white-space: nowrap; }
a { color: #2f6fb2; }
p { margin: 6px 0; }
.note { color: #5a5a5a; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 3px 10px; text-align: right; border-bottom: 1px solid #eee; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; height: auto; display: block; }
.parts img { min-width: 620px; }
.pictures { display: grid; gap: 14px;
  grid-template-columns: repeat(auto-fill, minmax(320px, 1fr)); }
figure { margin: 0; }
figcaption { font-size: 0.9em; color: #444; overflow-wrap: anywhere; }
@media (max-width: 500px) {
  .pictures { grid-template-columns: 1fr; }
  section { padding: 12px; border-radius: 0; border-left: 0; border-right: 0; }
  header, main { padding-left: 8px; padding-right: 8px; }
  th, td { padding: 3px 6px; }
}
"""


@dataclass
class Section:
    """A part of the page."""

    title: str
    parts: list[str] = field(default_factory=list)

    @property
    def anchor(self) -> str:
        """What links to it."""
        return ''.join(c if c.isalnum() else '-' for c in self.title.lower())


class Page:
    """A page in parts, and the pictures of it as files beside.

    Args:
        folder: Where `index.html` and `pictures/` are written.
        title: Of the page.
        subtitle: A line beneath it.
    """

    def __init__(self, folder: Path, title: str, subtitle: str) -> None:
        self.folder = folder
        self.title = title
        self.subtitle = subtitle
        self.sections: list[Section] = []

    def section(self, title: str) -> None:
        """Begin a section; what is added goes into it."""
        self.sections.append(Section(title))

    def heading(self, text: str) -> None:
        """Add a heading inside the section."""
        self._add(f'<h3>{html.escape(text)}</h3>')

    def text(self, text: str, note: bool = False) -> None:
        """Add a paragraph."""
        kind = ' class="note"' if note else ''
        self._add(f'<p{kind}>{html.escape(text)}</p>')

    def table(self, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Add a table; numbers are at the right."""
        head = ''.join(f'<th>{html.escape(str(cell))}</th>' for cell in header)
        lines = [
            '<tr>' + ''.join(f'<td>{html.escape(str(cell))}</td>' for cell in row) + '</tr>'
            for row in rows
        ]
        self._add(
            f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}'
            '</tbody></table></div>'
        )

    def chart(self, name: str, figure: Any, caption: str = '', wide: bool = False) -> None:
        """Add a figure of matplotlib, which is also written as `pictures/NAME.png`.

        One of many parts is `wide`: on a phone it is scrolled instead of shrunk.
        """
        stream = io.BytesIO()
        figure.savefig(stream, dpi=110, format='png')
        data = stream.getvalue()
        self._write(f'{name}.png', data)
        part = _image(data, 'png', caption or name, caption)
        self._add(f'<div class="wide parts">{part}</div>' if wide else part)

    def pictures(self, items: Sequence[tuple[str, np.ndarray, str]], most: int = 640) -> None:
        """Add pictures side by side where there is room.

        Args:
            items: Name, pixels `(H, W, 3)` uint8 RGB, and caption of each.
            most: Pixels of the longer side that is kept.
        """
        if not items:
            return
        parts = []
        for name, pixels, caption in items:
            picture = Image.fromarray(np.ascontiguousarray(pixels))
            picture.thumbnail((most, most))
            stream = io.BytesIO()
            picture.save(stream, format='JPEG', quality=85)
            self._write(f'{name}.jpg', stream.getvalue())
            parts.append(_image(stream.getvalue(), 'jpeg', caption, caption))
        self._add(f'<div class="pictures">{"".join(parts)}</div>')

    def write(self) -> Path:
        """Write the page; returns its path."""
        links = ''.join(
            f'<a href="#{s.anchor}">{html.escape(s.title)}</a>' for s in self.sections if s.parts
        )
        body = ''.join(
            f'<section id="{s.anchor}"><h2>{html.escape(s.title)}</h2>{"".join(s.parts)}</section>'
            for s in self.sections
            if s.parts
        )
        text = (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f'<title>{html.escape(self.title)}</title><style>{STYLE}</style></head><body>'
            f'<header><h1>{html.escape(self.title)}</h1>'
            f'<p class="note">{html.escape(self.subtitle)}</p><nav>{links}</nav></header>'
            f'<main>{body}</main></body></html>\n'
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / 'index.html'
        write_text(path, text)
        return path

    def _add(self, part: str) -> None:
        self.sections[-1].parts.append(part)

    def _write(self, name: str, data: bytes) -> None:
        path = self.folder / 'pictures' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_bytes(data)


def _image(data: bytes, kind: str, alt: str, caption: str) -> str:
    text = base64.b64encode(data).decode('ascii')
    below = f'<figcaption>{html.escape(caption)}</figcaption>' if caption else ''
    source = f'data:image/{kind};base64,{text}'
    return f'<figure><img alt="{html.escape(alt)}" src="{source}">{below}</figure>'
