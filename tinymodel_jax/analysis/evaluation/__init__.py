"""Evaluation of dictionaries: reconstruction, sparsity, and the loss of the model that runs through them."""

from tinymodel_jax.analysis.evaluation.evaluation import DictionaryEvaluation as DictionaryEvaluation
from tinymodel_jax.analysis.evaluation.evaluation import evaluate as evaluate
from tinymodel_jax.analysis.evaluation.sparse_lm import evaluate_sparse_model as evaluate_sparse_model
from tinymodel_jax.analysis.evaluation.sparse_lm import export_sparse_lm as export_sparse_lm
