"""The notebooks of the documentation: saved as they ran, small, and without errors when they run again."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "docs").rglob("*.ipynb"))
LARGEST_NOTEBOOK, LARGEST_OUTPUT = 400_000, 100_000
"""Bytes of a notebook's file, and of one output in it."""
SECONDS = 600
"""Time in which every cell must finish here, where other tests run at the same time."""
INSTALL = '%pip install -q "tinymodel-jax[hub,train]"'
NO_NETWORK = """
import socket

def connect(self, address):
    assert address[0] in ("127.0.0.1", "::1"), f"a tutorial connects to {address}"
    return connect_anywhere(self, address)

connect_anywhere, socket.socket.connect = socket.socket.connect, connect
"""
"""What runs before the first cell: an error for connections to other machines."""

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook: Any) -> Iterator[Any]:
    for cell in code_cells(notebook):
        yield from cell.outputs


@each_notebook
def test_a_notebook_is_valid_and_starts_with_its_title(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    first, *rest = notebook.cells
    assert first.cell_type == "markdown"
    assert first.source.startswith("# ")
    titles = [line for cell in rest if cell.cell_type == "markdown" for line in cell.source.splitlines()]
    assert not [line for line in titles if line.startswith("# ")], "a page has one title"
    assert notebook.metadata.kernelspec.name == "python3"


@each_notebook
def test_the_first_code_cell_installs_the_package_only_where_it_is_missing(path):
    first, *rest = code_cells(nbformat.read(path, as_version=4))
    assert INSTALL in first.source
    assert 'find_spec("tinymodel_jax")' in first.source
    assert not [cell for cell in rest if "pip install" in cell.source]


@each_notebook
def test_a_notebook_is_saved_as_it_ran_from_top_to_bottom(path):
    cells = code_cells(nbformat.read(path, as_version=4))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert sum(bool(cell.outputs) for cell in cells) >= len(cells) / 2


@each_notebook
def test_the_saved_outputs_are_small_and_hold_no_errors_or_warnings(path):
    assert path.stat().st_size < LARGEST_NOTEBOOK
    for output in outputs(nbformat.read(path, as_version=4)):
        assert output.output_type != "error"
        assert output.get("name") != "stderr", output.text
        assert len(json.dumps(output)) < LARGEST_OUTPUT


@each_notebook
def test_a_notebook_names_no_folder_of_the_machine_that_ran_it(path):
    assert not re.findall(r"/(?:home|root|tmp|work)/[^\s\"\\]*", path.read_text("utf-8"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the Jupyter packages
@each_notebook
def test_a_notebook_runs_from_top_to_bottom_without_a_network(path, tmp_path, monkeypatch):
    from nbclient import NotebookClient

    monkeypatch.delenv("XLA_FLAGS")  # conftest.py's are for short tests; a notebook compiles as its readers do
    assert not os.environ.get("PYTHONPATH")
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(NO_NETWORK))
    NotebookClient(notebook, timeout=SECONDS, resources={"metadata": {"path": tmp_path}}).execute()
    assert [output.text for output in outputs(notebook) if output.get("name") == "stderr"] == []
