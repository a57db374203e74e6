"""The sparse model: the language model with transcoders in place of its MLPs; its evaluation and its export.

`export_sparse_lm` turns transcoders into MLPs, so that features are the neurons of an ordinary `TinyModel`: hook points
`mlp.hook_post` are feature activations, and everything that works on a model works on it.

A feature's encoder and decoder are a neuron's input and output weights. Its activation is exact as a JumpReLU neuron,
p where p > max(threshold, 0), for

    relu                    threshold 0 (and a plain ReLU model, if all layers are)
    jumprelu, batch_topk    the dictionary's own thresholds
    gated                   p = x·w exp(r_mag) + b_mag, threshold b_mag - b_gate exp(r_mag): the gate reads the same x·w
                            (Rajamanoharan et al. 2024, Improving Dictionary Learning with Gated SAEs, appendix)

`topk` compares features with each other, and a skip connection is a linear map: neither can be a neuron.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from tinymodel_jax.analysis.evaluation.model_passes import batches_of, clean_pass, losses_against, require_unspliced
from tinymodel_jax.analysis.evaluation.row_sums import RowSums
from tinymodel_jax.config import DictionaryConfig
from tinymodel_jax.dictionaries.dictionary import Dictionary
from tinymodel_jax.dictionaries.encoding import DictionaryParams
from tinymodel_jax.dictionaries.sites import Site
from tinymodel_jax.lm import TinyModel
from tinymodel_jax.lm.text import rows_of
from tinymodel_jax.model.hook_points import as_names
from tinymodel_jax.model.interventions import Scale
from tinymodel_jax.runtime.progress import Track, no_progress
from tinymodel_jax.runtime.rows import row_devices

_RATIOS = {
    "ce_clean": ("clean", "targets"),
    "ce_sparse": ("sparse", "targets"),
    "ce_with_errors": ("with_errors", "targets"),
    "ce_zero_ablated": ("zeroed", "targets"),
    "ce_recovered": (("zeroed", "sparse"), ("zeroed", "clean")),
    "kl": ("kl", "targets"),
    "kl_with_errors": ("kl_with_errors", "targets"),
}
_QUANTITIES = ("targets", "clean", "sparse", "kl", "with_errors", "kl_with_errors", "zeroed")


class SparseModelEvaluation(NamedTuple):
    """What the model loses when it runs through several dictionaries at once; nats, plain floats."""

    ce_clean: float
    """Cross-entropy of the model, nats per predicted token."""
    ce_sparse: float
    """Cross-entropy with all predictions in place; each dictionary reads what those before it have changed."""
    ce_with_errors: float
    """The same with each dictionary's error added back: equal to `ce_clean` up to rounding."""
    ce_zero_ablated: float
    """Cross-entropy with zeros in place of all of them."""
    ce_recovered: float
    """(zero-ablated - sparse) / (zero-ablated - clean)."""
    kl: float
    """KL divergence of the sparse model's next-token distribution from the clean one's, nats per predicted token."""
    kl_with_errors: float
    """The same with each dictionary's error added back: 0 up to rounding."""
    margins: dict[str, float]
    """Name of a number above -> half-width of its 95 % confidence interval over rows; NaN for a single row."""


def mlp_tags(lm: TinyModel) -> tuple[str, ...]:
    """Return the sites of all MLPs' transcoders."""
    return tuple(f"M{layer}" for layer in range(lm.config.n_layers))


