"""`TinyModel`: the language model with its tokenizer and dictionaries, as one object."""

from tinymodel_jax.lm.dictionaries import FeatureReader as FeatureReader
from tinymodel_jax.lm.tiny_model import TinyModel as TinyModel
