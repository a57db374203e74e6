"""The real libraries and this package compute the same from each other's files, for every format and architecture.

Runs where SAELens, dictionary_learning, sparsify and circuit-tracer are installed, as `.ci/interop` does, which prints
a table of the largest differences.
"""

import importlib
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import random_params

from tinymodel_jax.config import ARCHITECTURES, DictionaryConfig
from tinymodel_jax.dictionaries.dictionary import Dictionary
from tinymodel_jax.dictionaries.encoding import param_shapes
from tinymodel_jax.io.formats.names import LIBRARIES
from tinymodel_jax.io.formats.transcoder_sets import load_transcoder_set, save_transcoder_set

torch = pytest.importorskip("torch")
for library in ("sae_lens", "dictionary_learning", "sparsify", "circuit_tracer"):
    pytest.importorskip(library)
theirs = importlib.import_module("library_dictionaries")

pytestmark = pytest.mark.filterwarnings("ignore")
TOLERANCE = 1e-5
PACKAGES: dict[str, str] = dict(
    zip(LIBRARIES, ("sae-lens", "dictionary_learning", "eai-sparsify", "circuit-tracer"), strict=True)
)

SAE, TRANSCODER = ("blocks.0.hook_mlp_out",) * 2, ("blocks.0.hook_mlp_in", "blocks.0.hook_mlp_out")
VARIETIES: dict[str, dict[str, Any]] = {
    "SAE": {"hooks": SAE},
    "SAE, b_dec subtracted": {"hooks": SAE, "subtract_b_dec": True},
    "SAE, layer_norm": {"hooks": SAE, "normalize": "layer_norm", "subtract_b_dec": True},
    "SAE, constant_norm": {"hooks": SAE, "normalize": "constant_norm"},
    "SAE, skip": {"hooks": SAE, "skip": True, "subtract_b_dec": True},
    "transcoder": {"hooks": TRANSCODER},
    "transcoder, b_dec subtracted": {"hooks": TRANSCODER, "subtract_b_dec": True},
    "transcoder, skip": {"hooks": TRANSCODER, "skip": True},
    "transcoder, unequal widths": {"hooks": TRANSCODER, "d_out": theirs.WIDTH + 2},
    "transcoder, layer_norm": {"hooks": TRANSCODER, "normalize": "layer_norm"},
}
_EQUAL = ("SAE", "SAE, b_dec subtracted", "transcoder", "transcoder, b_dec subtracted")
_OF_SPARSIFY = tuple(name for name in VARIETIES if "norm" not in name and "unequal" not in name)
_OF_CIRCUIT_TRACER = ("transcoder", "transcoder, b_dec subtracted", "transcoder, skip")
TAKEN: dict[str, dict[str, tuple[str, ...]]] = {
    "saelens": {
        **dict.fromkeys(("relu", "jumprelu", "batch_topk", "gated"), tuple(VARIETIES)),
        "topk": tuple(name for name in VARIETIES if name.startswith("SAE") and name != "SAE, skip"),
    },
    "dictionary_learning": dict.fromkeys(("relu", "topk", "batch_topk", "jumprelu", "gated"), _EQUAL),
    "sparsify": dict.fromkeys(("topk", "groupmax"), _OF_SPARSIFY),
    "circuit-tracer": dict.fromkeys(("relu", "jumprelu", "batch_topk", "gated"), _OF_CIRCUIT_TRACER),
}
"""Format -> architecture -> varieties that it has room for."""


def inputs() -> Any:
    return torch.from_numpy(np.random.default_rng(7).normal(size=(64, theirs.WIDTH)).astype(np.float32))


def largest_difference(dictionary: Dictionary, x: Any, numbers: tuple[Any, Any]) -> float:
    """Return the largest absolute difference of activations and predictions."""
    ours = np.asarray(dictionary.encode(x.numpy())), np.asarray(dictionary(x.numpy()))
    return max(float(np.abs(own - other).max()) for own, other in zip(ours, numbers, strict=True))


@pytest.mark.parametrize("case", theirs.CASES, ids=lambda case: f"{case.library} {case.name}")
def test_what_a_library_writes_is_read(case, tmp_path, differences):
    x = inputs()
    numbers = case.make(tmp_path / "dictionary", theirs.Sizes())(x)
    assert (numbers.encode > 0).any()
    dictionary = Dictionary.from_pretrained(tmp_path / "dictionary", case.site)
    found = largest_difference(dictionary, x, numbers)
    differences.append(("read", case.library, case.name, found))
    assert found < TOLERANCE


