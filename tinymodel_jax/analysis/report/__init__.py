"""What people look at: plots and coloured text for notebooks, and self-contained HTML pages.

    from tinymodel_jax.analysis import report

The functions for notebooks can be imported from here; each loads when it is first used, and Matplotlib with it.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tinymodel_jax.analysis.report.attention import attention_patterns as attention_patterns
    from tinymodel_jax.analysis.report.plots import plot_attribution as plot_attribution
    from tinymodel_jax.analysis.report.plots import plot_logit_lens as plot_logit_lens
    from tinymodel_jax.analysis.report.plots import plot_pareto as plot_pareto
    from tinymodel_jax.analysis.report.plots import plot_patching as plot_patching
    from tinymodel_jax.analysis.report.text_activations import show_activations as show_activations

_FUNCTIONS = {
    "attention_patterns": "attention",
    "plot_attribution": "plots",
    "plot_logit_lens": "plots",
    "plot_pareto": "plots",
    "plot_patching": "plots",
    "show_activations": "text_activations",
}
"""Functions, and the module of each."""


def __getattr__(name: str) -> Any:
    if name not in _FUNCTIONS:
        raise AttributeError(f"module 'tinymodel_jax.analysis.report' has no attribute {name!r}")
    return getattr(importlib.import_module(f"tinymodel_jax.analysis.report.{_FUNCTIONS[name]}"), name)


def __dir__() -> list[str]:
    return sorted(_FUNCTIONS)
