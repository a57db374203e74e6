"""The package's layers: the table, what every file imports, and the picture of both.

    python tests/layers.py docs/images/layers.svg

draws the picture that CONTRIBUTING.md shows. `test_layers.py` checks the table.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent

TITLES = (
    "names, shapes and rules; how programs run here",
    "texts as rows of ids; dictionaries and their sites",
    "the transformer and what runs it",
    "data that comes with the package",
    "files and the network",
    "the façade, and training without it",
    "analysis",
    "commands",
    "programs that are run from a clone",
)
"""What each layer is, from the lowest."""
LAYERS = {
    "config": 0,
    "json_config": 0,
    "number_formats": 0,
    "block_order": 0,
    "params": 0,
    "runtime": 0,
    "text": 1,
    "dictionaries": 1,
    "model": 2,
    "bundled": 3,
    "io": 4,
    "lm": 5,
    "training": 5,
    "analysis": 6,
    "commands": 7,
    "__main__": 7,
    "convert_torch_weights": 8,
    "train": 8,
}
"""A module or folder, and its layer. A file imports lower layers and its own folder."""


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


def imported_units() -> dict[str, set[str]]:
    """Return the lower units that each unit imports when it is imported, without those that these import themselves."""
    direct = {unit: set[str]() for unit in LAYERS}
    for path in files():
        unit = unit_of(path)
        direct[unit] |= {
            other for other, is_later in our_imports(path) if LAYERS[other] < LAYERS[unit] and not is_later
        }
    beneath: dict[str, set[str]] = {}  # all that a unit reaches
    for unit in sorted(LAYERS, key=LAYERS.__getitem__):
        beneath[unit] = direct[unit].union(*(beneath[other] for other in direct[unit]))
    return {unit: found - {far for near in found for far in beneath[near]} for unit, found in direct.items()}


def draw(path: Path) -> None:
    """Write the picture: a band for every layer, a box for every unit, an arrow for every import that none implies."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    rows = {layer: [unit for unit in LAYERS if LAYERS[unit] == layer] for layer in range(len(TITLES))}
    places = {
        unit: ((number + (0.35 if layer % 2 else 0.65)) / len(units), layer)  # staggered, so that arrows pass by boxes
        for layer, units in rows.items()
        for number, unit in enumerate(units)
    }
    figure = Figure(figsize=(9, 0.95 * len(TITLES)), layout="constrained")
    axes = figure.subplots()
    for layer, title in enumerate(TITLES):
        axes.axhspan(layer - 0.4, layer + 0.4, color="#3b6fb6", alpha=0.10, linewidth=0)
        axes.text(0.004, layer + 0.36, f"{layer}  {title}", va="top", fontsize=8, color="#555")
    for unit, found in imported_units().items():
        for other in found:
            axes.annotate(
                "",
                (places[other][0], places[other][1] + 0.1),
                (places[unit][0], places[unit][1] - 0.3),
                arrowprops={"arrowstyle": "-|>", "color": "#888", "linewidth": 0.7, "shrinkA": 0, "shrinkB": 0},
            )
    for unit, (x, y) in places.items():
        box = {"boxstyle": "round,pad=0.35", "facecolor": "white", "edgecolor": "#3b6fb6"}
        axes.text(x, y - 0.1, shown(unit), ha="center", va="center", fontsize=9, family="monospace", bbox=box)
    axes.set(xlim=(0, 1), ylim=(-0.5, len(TITLES) - 0.5))
    axes.axis("off")
    with mpl.rc_context({"svg.hashsalt": "layers", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(path, format="svg", metadata={"Date": None})


def shown(unit: str) -> str:
    folder = ROOT / unit if LAYERS[unit] == len(TITLES) - 1 else ROOT / "tinymodel_jax" / unit
    return f"{unit}/" if folder.is_dir() else f"{unit}.py"


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
