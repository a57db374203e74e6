"""Frozen dataclasses that convert to JSON and back without loss."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, TypeVar

Config = TypeVar("Config", bound="JsonConfig")


class JsonConfig:
    """JSON round trip for a frozen dataclass; unknown or missing fields are errors that name them."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values."""
        return dataclasses.asdict(self)  # type: ignore[call-overload]

    @classmethod
    def from_dict(cls: type[Config], values: Mapping[str, Any]) -> Config:
        """Build the configuration from `to_dict`'s output, also after JSON has turned tuples into lists.

        Raises:
            ValueError: a field is unknown, or one without a default is missing.
        """
        fields = dataclasses.fields(cls)  # type: ignore[arg-type]
        known = [field.name for field in fields]
        unknown = sorted(set(values) - set(known))
        missing = [f.name for f in fields if f.default is dataclasses.MISSING and f.name not in values]
        if unknown or missing:
            problems = [f"unknown field {name!r}{_closest(name, known)}" for name in unknown]
            problems += [f"missing field {name!r}" for name in missing]
            raise ValueError(f"{cls.__name__}: {'; '.join(problems)}. Known fields: {', '.join(known)}.")
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})

    @classmethod
    def require(cls, config: Any, taker: str) -> None:
        """Require a configuration of this class.

        Raises:
            ValueError: `config` is something else; the message names `taker`, the function that takes it.
        """
        if not isinstance(config, cls):
            raise ValueError(
                f"{taker} takes a {cls.__name__}; got a {type(config).__name__}. Models and dictionaries have theirs "
                f"as .config, and {cls.__name__}.from_dict(values) makes one from a dict."
            )


def _closest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
