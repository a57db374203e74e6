"""HTML from the templates in `templates/`: whole files, with their style and script inside, and pieces for notebooks.

A file opens from `file://` without a network. All text in the content is shown as text, never read as HTML.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tinymodel_jax.runtime.atomic_files import replace_file

_FOLDER = Path(__file__).parent / "templates"


def write_page(path: Path, template: str, content: Mapping[str, Any]) -> None:
    """Write the page of a template, such as `quickstart.html.jinja`. A file at `path` is replaced atomically.

    Raises:
        OSError: the file cannot be written.
    """
    text = render(template, content)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, text.encode())


def render(template: str, content: Mapping[str, Any]) -> str:
    """Return the text that a template makes of the content."""
    import jinja2  # needed by pages only

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    return environment.get_template(template).render(content)


def token_text(token: str) -> str:
    """Return a token for display, with an arrow in place of each line break."""
    return token.replace("\n", "↵")
