"""Which file may import which: the package's layers, and what importing it may load."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

LAYERS = {
    # 0: names, shapes and rules; each stands alone
    "config": 0,
    "hook_points": 0,
    "sites": 0,
    "tokenization": 0,
    "tokenizer_files": 0,
    "transliteration": 0,
    "initializers": 0,
    "compilation": 0,
    "allocator": 0,
    "machine": 0,
    "progress": 0,
    "tables": 0,
    "padding": 0,
    "weights": 0,
    "atomic_files": 0,
    "paths": 0,
    "shapes": 0,
    # 1: the two things with parameters, which do not know each other; texts as rows of ids
    "transformer": 1,
    "dictionary": 1,
    "texts": 1,
    # 2: what runs them
    "forward": 2,
    "edits": 2,
    "interventions": 2,
    "generate": 2,
    # 3: files and the network
    "io": 3,
    "bundled": 3,
    # 4: the façade
    "lm": 4,
    # 5: what is built on it
    "analysis": 5,
    "training": 5,
    # 6: what shows it, and commands
    "quickstart": 6,
    "commands": 6,
    "cli": 6,
    "__main__": 6,
    "convert_torch_weights": 6,
    # 7: programs that are run from a clone
    "train": 7,
}
"""A module or folder, and its layer. A file imports lower layers and its own folder."""

SIBLINGS = {
    # both describe what a ModelConfig says: names of its hook points, lengths up to its context
    ("hook_points", "config"),
    ("padding", "config"),
    # the file format of what it is
    ("tokenization", "tokenizer_files"),
    # how a file is written
    ("tokenizer_files", "atomic_files"),
    # the first step of cleaning
    ("tokenization", "transliteration"),
    # what a user's path means
    ("tokenization", "paths"),
    ("atomic_files", "paths"),
    # how a command reports errors and progress
    ("convert_torch_weights", "commands"),
    # where the model is that comes with the package
    ("io", "bundled"),
    # how edits are built
    ("interventions", "edits"),
    # what the command runs
    ("commands", "quickstart"),
    ("cli", "commands"),
    # the command itself
    ("__main__", "cli"),
}
"""Imports inside one layer: (importer, imported)."""

UPWARD = {
    # `Dictionary.from_pretrained` and `.save_pretrained` are methods for the user's sake; the import waits for a call
    ("dictionary", "io"),
}
"""Imports of a higher layer, inside functions only."""

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
    """Yield the dotted name of everything a file imports, and whether it does so inside a function."""
    tree = ast.parse(path.read_text("utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    inside = {id(child) for function in functions for child in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the layer; write the package's name"
            yield from ((f"{node.module}.{alias.name}", id(node) in inside) for alias in node.names)


def our_imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Yield the unit of the table behind each of a file's imports of this project."""
    for name, in_function in imports(path):
        parts = name.split(".")
        if parts[0] == "tinymodel_jax":
            # `from tinymodel_jax import TinyModel` goes through the public names, which the façade crowns
            yield (parts[1] if len(parts) > 1 and parts[1] in LAYERS else "lm"), in_function
        elif parts[0] in ("train", "convert_torch_weights"):
            yield parts[0], in_function


def test_every_file_has_a_layer():
    assert {unit_of(path) for path in files()} <= set(LAYERS)


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_lower_layers_or_its_own_folder(path):
    importer = unit_of(path)
    for imported, in_function in our_imports(path):
        allowed = (
            imported == importer
            or LAYERS[imported] < LAYERS[importer]
            or (importer, imported) in SIBLINGS
            or ((importer, imported) in UPWARD and in_function)
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
