"""The page of an attribution graph: a single file that draws it and explains each node."""

from tinymodel_jax.analysis.report.graph.page import save_page as save_page
