"""TinyModel in JAX: the language model, its dictionaries, and pure functions to study them with.

    from tinymodel_jax import TinyModel, tokenizer

Every public name is here. Each loads when it is first used, so importing the package takes milliseconds, reads no
file and never touches the network.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tinymodel_jax import interventions as interventions
    from tinymodel_jax.analysis.evaluation import evaluate as evaluate
    from tinymodel_jax.analysis.sparse_lm import export_sparse_lm as export_sparse_lm
    from tinymodel_jax.config import DictionaryConfig as DictionaryConfig
    from tinymodel_jax.config import ModelConfig as ModelConfig
    from tinymodel_jax.dictionary import Dictionary as Dictionary
    from tinymodel_jax.hook_points import HookPoint as HookPoint
    from tinymodel_jax.hook_points import hook_names as hook_names
    from tinymodel_jax.io.torch_files import load_torch_file as load_torch_file
    from tinymodel_jax.lm import TinyModel as TinyModel
    from tinymodel_jax.sites import Site as Site
    from tinymodel_jax.tokenization import Tokenizer as Tokenizer
    from tinymodel_jax.tokenization import keep_story as keep_story
    from tinymodel_jax.transformer import Transformer as Transformer
    from tinymodel_jax.transformer import run_with_hooks as run_with_hooks

    tokenizer: Tokenizer

__version__ = "0.1.0"

_HOMES = {
    # The model as an object
    "TinyModel": "lm",
    "tokenizer": "io.default_tokenizer",
    "Tokenizer": "tokenization",
    "keep_story": "tokenization",
    # The functional core
    "ModelConfig": "config",
    "Transformer": "transformer",
    "run_with_hooks": "transformer",
    "hook_names": "hook_points",
    "HookPoint": "hook_points",
    "interventions": "interventions",
    # Dictionaries
    "Dictionary": "dictionary",
    "DictionaryConfig": "config",
    "Site": "sites",
    "evaluate": "analysis.evaluation",
    "export_sparse_lm": "analysis.sparse_lm",
    # Files
    "load_torch_file": "io.torch_files",
}

__all__ = sorted([*_HOMES, "__version__"])  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tinymodel_jax' has no attribute {name!r}")
    module = importlib.import_module(f"tinymodel_jax.{_HOMES[name]}")
    if name == "tokenizer":
        value = module.LazyTokenizer()
    elif name == "interventions":
        value = module
    else:
        value = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
