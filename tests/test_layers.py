"""Which file may import which: the package's layers, and what importing it may load."""

import re
import subprocess
import sys

import pytest
from layers import LAYERS, ROOT, TITLES, draw, files, imports, our_imports, shown, unit_of

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


def test_the_picture_names_every_layer_and_unit(tmp_path):
    draw(tmp_path / "layers.svg")
    for picture in (tmp_path / "layers.svg", ROOT / "docs/images/layers.svg"):
        text = picture.read_text("utf-8")
        assert not [name for name in (*TITLES, *map(shown, LAYERS)) if name not in text]