def ours(architecture: Any, hooks: tuple[str, str], **options: Any) -> Dictionary:
    k = 5 if architecture in ("topk", "batch_topk", "groupmax") else None
    fields = {"d_in": theirs.WIDTH, "d_out": theirs.WIDTH, "n_features": 40, "k": k, **options}
    config = DictionaryConfig(*hooks, architecture=architecture, **fields)
    return Dictionary.from_params(config, random_params(param_shapes(config), 3, 0.3))


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_this_package_writes_is_loaded_and_the_rest_is_refused(library, architecture, tmp_path, differences):
    x, largest = inputs(), {}
    for name, options in VARIETIES.items():
        dictionary, folder = ours(architecture, **options), tmp_path / name
        if name not in TAKEN[library].get(architecture, ()):
            with pytest.raises(ValueError, match="Nothing was written"):
                dictionary.save_pretrained(folder, format=library)
            assert not folder.exists()
            continue
        dictionary.save_pretrained(folder, format=library)
        numbers = theirs.their_numbers(library, folder, x)
        again = Dictionary.from_pretrained(folder)
        hooks = again.config.hook_in, again.config.hook_out
        assert hooks == (dictionary.config.hook_in, dictionary.config.hook_out)
        largest[name] = max(largest_difference(own, x, numbers) for own in (dictionary, again))
        assert largest[name] < TOLERANCE, name
    differences += [("written", library, f"{architecture}: {name}", value) for name, value in largest.items()]


def test_heads_are_written_as_saelens_reshapes_them(tmp_path):
    dictionary, x = ours("relu", ("blocks.0.attn.hook_z", "blocks.0.attn.hook_z")), inputs()
    dictionary.save_pretrained(tmp_path, format="saelens")
    assert largest_difference(dictionary, x, theirs.their_numbers("saelens", tmp_path, x)) < TOLERANCE


@pytest.mark.parametrize(
    ("library", "architecture"),
    [("saelens", "gated"), ("dictionary_learning", "relu"), ("sparsify", "topk"), ("circuit-tracer", "jumprelu")],
)
def test_a_dictionary_in_bfloat16_is_computed_in_float32_there_too(library, architecture, tmp_path):
    dictionary, x = ours(architecture, TRANSCODER, subtract_b_dec=True, param_dtype="bfloat16"), inputs()
    dictionary.save_pretrained(tmp_path, format=library)
    assert largest_difference(dictionary, x, theirs.their_numbers(library, tmp_path, x)) < TOLERANCE


def test_a_transcoder_set_of_several_layers_is_exchanged(tmp_path):
    made = {}
    for layer in range(3):
        hooks = f"blocks.{layer}.hook_mlp_in", f"blocks.{layer}.hook_mlp_out"
        made[f"M{layer}"] = ours("jumprelu", hooks)
    save_transcoder_set(made, tmp_path)
    x = inputs()
    numbers = theirs.their_numbers("circuit-tracer", tmp_path, x)
    again = load_transcoder_set(tmp_path)
    assert list(again) == list(made)
    for tag, dictionary in made.items():
        np.testing.assert_array_equal(again[tag].encode(x.numpy()), dictionary.encode(x.numpy()))
    assert largest_difference(made["M0"], x, numbers) < TOLERANCE


@pytest.fixture(scope="session")
def differences():
    """Collect (direction, library, "architecture: what", largest difference), and print a table at the end."""
    found: list[tuple[str, str, str, float]] = []
    yield found
    print("\n\n| format | | architecture | files | largest difference |\n|---|---|---|---|---|")
    for library in LIBRARIES:
        shown = f"{PACKAGES[library]} {version(PACKAGES[library])}"
        for direction in ("read", "written"):
            groups: dict[str, list[float]] = {}
            for *key, what, value in found:
                if key == [direction, library]:
                    groups.setdefault(re.split("[ :]", what)[0], []).append(value)
            for architecture, values in groups.items():
                print(f"| {shown} | {direction} | `{architecture}` | {len(values)} | {max(values):.1e} |")


def save_vectors(folder: Path) -> None:
    """Write small dictionaries of each library with what it computes, some of which are in tests/data/formats."""
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32))
    for case in theirs.CASES:
        own = folder / case.library / case.name.replace(" ", "_")
        numbers = case.make(own, theirs.Sizes(6, 8, 2))(x)
        np.savez(own / "io.npz", x=x.numpy(), site=case.site, encode=numbers.encode, forward=numbers.forward)
