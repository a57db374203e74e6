"""Dashboards of several dictionaries in one folder: the page that names them, and which of their data files still hold.

The measured data files depend on one dictionary only, so a new set copies them from the old one. Links and pages depend
on the whole set, and are written anew.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tinymodel_jax import __version__
from tinymodel_jax.analysis.report.dashboard.build import Heading, LinkedTokens, read_data
from tinymodel_jax.analysis.report.dashboard.folders import FOLDER, INDEX, MEASURED, remove_work
from tinymodel_jax.analysis.report.page import write_page
from tinymodel_jax.analysis.search.resumable import OtherWorkError, fingerprint
from tinymodel_jax.analysis.search.top_activations import search_fingerprints
from tinymodel_jax.config import DictionaryConfig
from tinymodel_jax.lm import FeatureReader

FORM = 2
"""Number of the form of the data files; raised when it changes, so that older ones are measured again."""


class Member(NamedTuple):
    """A dictionary of a set."""

    heading: Heading
    config: DictionaryConfig
    links: LinkedTokens


def measured_key(
    reader: FeatureReader,
    setup: Sequence[str],
    rows: np.ndarray,
    texts: Sequence[Sequence[int]],
    effect_rows: np.ndarray,
    concepts: bool,
) -> dict[str, Any]:
    """Return what the measured data files of a dictionary depend on, as JSON values.

    Args:
        reader: `lm[tag]`.
        setup: `Heading.setup`.
        effect_rows: the rows on which effects are measured.
        concepts: whether the concepts of the tokens are known.
    """
    return {
        "version": __version__,
        "form": FORM,
        "site": reader.site.tag,
        "setup": list(setup),
        **search_fingerprints(reader, rows),
        "texts": [list(ids) for ids in texts],
        "effects": fingerprint(effect_rows),
        "concepts": concepts,
    }


def has_measured(folder: Path, key: Mapping[str, Any], older: Path) -> bool:
    """Say whether the data files in a folder are complete; those of an older set that still hold are copied there.

    Args:
        older: the folder of the same dictionary in the set that is replaced; it need not exist.

    Raises:
        OtherWorkError: the data files in the folder were measured on other input.
        OSError: a file cannot be copied.
    """
    if (folder / FOLDER / MEASURED).exists():
        if _key_in(folder) != key:
            raise OtherWorkError(f"{folder} holds a dictionary that was measured on other input.")
        return True
    if _key_in(older) != key:
        return False
    shutil.copytree(older / FOLDER, folder / FOLDER, ignore=shutil.ignore_patterns(MEASURED))
    finish_measured(folder, key)
    return True


def finish_measured(folder: Path, key: Mapping[str, Any]) -> None:
    """Record that the data files in a folder are complete, and remove the work files.

    Raises:
        OSError: a file cannot be written or removed.
    """
    (folder / FOLDER / MEASURED).write_text(json.dumps(key, ensure_ascii=False, indent=1) + "\n", "utf-8")
    remove_work(folder)


def write_set_page(folder: Path, members: Mapping[str, Member]) -> None:
    """Write the page that names the dictionaries of a set.

    Args:
        folder: holds the pages of each dictionary in a folder named by its tag.
        members: the dictionaries by tag, in the order of the forward pass.

    Raises:
        OSError: a file cannot be read or written.
    """
    indices = {tag: read_data(folder / tag, "index") for tag in members}
    first = next(iter(indices.values()))
    words = read_data(folder / next(iter(members)), "vocabulary") if first["texts"] else []
    content = {
        "model": next(iter(members.values())).heading.model,
        "n_rows": first["n_rows"],
        "rows": [_row(member, indices[tag], members) for tag, member in members.items()],
        "texts": [_text_name(ids, words, first["text_start"]) for ids in first["texts"]],
    }
    write_page(folder / INDEX, "dashboard_set.html.jinja", content)


def _key_in(folder: Path) -> Any:
    """Return the key of complete data files in a folder, or None."""
    try:
        return json.loads((folder / FOLDER / MEASURED).read_text("utf-8"))
    except (OSError, ValueError):
        return None


def _row(member: Member, index: Mapping[str, Any], tags: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the set's page says about a dictionary."""
    active, graph = np.asarray(index["columns"]["active"]), member.links.graph
    return {
        "tag": member.heading.site,
        "about": member.heading.about,
        "architecture": member.config.architecture,
        "n_features": index["n_features"],
        "n_active": int(np.count_nonzero(active)),
        "n_tokens": index["n_tokens"],
        "per_token": float(active.sum() / index["n_tokens"]),
        "upstream": [tag for tag in graph.upstream if tag in tags],
        "downstream": [tag for tag in graph.downstream if tag in tags],
    }


def _text_name(ids: Sequence[int], words: Sequence[str], start: int) -> str:
    return "".join(words[i] for i in ids[:start]) + ("…" if len(ids) > start else "")
