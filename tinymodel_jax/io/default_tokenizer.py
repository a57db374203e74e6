"""The tokenizer of a model: the one saved with it, otherwise the default for the published vocabulary.

The default comes from the folder named by the environment variable TINYMODEL_TOKENIZER, otherwise from the hub, whose
answer is cached. Files are read when they are needed.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

from tinymodel_jax.config import ModelConfig
from tinymodel_jax.runtime.paths import user_path
from tinymodel_jax.text.tokenizer import Tokenizer

ENVIRONMENT_VARIABLE = "TINYMODEL_TOKENIZER"


def saved_tokenizer(folder: Path | None) -> Tokenizer | None:
    """Return the tokenizer saved in a model's folder, if there is one."""
    if folder is None or not (folder / "token_table.json").is_file():
        return None
    return Tokenizer.from_pretrained(folder)


@functools.cache
def default_tokenizer() -> Tokenizer:
    """Return the published 10,000-id tokenizer.

    Raises:
        FileNotFoundError: the folder TINYMODEL_TOKENIZER does not hold a tokenizer, or the hub cannot be reached.
    """
    named = os.environ.get(ENVIRONMENT_VARIABLE)
    if named:
        folder = user_path(named)
        saved = saved_tokenizer(folder)
        return Tokenizer.from_gpt2(folder) if saved is None else saved
    from tinymodel_jax.io.hub import published  # the network part loads when it is needed

    return Tokenizer.from_pretrained(published.tokenizer_folder())


def tokenizer_of_model(folder: Path | None, config: ModelConfig) -> Tokenizer:
    """Return the tokenizer saved in a model's folder, otherwise the default one.

    Raises:
        FileNotFoundError: as `default_tokenizer`.
        ValueError: the folder has no tokenizer, and the default one does not have as many ids as the model.
    """
    found = saved_tokenizer(folder)
    if found is None and config.d_vocab != 10_000:
        raise ValueError(
            f"this model has no tokenizer, and the default one has 10,000 ids, not {config.d_vocab}. "
            "Use token ids (generate_ids), or TinyModel.from_params(config, params, tokenizer)."
        )
    return default_tokenizer() if found is None else found


class LazyTokenizer:
    """The default tokenizer, loaded when first used: the package's public `tokenizer`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return default_tokenizer()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        # An unknown attribute must not load a tokenizer, which may need the network.
        if name.startswith("_") or name not in {*dir(Tokenizer), *Tokenizer.__annotations__}:
            raise AttributeError(f"Tokenizer has no attribute {name!r}")
        return getattr(default_tokenizer(), name)

    def __repr__(self) -> str:
        return "<the default tokenizer of tinymodel_jax, loaded when used>"
