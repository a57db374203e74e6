"""What a notebook shows as the result of a cell: figures as small PNGs, and pieces of HTML."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

from tinymodel_jax.analysis.report.page import render

DPI = 100
"""Pixels per inch of the PNGs."""
COLOURS = 256
"""Colours of the PNGs. With a palette, they have a third of the bytes, which are saved with a notebook."""


class NotebookFigure(Figure):
    """A Matplotlib figure that a notebook shows without `pyplot`, which keeps every figure that it makes.

    `figure.savefig(path)` and everything else is as usual.
    """

    alt: str = ""
    """What the picture shows, for screen readers."""

    def _repr_png_(self) -> tuple[bytes, dict[str, Any]]:
        drawn, small = io.BytesIO(), io.BytesIO()
        self.savefig(drawn, format="png", dpi=DPI, facecolor="white")
        Image.open(drawn).convert("RGB").quantize(COLOURS).save(small, format="png", optimize=True)
        return small.getvalue(), {"alt": self.alt}


@dataclass(frozen=True, repr=False)
class NotebookHtml:
    """HTML that a notebook shows as the result of a cell."""

    html: str
    """The HTML, without empty lines, so that it can be put into Markdown."""

    @classmethod
    def of(cls, template: str, content: Mapping[str, Any]) -> NotebookHtml:
        """Return what a template in `templates/notebook` makes of the content."""
        lines = render(f"notebook/{template}", content).split("\n")
        return cls("\n".join(line for line in lines if line.strip()))

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        return f"NotebookHtml({len(self.html):,} characters, which a notebook shows; .html is the text)"
