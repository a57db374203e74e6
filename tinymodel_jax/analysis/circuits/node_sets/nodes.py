"""The nodes that a circuit may hold, and their numbers.

A node is one of these at one place:

    head      what a head reads there, its value at `attn.hook_z`: the values at the keys that it attends to
    feature   the activation of a feature of an MLP's transcoder
    error     what the MLP writes there and the transcoder's features and b_dec do not: its error, its skip connection

Together with the biases, these are everything that is written to the residual stream after the embeddings.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

CIRCUIT_NODE = np.dtype(
    [("kind", "U7"), ("site", "U32"), ("layer", "i4"), ("place", "i4"), ("index", "i4"), ("effect", "f8")]
)
"""Fields of a node, a NumPy structured dtype.

- `kind`: "head", "feature" or "error"
- `site`: a dictionary's tag, `L2 MLP` for neurons, or `L3` for heads
- `layer`: counted from 0
- `place`: index into the circuit's `places`
- `index`: head or feature; 0 for errors
- `effect`: estimated loss of the metric, in logits, when this node alone is ablated from the circuit
"""


class Part(NamedTuple):
    """Nodes of one kind in one layer: `n_places` times `width` consecutive numbers."""

    kind: str
    layer: int
    start: int
    width: int


@dataclass(frozen=True)
class NodeSpace:
    """All nodes of a model, numbered: layer by layer, heads, features and errors, place by place."""

    sites: tuple[str, ...]
    """Tag of each layer's dictionary."""
    n_places: int
    n_heads: int
    n_features: tuple[int, ...]
    """Features of each layer's dictionary."""

    def parts(self) -> Iterator[Part]:
        """Yield the nodes by layer and kind, in the order of their numbers."""
        start = 0
        for layer, n_features in enumerate(self.n_features):
            for kind, width in (("head", self.n_heads), ("feature", n_features), ("error", 1)):
                yield Part(kind, layer, start, width)
                start += self.n_places * width

    @property
    def size(self) -> int:
        """Number of nodes."""
        return self.n_places * (sum(self.n_features) + len(self.n_features) * (self.n_heads + 1))

    def split(self, values: Any) -> list[list[Any]]:
        """Return values of all nodes as arrays (places, width) of heads, features and errors, for each layer."""
        tables = [
            values[part.start : part.start + self.n_places * part.width].reshape(self.n_places, part.width)
            for part in self.parts()
        ]
        return [tables[start : start + 3] for start in range(0, len(tables), 3)]

    def nodes(self, numbers: Int[np.ndarray, " n"]) -> np.ndarray:
        """Return the nodes with these numbers, of dtype `CIRCUIT_NODE`, without effects."""
        found = np.zeros(len(numbers), CIRCUIT_NODE)
        for part in self.parts():
            here = (numbers >= part.start) & (numbers < part.start + self.n_places * part.width)
            found["kind"][here], found["layer"][here] = part.kind, part.layer
            found["site"][here] = f"L{part.layer}" if part.kind == "head" else self.sites[part.layer]
            found["place"][here], found["index"][here] = np.divmod(numbers[here] - part.start, part.width)
        return found

    def numbers(self, nodes: np.ndarray) -> Int[np.ndarray, " n"]:
        """Return the numbers of nodes."""
        found = np.zeros(len(nodes), np.int64)
        for part in self.parts():
            here = (nodes["kind"] == part.kind) & (nodes["layer"] == part.layer)
            found[here] = part.start + nodes["place"][here] * part.width + nodes["index"][here]
        return found


def labels(nodes: np.ndarray, places: Sequence[str]) -> tuple[str, ...]:
    """Return the names of nodes, such as `L3H5 @end`, `M2N123 @name`, `M2 error @end`."""
    letter = {"head": "H{}", "feature": "N{}", "error": " error"}
    return tuple(
        f"{node['site']}{letter[str(node['kind'])].format(node['index'])} @{places[node['place']]}" for node in nodes
    )
