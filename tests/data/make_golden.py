"""Cut the golden vectors of the reference package down to what the tests use.

    python tests/data/make_golden.py GOLDEN_DIR

GOLDEN_DIR holds the full set that `README.md` here describes. Values are copied, never computed: what is left out is a
duplicate of something kept (checked here), or not used by a test.
"""

import sys
from pathlib import Path

import numpy as np

from tinymodel_jax import load_torch_file

HERE = Path(__file__).parent
WHOLE_FILES = ("generate.json", "parse_mlp_tag.json", "lm_grads_adamw.npz", "sparse_acts_readonly.npz")
OUTPUTS = ("tok", "tok_full", "tok1", "logp", "logp_full", "logp_tok1", "logp_bf16_weights_in_f32")
LAYERS = range(4)
TWINS = {"attn.attn_inp": "res_attn", "mlp.mlp_inp": "res_mlp"}
"""Hook points of the reference whose value equals another's."""


def hooks(golden: Path) -> dict[str, np.ndarray]:
    """Return every distinct hook value of the first of the two sequences."""
    full, outputs = np.load(golden / "lm_hooks.npz"), np.load(golden / "lm_outputs.npz")
    kept = {name: full[name][:1] for name in full.files}
    for layer in LAYERS:
        block = f"torso.{layer}"
        for name, twin in TWINS.items():
            np.testing.assert_array_equal(kept.pop(f"{block}.{name}"), kept[f"{block}.{twin}"])
        heads = kept[f"{block}.attn.head_writeouts"].transpose(0, 2, 1, 3)
        np.testing.assert_array_equal(
            kept.pop(f"{block}.attn.catted_head_writeouts"), heads.reshape(*heads.shape[:2], -1)
        )
        np.testing.assert_array_equal(outputs[f"resid_{layer}"][:1], kept[f"{block}.res_attn"])
        if layer:
            np.testing.assert_array_equal(kept.pop(f"torso.{layer - 1}.res_final"), kept[f"{block}.res_attn"])
    np.testing.assert_array_equal(outputs["resid_final"][:1], kept["torso.3.res_final"])
    return kept


def spliced(golden: Path) -> dict[str, np.ndarray]:
    """Return all gradients; values of the first sequence, without those that equal the plain model's."""
    full = np.load(golden / "splice.npz")
    plain = np.load(golden / "lm_outputs.npz")
    kept = {}
    for name in full.files:
        case, what = name.split("/", 1)
        if what.startswith("grad/"):
            kept[name] = full[name]
        elif "err=1" in case:
            # With the error term the values are the plain model's, up to the rounding that the reference reports.
            same = plain["logp"] if what == "logp" else plain["resid_2"]
            np.testing.assert_allclose(full[name], same, rtol=0, atol=2e-5)
        elif "wipe" not in case:
            kept[name] = full[name][:1]
    return kept


def dictionaries(golden: Path) -> dict[str, np.ndarray]:
    """Return the tensors of the twenty dictionaries as `TAG/KEY`."""
    groups = load_torch_file(golden / "sparse_all_tags_f32.pt")
    return {f"{tag}/{key}": tensor for tag, tensors in groups.items() for key, tensor in tensors.items()}


def main(golden: Path) -> None:
    """Write every file of golden vectors beside this script."""
    for name in WHOLE_FILES:
        (HERE / name).write_bytes((golden / name).read_bytes())
    outputs = np.load(golden / "lm_outputs.npz")
    subsets = {
        "lm_outputs": {name: outputs[name] for name in OUTPUTS},
        "lm_hooks": hooks(golden),
        "splice": spliced(golden),
        "sparse_all_tags": dictionaries(golden),
    }
    for name, arrays in subsets.items():
        np.savez_compressed(HERE / f"{name}.npz", allow_pickle=False, **arrays)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
