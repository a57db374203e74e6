"""The frozen pass: one prompt with its attention patterns, active features and errors held fixed.

There is no layer norm, so with the patterns fixed the residual stream is a linear function of what is written to it:
embeddings, biases, each feature's activation times its decoder row, and the errors of the dictionaries. The
pre-activation of a feature is a linear function of the stream.

A `FrozenPass` contains everything that these sums are made of. Streams and activations are computed again in the chosen
number format, so that the sums hold to its rounding. Patterns, active features and the outputs of MLPs are those of the
model's own pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Literal

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from tinymodel_jax.config import ModelConfig

Part = Literal["attn", "mlp"]
Precision = Literal["float32", "float64"]


@struct.dataclass
class FrozenDictionary:
    """The active features of one dictionary on one prompt, and its error.

    Axes: `u` features active at some position, `n` features active at one position, `s` positions, `d` d_model; all but
    `d` are padded. Weights are those of the active features alone.
    """

    tag: str = struct.field(pytree_node=False)
    """That of a dictionary of the model, or of neurons."""
    layer: int = struct.field(pytree_node=False)
    """Layer, counted from 0."""
    part: Part = struct.field(pytree_node=False)
    """Whose output it predicts: "attn" or "mlp"."""
    features: Int[Array, " u"]
    """Numbers of the features in the dictionary; -1 in the padding."""
    W_enc: Float[Array, "u d"]
    """Encoder directions, one per row."""
    b_enc: Float[Array, " u"]
    """The pre-activation of a zero input."""
    W_dec: Float[Array, "u d"]
    """Decoder directions, one per row."""
    b_dec: Float[Array, " d"]
    """The prediction without features."""
    W_skip: Float[Array, "d d"] | None
    """Matrix of the skip connection; None without one."""
    acting: Bool[Array, " s"]
    """Positions of the prompt whose tokens it does not exclude; at the others, all of the value is error."""
    where: Int[Array, "s n"]
    """The active features of each position, as indices into `features`."""
    active: Bool[Array, "s n"]
    """Which entries of `where` are not padding."""
    acts: Float[Array, "s n"]
    """Their activations, which equal their pre-activations; 0 in the padding."""
    error: Float[Array, "s d"]
    """The model's value less the prediction; 0 where that is only the rounding of the model's own pass."""


@struct.dataclass
class FrozenPass:
    """The frozen pass of one prompt, as `frozen_pass` returns it.

    Axes: `l` layers, `h` heads, `s` and `t` positions (padded), `d` d_model, `k` d_head.

    Examples:
        >>> from tinymodel_jax import TinyModel
        >>> from tinymodel_jax.analysis import circuits
        >>> lm = TinyModel("mini")
        >>> frozen = circuits.frozen_pass(lm, "The dog ran", dtype="float32")
        >>> frozen.patterns.shape[:2], frozen.final.shape[1]
        ((4, 8), 128)
    """

    config: ModelConfig = struct.field(pytree_node=False)
    """Shape of the model."""
    length: Int[Array, ""]
    """Number of tokens of the prompt; everything that is written at the other positions is 0."""
    tok_ids: Int[Array, " s"]
    """Token ids, with padding."""
    embed: Float[Array, "s d"]
    """Token embeddings."""
    pos_embed: Float[Array, "s d"]
    """Position embeddings."""
    patterns: Float[Array, "l h s t"]
    """Attention patterns: query position, key position."""
    W_V: Float[Array, "l h d k"]
    """Value matrices of the heads."""
    W_O: Float[Array, "l h k d"]
    """Output matrices of the heads."""
    b_O: Float[Array, "l d"]
    """Output biases of the attention layers."""
    dictionaries: tuple[FrozenDictionary, ...]
    """In the order of the forward pass: one of each layer's MLP, and those of attention outputs."""
    final: Float[Array, "s d"]
    """The final residual stream."""

    def of_layer(self, layer: int) -> tuple[FrozenDictionary, ...]:
        """Return the dictionaries of a layer, in the order of the forward pass."""
        return tuple(d for d in self.dictionaries if d.layer == layer)

    def everywhere(self, bias: Float[Array, " d"]) -> Float[Array, "s d"]:
        """Return a bias at each of the prompt's positions, and 0 in the padding."""
        return jnp.where(jnp.arange(len(self.embed))[:, None] < self.length, bias, 0)

    def at(self, part: Part, layer: int) -> FrozenDictionary | None:
        """Return the dictionary of the output of a layer's attention or MLP; None if there is none.

        Args:
            part: "attn" or "mlp".
            layer: layer, counted from 0.
        """
        return next((d for d in self.dictionaries if (d.part, d.layer) == (part, layer)), None)


