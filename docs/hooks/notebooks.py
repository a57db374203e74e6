"""MkDocs hook: a page for every notebook, with the outputs that are saved in it. Nothing is run.

Links and anchors of the resulting Markdown are checked like those of every other page.
"""

from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter
from traitlets.config import Config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the page of every notebook, and the pictures of its outputs; the notebook itself can be downloaded."""
    exporter = MarkdownExporter(config=Config({"NbConvertBase": {"display_data_priority": PRIORITY}}))
    for notebook in [file for file in files if file.src_uri.endswith(".ipynb")]:
        path = PurePosixPath(notebook.src_uri)
        body, resources = exporter.from_filename(str(Path(config.docs_dir, path)))
        for name, picture in resources["outputs"].items():
            unique = f"{path.stem}_{name}"
            body = body.replace(f"({name})", f"({unique})")
            files.append(File.generated(config, str(path.with_name(unique)), content=picture))
        title, _, rest = body.lstrip().partition("\n")
        download = f"[Download this notebook]({path.name}){{ .md-button }} to run it in Jupyter or in Colab."
        files.append(File.generated(config, str(path.with_suffix(".md")), content=f"{title}\n\n{download}\n\n{rest}"))
    return files


PRIORITY = ["text/html", "text/markdown", "image/png", "text/plain"]
"""Forms of an output, best first."""
