"""Which file may import which: the package's layers, and what importing it may load."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

LAYERS = {
    # 0: names, shapes and rules; how programs run here
    "config": 0,
    "json_config": 0,
    "number_formats": 0,
    "block_order": 0,
    "params": 0,
    "runtime": 0,
    # 1: texts as rows of ids; dictionaries and their sites
    "text": 1,
    "dictionaries": 1,
    # 2: the transformer and what runs it
    "model": 2,
    # 3: data that comes with the package
    "bundled": 3,
    # 4: files and the network
    "io": 4,
    # 5: the façade, and training without it
    "lm": 5,
    "training": 5,
    # 6: what is built on it
    "analysis": 6,
    # 7: commands
    "commands": 7,
    "__main__": 7,
    # 8: programs that are run from a clone
    "convert_torch_weights": 8,
    "train": 8,
}
"""A module or folder, and its layer. A file imports lower layers and its own folder."""

SIBLINGS = {
    # what the configurations are made of
    ("config", "json_config"),
    ("config", "number_formats"),
    # the command itself
    ("__main__", "commands"),
}
"""Imports inside one layer: (importer, imported)."""

UPWARD = {
    # `Dictionary.from_pretrained` and `.save_pretrained` are methods for the user's sake; the import waits for a call
    ("dictionaries", "io"),
    # `lm["M2N5"].show(text)` is a method for the same reason
    ("lm", "analysis"),
}
"""Imports of a higher layer, inside functions or for annotations only."""

FORBIDDEN = {"torch": (), "optax": ("training",), "orbax": ("train", "training")}
"""Packages that only the given units may import."""


def files() -> list[Path]:
    paths = [*ROOT.glob("tinymodel_jax/**/*.py"), *ROOT.glob("train/**/*.py"), ROOT / "convert_torch_weights.py"]
    return sorted(path for path in paths if path != ROOT / "tinymodel_jax/__init__.py")


def unit_of(path: Path) -> str:
    """Return the module or folder of the table that a file belongs to."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[1] if parts[0] == "tinymodel_jax" else parts[0]


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Yield the dotted name of everything a file imports, and whether it does so later than when it is imported.

    Later is inside a function, or never, for annotations only.
    """
    tree = ast.parse(path.read_text("utf-8"))
    later = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    later += [node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    inside = {id(child) for node in later for child in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the layer; write the package's name"
            yield from ((f"{node.module}.{alias.name}", id(node) in inside) for alias in node.names)


def our_imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Yield the unit of the table behind each of a file's imports of this project, and whether it is one for later."""
    for name, is_later in imports(path):
        parts = name.split(".")
        if parts[0] == "tinymodel_jax":
            # `from tinymodel_jax import TinyModel` goes through the public names, which include the façade
            yield (parts[1] if len(parts) > 1 and parts[1] in LAYERS else "lm"), is_later
        elif parts[0] in ("train", "convert_torch_weights"):
            yield parts[0], is_later


def test_every_file_has_a_layer():
    assert {unit_of(path) for path in files()} <= set(LAYERS)


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_lower_layers_or_its_own_folder(path):
    importer = unit_of(path)
    for imported, is_later in our_imports(path):
        allowed = (
            imported == importer
            or LAYERS[imported] < LAYERS[importer]
            or (importer, imported) in SIBLINGS
            or ((importer, imported) in UPWARD and is_later)
        )
        assert allowed, f"{importer} (layer {LAYERS[importer]}) imports {imported} (layer {LAYERS[imported]})"


def test_every_exception_to_the_layers_is_in_use():
    used = {(unit_of(path), imported) for path in files() for imported, _ in our_imports(path)}
    assert used >= SIBLINGS | UPWARD


@pytest.mark.parametrize("package", FORBIDDEN)
def test_a_heavy_package_is_imported_where_it_belongs_only(package):
    users = {unit_of(path) for path in files() for name, _ in imports(path) if name.split(".")[0] == package}
    assert users <= set(FORBIDDEN[package])


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout


def test_importing_the_package_loads_nothing_heavy():
    heavy = [
        "torch",
        "optax",
        "orbax",
        "datasets",
        "transformers",
        "huggingface_hub",
        "matplotlib",
        "jax",
        "flax",
        "numpy",
        "tokenizers",
    ]
    assert run(f"import sys, tinymodel_jax; print(sorted(set(sys.modules) & set({heavy})))") == "[]\n"


def test_importing_every_public_name_opens_no_connection_and_no_model():
    code = """
import sys

def watch(event, arguments):
    if event.startswith("socket.") or (event == "open" and str(arguments[0]).endswith((".safetensors", ".pt"))):
        raise SystemExit(f"{event} {arguments}")

sys.addaudithook(watch)
import tinymodel_jax
print(all(getattr(tinymodel_jax, name) is not None for name in tinymodel_jax.__all__))
print(sorted({"torch", "optax", "orbax", "huggingface_hub"} & set(sys.modules)))
"""
    assert run(code) == "True\n[]\n"


def test_every_public_name_is_listed_and_an_unknown_one_is_an_attribute_error():
    import tinymodel_jax

    assert set(dir(tinymodel_jax)) == set(tinymodel_jax.__all__)
    with pytest.raises(AttributeError, match="no attribute 'TinyModle'"):
        _ = tinymodel_jax.TinyModle


@pytest.mark.parametrize("name", ["attribution", "evaluation", "importance", "patching", "sweeps", "top_activations"])
def test_an_analysis_is_imported_by_its_name(name):
    module = getattr(__import__("tinymodel_jax.analysis", fromlist=[name]), name)  # a `from` import
    assert module.__name__.split(".")[-1] == name


def test_importing_the_plots_loads_neither_matplotlib_nor_jinja2():
    code = "import sys; from tinymodel_jax.analysis import report; report.plot_pareto; print(sorted(sys.modules))"
    assert not {"'matplotlib'", "'jinja2'"} & set(re.findall(r"'\w+'", run(code)))


def test_interventions_are_imported_from_the_package():
    from tinymodel_jax import interventions

    assert interventions.Add.__module__.startswith("tinymodel_jax.model.")