@contextlib.contextmanager
def exact(dtype: Precision) -> Iterator[None]:
    """Compute in a number format inside the block: float64 needs JAX's switch, float32 full matrix products."""
    with jax.enable_x64(dtype == "float64"), jax.default_matmul_precision("highest"):
        yield


def run_frozen(
    frozen: FrozenPass,
    valued: Callable[[FrozenDictionary, Array], FrozenDictionary],
    added: Callable[[int, str], Array | float] = lambda layer, part: 0.0,
) -> tuple[Array, list[FrozenDictionary], list[Array]]:
    """Compute the stream from what is written to it.

    Args:
        valued: gets each dictionary and what it reads (s, d); returns it with the activations and error to write.
        added: layer and "b_O", "attn" or "mlp" (-1 and "embed" for the embeddings) -> what is written there as well.

    Returns: the final stream (s, d), the valued dictionaries, and what each reads.
    """
    stream, found, reads = frozen.embed + frozen.pos_embed + added(-1, "embed"), [], []

    def predicted(dictionary: FrozenDictionary, read: Array) -> Array:
        reads.append(read)
        found.append(valued(dictionary, read))
        return prediction(found[-1], read) + found[-1].error

    for layer in range(frozen.config.n_layers):
        written = attended(frozen, layer, stream) + frozen.everywhere(frozen.b_O[layer]) + added(layer, "b_O")
        sae, transcoder = frozen.at("attn", layer), frozen.at("mlp", layer)
        stream = stream + (written if sae is None else predicted(sae, written)) + added(layer, "attn")
        assert transcoder is not None
        stream = stream + predicted(transcoder, stream) + added(layer, "mlp")
    return stream, found, reads


def attended(frozen: FrozenPass, layer: int, stream: Float[Array, "s d"]) -> Float[Array, "s d"]:
    """Return what the heads of a layer write, without the bias."""
    values = jnp.einsum("td,hdk->htk", stream, frozen.W_V[layer])
    return jnp.einsum("hst,htk,hkd->sd", frozen.patterns[layer], values, frozen.W_O[layer])


def encoded(dictionary: FrozenDictionary, read: Float[Array, "s d"]) -> Float[Array, "s n"]:
    """Return the pre-activations of the active features, given what the encoder reads."""
    pre = jnp.einsum("sd,snd->sn", read, dictionary.W_enc[dictionary.where]) + dictionary.b_enc[dictionary.where]
    return jnp.where(dictionary.active, pre, 0)


def prediction(dictionary: FrozenDictionary, read: Float[Array, "s d"]) -> Float[Array, "s d"]:
    """Return a dictionary's prediction, given what it reads."""
    written = jnp.einsum("sn,snd->sd", dictionary.acts, dictionary.W_dec[dictionary.where]) + biases(dictionary)
    return written if dictionary.W_skip is None else written + acting_only(dictionary, read) @ dictionary.W_skip


def biases(dictionary: FrozenDictionary) -> Float[Array, "s d"]:
    """Return b_dec where the dictionary acts, and 0 elsewhere."""
    return acting_only(dictionary, dictionary.b_dec)


def acting_only(dictionary: FrozenDictionary, values: Float[Array, "... d"]) -> Float[Array, "... s d"]:
    """Return values at the positions where the dictionary acts, and 0 elsewhere."""
    return jnp.where(dictionary.acting[:, None], values, 0)
