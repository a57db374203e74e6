"""Checks of the analyses that follow linear maps into and out of a dictionary."""

from __future__ import annotations

from tinymodel_jax.config import DictionaryConfig


def require_linear_encoder(config: DictionaryConfig, asker: str) -> None:
    """Require that pre-activations are linear functions of what the dictionary reads.

    Args:
        asker: start of the error message: the function that needs it.

    Raises:
        ValueError: the dictionary normalizes its input.
    """
    if config.normalize != "none":
        raise ValueError(
            f"{asker}: {_described(config)}, so its pre-activations are not linear in it; use a dictionary with "
            "normalize='none'."
        )


def require_fixed_directions(config: DictionaryConfig, asker: str) -> None:
    """Require that one unit of a feature writes the same vector at every input, and that the rest does not copy it.

    Raises:
        ValueError: it is an SAE that normalizes its input.
    """
    if config.rescales_output:
        raise ValueError(
            f"{asker}: {_described(config)}, so its features write different amounts at different inputs; use a "
            "dictionary with normalize='none'."
        )


def require_no_copy(config: DictionaryConfig, asker: str) -> None:
    """Require that the dictionary's prediction is not a function of the predicted value itself.

    Raises:
        ValueError: it is an SAE with a skip connection.
    """
    if config.skip and not config.is_transcoder:
        raise ValueError(
            f"{asker}: the SAE of {config.hook_in} has a skip connection, so it predicts a part of the value from the "
            "value itself; use one with skip=False."
        )


def _described(config: DictionaryConfig) -> str:
    return f"the dictionary that reads {config.hook_in} divides its input by its size (normalize={config.normalize!r})"