def evaluate_sparse_model(
    lm: TinyModel,
    rows: Any,
    tags: str | Iterable[str] | None = None,
    *,
    track: Track = no_progress,
) -> SparseModelEvaluation:
    """Measure the model that runs through several dictionaries at once, with and without their errors.

    Args:
        rows: stories, or integers (rows, seq), right-padded with `[PAD]`.
        tags: sites; None is the transcoders of all MLPs.
        track: wraps the iterator over batches, for example with a progress bar.

    Raises:
        ValueError: no site is named, one has no dictionary, the model is spliced there, or the rows hold no token to
            predict.

    Examples:
        >>> from tinymodel_jax import TinyModel
        >>> from tinymodel_jax.analysis.evaluation.sparse_lm import evaluate_sparse_model
        >>> lm = TinyModel("mini")
        >>> rows = ["The dog ran to the woods.", "Lily saw a red ball."]
        >>> measured = evaluate_sparse_model(lm, rows)
        >>> abs(measured.ce_with_errors - measured.ce_clean) < 1e-3
        True
    """
    tags = _named(lm, tags)
    if not tags:
        raise ValueError("evaluate_sparse_model: no site is named; name one or more (None: all MLPs).")
    places = {name for tag in tags for name in lm[tag].dictionary.config.hooks_out}
    require_unspliced(lm, tuple(places))
    model, sparse, with_errors = lm.hooked(), lm.splice(tags).hooked(), lm.splice(tags, include_error=True).hooked()
    zeroed = model.with_hooks({place: Scale(0.0) for place in places})
    devices = row_devices(sparse)
    model, sparse, with_errors, zeroed = devices.shared((model, sparse, with_errors, zeroed))
    sums = RowSums(_QUANTITIES)
    for batch in track(batches_of(rows_of(lm, rows), lm.config, devices), "measuring the sparse model"):
        targets, ids = np.sum(batch[:, 1:] != lm.config.pad_id, axis=1), devices.rows(batch)
        clean = clean_pass(model, ids)
        totals: dict[str, Any] = {"targets": targets, "clean": clean.nats}
        totals["sparse"], totals["kl"] = np.asarray(losses_against(sparse, ids, clean.logprobs))
        totals["with_errors"], totals["kl_with_errors"] = np.asarray(losses_against(with_errors, ids, clean.logprobs))
        totals["zeroed"], _ = np.asarray(losses_against(zeroed, ids, clean.logprobs))
        sums.add(totals, where=targets > 0)
    sums.add_other_processes()
    found = {name: sums.ratio(*pair) for name, pair in _RATIOS.items()}
    margins = {name: estimate.margin for name, estimate in found.items()}
    return SparseModelEvaluation(**{name: estimate.value for name, estimate in found.items()}, margins=margins)


def export_sparse_lm(lm: TinyModel, tags: str | Iterable[str] | None = None) -> TinyModel:
    """Return a model whose MLPs are transcoders: its neurons are features, its log-probabilities the spliced model's.

    MLPs without a transcoder keep their neurons. If layers differ in size, silent neurons fill up the smaller ones.

    Args:
        tags: sites of transcoders (`M0`, `T2`); None is those of all MLPs.

    Raises:
        ValueError: a site has no dictionary or is not an MLP, two are in one layer, a dictionary has no equal MLP
            (topk, skip), or the model is spliced already or computes in bfloat16, where neurons are rounded more than
            features, which are encoded in the dictionary's dtype.

    Examples:
        >>> from tinymodel_jax import TinyModel, export_sparse_lm
        >>> lm = TinyModel("mini")
        >>> exported = export_sparse_lm(lm, "M2")
        >>> lm.config.mlp_activation, exported.config.mlp_activation, exported.config.d_mlp
        ('relu', 'jumprelu', 512)
    """
    tags = _named(lm, tags)
    if lm.config.dtype != "float32":
        raise ValueError(
            f"export_sparse_lm: the model computes in {lm.config.dtype}, where its neurons would not be the features; "
            "load it with dtype='float32'."
        )
    if lm.spliced:
        raise ValueError(
            f"export_sparse_lm: the model is spliced at {', '.join(lm.spliced)}; give the model itself, and the sites "
            "as tags."
        )
    layers = {layer: dict(lm.params[f"blocks_{layer}"]["mlp"]) for layer in range(lm.config.n_layers)}
    for tag in tags:
        _require_one_dictionary_a_layer(tag, tags)
        layers[Site.parse(tag)[0].layer] = _neurons(lm[tag].dictionary, tag)
    activation = "jumprelu" if any("threshold" in mlp for mlp in layers.values()) else "relu"
    width = max(len(mlp["b_in"]) for mlp in layers.values())
    params = dict(lm.params)
    for layer, mlp in layers.items():
        if activation == "jumprelu":
            mlp = {"threshold": jnp.zeros(len(mlp["b_in"])), **mlp}
        params[f"blocks_{layer}"] = {**lm.params[f"blocks_{layer}"], "mlp": _padded(mlp, width)}
    config = dataclasses.replace(lm.config, d_mlp=width, mlp_activation=activation)
    return lm.with_params(config, params)


