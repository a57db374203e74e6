"""One HTML file from a template in `templates/`, with its style and its script inside.

Rely on: the file opens from `file://` without a network, and whatever text goes in is shown as text. Content is plain
values; what they mean is decided where they are made.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tinymodel_jax.runtime.atomic_files import replace_file

_FOLDER = Path(__file__).parent / "templates"


def write_page(path: Path, template: str, content: Mapping[str, Any]) -> None:
    """Write the page of a template (`quickstart.html.jinja`); what was at `path` is replaced when all is well.

    Raises:
        OSError: the file cannot be written.
    """
    import jinja2  # only pages need it

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    text = environment.get_template(template).render(content)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, text.encode())


def token_text(token: str) -> str:
    """Return a token as it is shown: line breaks as an arrow, everything else as it is."""
    return token.replace("\n", "↵")
