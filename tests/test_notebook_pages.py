"""The pages that the site makes of notebooks."""

import base64
import html
import json
import re
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

HOOK = Path(__file__).parent.parent / "docs" / "hooks" / "notebooks.py"
EXTENSIONS = ["attr_list", "md_in_html", "pymdownx.superfences"]


@pytest.fixture
def page(tmp_path: Path) -> str:
    """The built page of a small notebook."""
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    outputs = [
        new_output("stream", text="printed *as it is*\n"),
        new_output("execute_result", {"text/html": "<p title='a'>shown\n_whole_</p>", "text/plain": "not shown"}),
        new_output(
            "display_data",
            {"image/png": base64.b64encode(b"a picture").decode()},
            metadata={"image/png": {"alt": "bars [of x]"}},
        ),
        new_output("display_data", {"image/png": base64.b64encode(b"another").decode()}),
        new_output("execute_result", {"text/plain": "{'a': 1}"}),
    ]
    cells = [
        new_markdown_cell("# Title\n\nSee [the next](2_next.ipynb#part)."),
        new_code_cell("x = '```'", outputs=outputs),
    ]
    (tmp_path / "docs").mkdir()
    nbformat.write(new_notebook(cells=cells), tmp_path / "docs" / "1_first.ipynb")
    nbformat.write(new_notebook(cells=[new_markdown_cell("# Next\n\n## Part")]), tmp_path / "docs" / "2_next.ipynb")
    settings = {"site_name": "site", "use_directory_urls": False, "plugins": []}
    settings |= {"hooks": [str(HOOK)], "markdown_extensions": EXTENSIONS, "validation": {"anchors": "warn"}}
    (tmp_path / "mkdocs.yml").write_text(json.dumps(settings))
    build(load_config(str(tmp_path / "mkdocs.yml"), strict=True))
    assert (tmp_path / "site" / "1_first_0.png").read_bytes() == b"a picture"
    assert (tmp_path / "site" / "1_first_1.png").read_bytes() == b"another"
    assert (tmp_path / "site" / "1_first.ipynb").exists()
    return (tmp_path / "site" / "1_first.html").read_text("utf-8")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of MkDocs' packages
def test_a_page_has_the_cells_and_the_outputs_that_were_saved(page):
    assert '<a href="2_next.html#part">the next</a>' in page
    assert '<a class="md-button" href="1_first.ipynb">' in page
    assert "<p title='a'>shown\n_whole_</p>" in page
    assert '<a href="1_first_0.png"><img alt="bars [of x]" src="1_first_0.png"></a>' in page
    text = html.unescape(re.sub("<[^>]*>", "", page))
    places = [text.index(part) for part in ("x = '```'", "printed *as it is*", "shown", "{'a': 1}")]
    assert places == sorted(places)
    assert "not shown" not in text
