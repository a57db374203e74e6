"""How many of the known concepts the dictionaries found, the one trained just now among them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console

from tinymodel_jax.analysis.concepts.recovery import concept_table, n_found, recover_concepts
from tinymodel_jax.analysis.report.charts import heat_map
from tinymodel_jax.bundled import storyworld
from tinymodel_jax.lm import TinyModel
from tinymodel_jax.quickstart.named_features import SITE
from tinymodel_jax.quickstart.transcoder import JUST_NOW, TRAINED
from tinymodel_jax.runtime.progress import with_progress

SCORED = ("Rm0", "Rm1", "Rm3", "M2")
"""What else concepts are looked for in."""


def count_concepts(
    lm: TinyModel, told: Sequence[storyworld.Story], training: dict[str, Any] | None, console: Console
) -> dict[str, Any]:
    """Count the concepts that dictionaries, neurons and random directions found."""
    console.rule("6 · How many of the known concepts were found")
    others = {tag: lm[tag].dictionary for tag in SCORED}
    if training is not None:
        others[JUST_NOW] = training["dictionary"]
    found = [
        *recover_concepts(
            lm, told, [SITE], track=lambda places: with_progress(places, "scoring units, random ones too")
        ),
        *recover_concepts(
            lm, told, others, baselines=False, track=lambda places: with_progress(places, "scoring features")
        ),
    ]
    if training is not None:
        concepts = {recovery.name: n_found(recovery) for recovery in found}
        for row in training["rows"]:
            row["concepts"] = concepts[JUST_NOW if row["name"] == JUST_NOW else TRAINED]
            console.print(
                f"{row['name']}: L0 {row['l0']:.1f}, explained variance {row['explained_variance']:.3f}, "
                f"CE recovered {row['ce_recovered']:.3f}, {row['dead_fraction']:.1%} dead, {row['concepts']} of "
                f"{len(storyworld.CONCEPTS)} concepts with F1 of 0.8 or more",
                highlight=False,
            )
    counts = [{"name": recovery.name, "found": n_found(recovery)} for recovery in found]
    console.print("Concepts found, F1 of 0.8 or more: ", end="", highlight=False)
    console.print("; ".join(f"{count['name']} {count['found']}" for count in counts), highlight=False)
    console.print(
        "Transcoders (M) explain what an MLP does, not what the stream holds: they find fewer.", highlight=False
    )
    chart = heat_map(*concept_table(found), "F1 of the best unit")
    return {"counts": counts, "chart": chart}
