"""Where a dashboard is built, and how it takes its place: a folder appears complete, and replaces an older one whole.

A dashboard is a folder with a page and data files. A set is a folder with a page and one dashboard per dictionary, in a
folder named by its tag.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from pathlib import Path

from tinymodel_jax.analysis.search.resumable import OtherWorkError
from tinymodel_jax.dictionaries.sites import Site

SEARCH, EFFECTS = "search.safetensors", "effects.work"
WORK = (SEARCH, f"{SEARCH}.work", EFFECTS)
"""Work files, from which a stopped run resumes the search and the measurement of effects."""
REPLACED = "replaced"
"""The folder in which an older dashboard is kept while a new one takes its place."""
INDEX, FOLDER = "index.html", "data"
"""The parts of a dashboard: the page, and the folder of its data files."""
MEASURED = "measured.json"
"""The file among the data files of a set's dictionary that says what they depend on; written when they are complete."""
_OWN = {INDEX, FOLDER, REPLACED, *WORK}
GENERATOR = '<meta name="generator" content="tinymodel dashboard">'
SET_GENERATOR = '<meta name="generator" content="tinymodel dashboard set">'
"""Mark the `index.html` of a dashboard and of a set."""


def open_partial(out: Path, tags: Collection[str] = ()) -> Path:
    """Return the folder `OUT.partial`, in which a dashboard or a set is built; create it if needed.

    Pages that a stopped run left there are removed. Its work files stay, and so do the finished dictionaries of a set,
    so that the run resumes. An older dashboard that a killed run left there goes back to `out`.

    Args:
        tags: the dictionaries of a set; none for a single dashboard.

    Raises:
        OtherWorkError: the partial folder holds work on another set.
        ValueError: `out` or the partial folder holds other files.
        OSError: the folder cannot be created.
    """
    _require_free(out)
    partial = out.absolute().with_name(f"{out.absolute().name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    members = [path for path in sorted(partial.iterdir()) if _is_member(path)]
    strange = {path.name for path in partial.iterdir()} - _OWN - {member.name for member in members}
    if strange:
        raise ValueError(f"{partial} is where the dashboard is built, but holds {min(strange)}; move that elsewhere.")
    if any(m.name not in tags for m in members) or (tags and any((partial / name).exists() for name in WORK)):
        raise OtherWorkError(f"{partial} holds work on other dictionaries.")
    if (partial / REPLACED).exists() and not out.exists():
        os.replace(partial / REPLACED, out)
    shutil.rmtree(partial / REPLACED, ignore_errors=True)
    for folder in (partial, *members):
        (folder / INDEX).unlink(missing_ok=True)
        if not (folder / FOLDER / MEASURED).exists():
            shutil.rmtree(folder / FOLDER, ignore_errors=True)
    return partial


def publish(partial: Path, out: Path) -> None:
    """Move a finished dashboard or set to `out`, in place of an older one, and remove the work files.

    The older one is removed when the new one is in place; if that fails, the older one is put back. If it is
    interrupted, `open_partial` accepts what is left.

    Raises:
        ValueError: `out` holds other files by now.
        OSError: a file cannot be moved or removed.
    """
    _require_free(out)
    replaced = partial / REPLACED
    if out.exists():
        os.replace(out, replaced)
    try:
        os.replace(partial, out)
    except BaseException:
        if replaced.exists():
            os.replace(replaced, out)
        raise
    if (out / REPLACED).exists():
        shutil.rmtree(out / REPLACED)
    remove_work(out)


def remove_work(folder: Path) -> None:
    """Remove the work files of a dashboard.

    Raises:
        OSError: one cannot be removed.
    """
    for name in WORK:
        (folder / name).unlink(missing_ok=True)


def _require_free(out: Path) -> None:
    """Refuse a folder that holds anything but a dashboard or a set."""
    if out.exists() and not _is_dashboard(out):
        raise ValueError(f"{out} exists and is not a dashboard; name another folder, or remove it.")


def _is_dashboard(folder: Path) -> bool:
    """Return whether a folder is empty or holds only what `publish` puts there."""
    if not folder.is_dir():
        return False
    page, others = folder / INDEX, [path for path in folder.iterdir() if path.name not in _OWN]
    if not page.is_file():
        return not any(folder.iterdir())
    text = page.read_text("utf-8", errors="replace")
    if SET_GENERATOR in text:
        return all(_is_member(path) and (path / INDEX).is_file() and _is_dashboard(path) for path in others)
    return GENERATOR in text and not others


def _is_member(path: Path) -> bool:
    """Return whether a folder can be that of a set's dictionary, finished or not."""
    try:
        Site.whole(path.name)
    except ValueError:
        return False
    return path.is_dir() and {part.name for part in path.iterdir()} <= {INDEX, FOLDER, *WORK}
