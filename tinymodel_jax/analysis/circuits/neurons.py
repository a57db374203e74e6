"""The neurons of an MLP as a transcoder: its features are the neurons, and it has no error."""

from __future__ import annotations

from tinymodel_jax.config import DictionaryConfig
from tinymodel_jax.dictionaries.dictionary import Dictionary
from tinymodel_jax.lm import TinyModel

NEURONS = "neurons"
"""What stands for the neurons of all MLPs where dictionaries are named."""
_PARAMS = {"W_in": "W_enc", "b_in": "b_enc", "W_out": "W_dec", "b_out": "b_dec", "threshold": "threshold"}


def neurons_tag(layer: int) -> str:
    """Return what stands for a tag, such as "L2 MLP"."""
    return f"L{layer} MLP"


def is_neurons(tag: str) -> bool:
    """Whether a tag is that of the neurons of an MLP."""
    return tag.endswith(" MLP")


def dictionary_at(lm: TinyModel, tag: str) -> Dictionary:
    """Return the dictionary of the model with a tag, or the neurons that it stands for."""
    return neurons(lm, int(tag.split()[0][1:])) if is_neurons(tag) else lm[tag].dictionary


def neurons(lm: TinyModel, layer: int) -> Dictionary:
    """Return the neurons of an MLP as a transcoder."""
    config, mlp = lm.config, lm.params[f"blocks_{layer}"]["mlp"]
    hooks = (f"blocks.{layer}.hook_mlp_in", f"blocks.{layer}.hook_mlp_out")
    own = DictionaryConfig(*hooks, config.d_model, config.d_model, config.d_mlp, architecture=config.mlp_activation)
    return Dictionary.from_params(own, {_PARAMS[name]: array for name, array in mlp.items()})
