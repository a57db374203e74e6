"""The names of the formats that dictionaries are written in."""

from __future__ import annotations

from typing import Literal, get_args

LibraryFormat = Literal["saelens", "dictionary_learning", "sparsify", "circuit-tracer"]
"""Of other libraries, in folders."""
Format = Literal[LibraryFormat, "tinymodel-pt"]
LIBRARIES: tuple[LibraryFormat, ...] = get_args(LibraryFormat)
FORMATS: tuple[Format, ...] = get_args(Format)
