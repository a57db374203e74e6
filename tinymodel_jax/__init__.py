"""TinyModel in JAX: the language model, its dictionaries, and pure functions to study them with.

    from tinymodel_jax import TinyModel, tokenizer

Every public name is listed here and loads when it is first used. Importing the package takes milliseconds and reads
no files; it never uses the network.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tinymodel_jax.analysis.evaluation.evaluation import evaluate as evaluate
    from tinymodel_jax.analysis.evaluation.sparse_lm import export_sparse_lm as export_sparse_lm
    from tinymodel_jax.config import DictionaryConfig as DictionaryConfig
    from tinymodel_jax.config import ModelConfig as ModelConfig
    from tinymodel_jax.dictionaries.dictionary import Dictionary as Dictionary
    from tinymodel_jax.dictionaries.sites import Site as Site
    from tinymodel_jax.io.formats.transcoder_sets import load_transcoder_set as load_transcoder_set
    from tinymodel_jax.io.formats.transcoder_sets import save_transcoder_set as save_transcoder_set
    from tinymodel_jax.io.torch_files import load_torch_file as load_torch_file
    from tinymodel_jax.lm import TinyModel as TinyModel
    from tinymodel_jax.lm.collection import collect_activations as collect_activations
    from tinymodel_jax.model import interventions as interventions
    from tinymodel_jax.model.hook_points import HookPoint as HookPoint
    from tinymodel_jax.model.hook_points import hook_names as hook_names
    from tinymodel_jax.model.transformer import Transformer as Transformer
    from tinymodel_jax.model.transformer import run_with_hooks as run_with_hooks
    from tinymodel_jax.runtime.compilation_cache import use_compilation_cache as use_compilation_cache
    from tinymodel_jax.text.tokenizer import Tokenizer as Tokenizer
    from tinymodel_jax.text.tokenizer import keep_story as keep_story

    tokenizer: Tokenizer
    """The published model's tokenizer, read from the cache, the hub or `TINYMODEL_TOKENIZER` when it is first used."""

__version__ = "0.1.0"
"""Version of the package."""

_HOMES = {
    # The model as an object
    "TinyModel": "lm",
    "tokenizer": "io.default_tokenizer",
    "Tokenizer": "text.tokenizer",
    "keep_story": "text.tokenizer",
    # The functional core
    "ModelConfig": "config",
    "Transformer": "model.transformer",
    "run_with_hooks": "model.transformer",
    "hook_names": "model.hook_points",
    "HookPoint": "model.hook_points",
    "interventions": "model.interventions",
    # Dictionaries
    "Dictionary": "dictionaries.dictionary",
    "DictionaryConfig": "config",
    "Site": "dictionaries.sites",
    "collect_activations": "lm.collection",
    "evaluate": "analysis.evaluation.evaluation",
    "export_sparse_lm": "analysis.evaluation.sparse_lm",
    # Files
    "load_torch_file": "io.torch_files",
    "load_transcoder_set": "io.formats.transcoder_sets",
    "save_transcoder_set": "io.formats.transcoder_sets",
    "use_compilation_cache": "runtime.compilation_cache",
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