def _named(lm: TinyModel, tags: str | Iterable[str] | None) -> tuple[str, ...]:
    """Return tags without repeats; None is the transcoders of all MLPs."""
    if tags is None:
        return mlp_tags(lm)
    return tuple(dict.fromkeys(as_names(tags)))


def _require_one_dictionary_a_layer(tag: str, tags: Sequence[str]) -> None:
    site = Site.whole(tag, "export_sparse_lm: ")
    twins = [other for other in tags if Site.parse(other)[0].layer == site.layer]
    if len(twins) > 1:
        raise ValueError(f"export_sparse_lm: {' and '.join(twins)} are dictionaries of one MLP; name one of them.")


def _neurons(dictionary: Dictionary, tag: str) -> dict[str, Array]:
    """Return the MLP whose neurons are the dictionary's features."""
    config, params = dictionary.config, dictionary.params
    name = config.hook_in.rsplit(".", 1)[-1], config.hook_out.rsplit(".", 1)[-1]
    if name != ("hook_mlp_in", "hook_mlp_out") or config.is_crosscoder:
        raise ValueError(f"export_sparse_lm: {tag!r} is not a transcoder of an MLP; give sites M0, M1, ….")
    reasons = {
        "its features write to several MLPs": len(config.hooks_out) > 1,
        "its skip connection is linear": config.skip,
        f"{config.architecture} keeps only the k largest features": config.compares_features,
        f"it normalizes its input (normalize={config.normalize!r})": config.normalize != "none",
    }
    what = next((reason for reason, holds in reasons.items() if holds), None)
    if what is not None:
        raise ValueError(
            f"export_sparse_lm: the dictionary at {tag} cannot be an MLP: {what}. Splice it instead: "
            f"lm.splice([{tag!r}]); or train a relu, jumprelu, batch_topk or gated one without a skip connection."
        )
    if config.exclude:
        raise ValueError(
            f"export_sparse_lm: the dictionary at {tag} does not act at the tokens {config.exclude}, and neurons act "
            f"everywhere. Splice it instead: lm.splice([{tag!r}])."
        )
    mlp = {"W_in": params["W_enc"], "W_out": params["W_dec"], "b_out": params["b_dec"]} | _activation(config, params)
    if config.subtract_b_dec:
        mlp["b_in"] = mlp["b_in"] - params["b_dec"] @ mlp["W_in"]
    return mlp


def _activation(config: DictionaryConfig, params: DictionaryParams) -> dict[str, Array]:
    """Return the parameters of the MLP that depend on the architecture."""
    if config.architecture == "gated":
        gain = jnp.exp(params["r_mag"])
        threshold = params["b_mag"] - params["b_gate"] * gain
        return {"W_in": params["W_enc"] * gain, "b_in": params["b_mag"], "threshold": threshold}
    if config.architecture == "relu":
        return {"b_in": params["b_enc"]}
    return {
        "b_in": params["b_enc"],
        "threshold": jnp.broadcast_to(params["threshold"], params["b_enc"].shape),
    }


def _padded(mlp: Mapping[str, Array], width: int) -> dict[str, Array]:
    """Return the MLP with silent neurons added, up to a width."""
    more = width - len(mlp["b_in"])
    axes: dict[str, list[tuple[int, int]]] = {
        "W_in": [(0, 0), (0, more)],
        "b_in": [(0, more)],
        "threshold": [(0, more)],
        "W_out": [(0, more), (0, 0)],
        "b_out": [(0, 0)],
    }
    return {name: jnp.pad(array, axes[name]) for name, array in mlp.items()}
