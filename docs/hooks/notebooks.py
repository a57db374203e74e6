"""MkDocs hook: a page for every notebook, with the outputs that are saved in it. Nothing is run.

Links and anchors of the resulting Markdown are checked like those of every other page.
"""

import base64
import html
import re
from pathlib import Path, PurePosixPath
from typing import Any

import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

DOWNLOAD = "[Download this notebook]({name}){{ .md-button }} to run it in Jupyter or in Colab."
PICTURE = "PICTURE.png"
"""Stands for the name of an output's picture."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the page of every notebook, and the pictures of its outputs; the notebook itself can be downloaded."""
    for notebook in [file for file in files if file.src_uri.endswith(".ipynb")]:
        path = PurePosixPath(notebook.src_uri)
        cells = nbformat.read(Path(config.docs_dir, path), as_version=4).cells
        title, _, rest = cells[0].source.partition("\n")
        parts, pictures = [title, DOWNLOAD.format(name=path.name), _linked(rest.strip())], 0
        for cell in cells[1:]:
            if cell.cell_type == "markdown":
                parts.append(_linked(cell.source))
                continue
            parts.append(_fenced(cell.source, "python"))
            for text, picture in map(_shown, cell.outputs):
                name = f"{path.stem}_{pictures}.png"
                parts.append(text.replace(PICTURE, name))
                if picture:
                    files.append(File.generated(config, str(path.with_name(name)), content=picture))
                    pictures += 1
        files.append(File.generated(config, str(path.with_suffix(".md")), content="\n\n".join(parts)))
    return files


def _shown(output: Any) -> tuple[str, bytes | None]:
    """Return the Markdown of an output, and its picture if it has one. The best of several forms is taken."""
    if output.output_type == "stream":
        return _fenced(output.text, "{ .text .output }"), None
    data = output.data
    if "text/html" in data:
        return f'<div class="output">\n{data["text/html"]}\n</div>', None
    if "image/png" in data:
        alt = html.escape(output.metadata.get("image/png", {}).get("alt", "plot made by the code above"))
        picture = f'<p><a href="{PICTURE}"><img alt="{alt}" src="{PICTURE}"></a></p>'
        return picture, base64.b64decode(data["image/png"])
    return _fenced(data["text/plain"], "{ .text .output }"), None


def _fenced(text: str, language: str) -> str:
    return f"````{language}\n{text.rstrip()}\n````"


def _linked(markdown: str) -> str:
    """Lead links to other notebooks to their pages."""
    return re.sub(r"\]\((\w+)\.ipynb", r"](\1.md", markdown)
