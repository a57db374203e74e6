"""Links between features of different dictionaries by their weights: upstream and downstream features.

A link's value is the direct weight of `analysis.circuits.virtual_weights`: what one unit of the source's activation
adds to the target's pre-activation. A dictionary of the stream itself (Ra, Rm) has downstream features, because its
directions lie in the stream. It adds nothing to the stream, so it is never upstream.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from tinymodel_jax.analysis.circuits.virtual_weights import (
    Links,
    are_fixed,
    rows_read,
    rows_written,
    strongest_products,
)
from tinymodel_jax.analysis.search.stream_directions import adds_to_stream, reaches
from tinymodel_jax.lm import TinyModel
from tinymodel_jax.runtime.progress import Track, no_progress


class WeightsGraph(NamedTuple):
    """Links of all features of one dictionary, by the tags of other dictionaries."""

    upstream: dict[str, Links]
    """Features with the largest absolute direct weights."""
    downstream: dict[str, Links]
    """Features with the largest absolute direct weights."""


def weights_graph(
    lm: TinyModel,
    tag: str,
    others: Iterable[str],
    top: int = 8,
    track: Track = no_progress,
) -> WeightsGraph:
    """Return the links of all features of `lm[tag]`.

    Args:
        others: tags of dictionaries to link to; those that are neither upstream nor downstream in the forward pass
            are skipped, and those whose weights differ between inputs because of `normalize`.
        top: largest number of links of a feature to each dictionary.
        track: wraps the iterator over dictionaries, for example with a progress bar.

    Raises:
        ValueError: a site has no dictionary.
    """
    own = lm[tag].dictionary
    upstream, downstream = {}, {}
    for other in track(list(others), "weights"):
        theirs = lm[other].dictionary
        up, down = ((theirs.config, own.config), (own.config, theirs.config))
        n = min(top, theirs.config.n_features)
        if reaches(*up) and are_fixed(*up) and adds_to_stream(theirs.config.hook_out):
            upstream[other] = strongest_products(rows_read(lm, own), rows_written(lm, theirs), n)
        if reaches(*down) and are_fixed(*down):
            downstream[other] = strongest_products(rows_written(lm, own), rows_read(lm, theirs), n)
    return WeightsGraph(upstream, downstream)
