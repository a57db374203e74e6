"""Readers, such as `lm["M2"]`: they are accepted wherever a dictionary is.

What a model returns for a tag is defined in `lm`; this module uses only its attributes.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from tinymodel_jax.dictionaries.dictionary import Dictionary


@runtime_checkable
class Reader(Protocol):
    """What `lm[tag]` returns."""

    @property
    def dictionary(self) -> Dictionary: ...


def dictionary_of(given: Any) -> Dictionary:
    """Return a dictionary, or the one of a reader.

    Raises:
        ValueError: it is neither, or the reader is of a single feature.
    """
    dictionary = getattr(given, "dictionary", given)
    if not isinstance(dictionary, Dictionary):
        tag = repr(given) if isinstance(given, str) and "/" not in given else "'M1'"
        raise ValueError(
            f"expected a dictionary, got {given!r:.80}; lm[{tag}] is the one of a model, and "
            "Dictionary.from_pretrained(path) loads one."
        )
    if getattr(given, "feature", None) is not None:
        tag = given.site.tag
        raise ValueError(
            f"expected a whole dictionary, got feature {given.feature} of {tag}; give lm[{tag!r}], and the features "
            "beside it."
        )
    return dictionary
