"""Folders and files of any repository on the hub: `hub:OWNER/NAME`, with `/PATH` and `@REVISION` where needed.

`huggingface_hub` downloads, resumes and caches. A commit that is cached is read without a request, and so is everything
cached where HF_HUB_OFFLINE is set. Private repositories take the user's standard token. Only the files that are asked
for are downloaded. The sha256 of each is compared with the one that the hub announced for it, where it did, and
recorded with the commit in `hub/OWNER/NAME/COMMIT.json` in this package's cache.
"""

from __future__ import annotations

import contextlib
import datetime
import difflib
import glob
import json
import os
import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

from tinymodel_jax.io.hub.client import LOG_IN, SHA256, endpoint, late_progress, reason, require_client, sha256
from tinymodel_jax.runtime.atomic_files import replace_file
from tinymodel_jax.runtime.paths import CACHE_VARIABLE, cache_root

PREFIX = "hub:"
_GRAMMAR = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(?P<path>(?:/[^/@]+)*)/?(?:@(?P<revision>[^@]+))?")

_COMMIT = re.compile("[0-9a-f]{40}")


class HubAddress(NamedTuple):
    """A folder or file of a repository; as text, `hub:OWNER/NAME/PATH@REVISION`."""

    repository: str
    """OWNER/NAME."""
    path: str = ""
    """Names joined by slashes; empty for the whole repository."""
    revision: str | None = None
    """Branch, tag or commit; None for the repository's main branch."""

    @classmethod
    def parse(cls, text: str) -> HubAddress:
        """Read an address; `hub:` in front may be left out.

        Raises:
            ValueError: it is not one.
        """
        found = _GRAMMAR.fullmatch(text.removeprefix(PREFIX))
        path = found["path"].strip("/") if found else ""
        if found is None or {".", ".."} & set(path.split("/")):
            raise ValueError(
                f"{text!r} is not an address on the hub; write {PREFIX}OWNER/NAME, with /PATH for a folder or file in "
                "the repository, and @REVISION for a branch, tag or commit."
            )
        return cls(found["repository"], path, found["revision"])

    @classmethod
    def of(cls, name_or_path: Any) -> HubAddress | None:
        """Return the address that a name or path is, or None if it does not begin with `hub:`.

        Raises:
            ValueError: as `parse`.
        """
        text = os.fspath(name_or_path) if isinstance(name_or_path, str | os.PathLike) else ""
        return cls.parse(text.replace(os.sep, "/")) if text.startswith(PREFIX) else None

    def joined(self, *names: str) -> HubAddress:
        """Return the address of a folder or file inside this one."""
        return self._replace(path="/".join(name for name in (self.path, *names) if name))

    def __str__(self) -> str:
        revision = "" if self.revision is None else f"@{self.revision}"
        return f"{PREFIX}{'/'.join(name for name in (self.repository, self.path) if name)}{revision}"


class Download(NamedTuple):
    """Files of an address on this machine."""

    path: Path
    """The file or folder, in Hugging Face's cache."""
    address: HubAddress
    """Its address, with the commit as revision."""


def download(address: HubAddress, files: Sequence[str], but_not: Sequence[str] = ()) -> Download:
    """Download files of a folder, unless they are cached; or the file itself, if the address is one.

    Args:
        files: patterns of names in the folder, in which `*` also matches slashes.
        but_not: patterns of names to leave out.

    Raises:
        FileNotFoundError: there is no such repository, revision or path, no access to it, or no network; the message
            says what was tried and what would work.
        ModuleNotFoundError: `huggingface_hub` is not installed.
        OSError: the cache cannot be written.
        ValueError: a cached file is damaged.
    """
    require_client(f"loading {address}")
    from huggingface_hub import snapshot_download

    wanted = [glob.escape(address.path)] * bool(address.path) + _inside(address, files)
    left_out = _inside(address, but_not)
    with _errors_of(address):
        _require_commit(address)
        snapshot = Path(
            snapshot_download(
                address.repository,
                revision=address.revision,
                allow_patterns=wanted,
                ignore_patterns=left_out,
                endpoint=endpoint(),
                tqdm_class=late_progress(),
            )
        )
    found = Download(snapshot / address.path, address._replace(revision=snapshot.name))
    names = [path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file()]
    names = [name for name in names if _matches(name, wanted) and not _matches(name, left_out)]
    if not names:
        raise FileNotFoundError(f"{endpoint()} has nothing to load at {address}: {_instead(found.address)}.")
    _record(found.address, snapshot, names)
    return found


def pinned(name_or_path: str) -> str:
    """Return an address with its commit as revision, and any other name or path as it is.

    Raises:
        FileNotFoundError, ModuleNotFoundError: as `download`.
    """
    address = HubAddress.of(name_or_path)
    return name_or_path if address is None else str(download(address, ["config.json"]).address)


def _require_commit(address: HubAddress) -> None:
    """Ask whether a commit that is not cached exists: the download retries for 23 seconds without a network."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.file_download import repo_folder_name

    if _COMMIT.fullmatch(address.revision or ""):
        repository = repo_folder_name(repo_id=address.repository, repo_type="model")
        if not Path(constants.HF_HUB_CACHE, repository, "snapshots", str(address.revision)).exists():
            HfApi(endpoint=endpoint()).model_info(address.repository, revision=address.revision)


def _inside(address: HubAddress, patterns: Sequence[str]) -> list[str]:
    prefix = f"{glob.escape(address.path)}/" if address.path else ""
    return [f"{prefix}{pattern}" for pattern in patterns]


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


@contextlib.contextmanager
def _errors_of(address: HubAddress) -> Iterator[None]:
    """Turn every error of the client into a `FileNotFoundError` of one line."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    hub, repository = endpoint(), address.repository
    try:
        yield
    except GatedRepoError as error:
        message = f"{repository} is gated: ask for access at {hub}/{repository}, and {LOG_IN}"
        raise FileNotFoundError(f"{address} cannot be loaded: {message}.") from error
    except RepositoryNotFoundError as error:
        message = f"{hub} has no repository {repository}, or gives no access to it"
        raise FileNotFoundError(f"{message}. If it is private, {LOG_IN}; otherwise check its name.") from error
    except RevisionNotFoundError as error:
        message = f"{repository} has no branch, tag or commit {address.revision!r}"
        raise FileNotFoundError(f"{message}; {hub}/{repository}/commits lists the commits of its main one.") from error
    except Exception as error:  # errors of its HTTP library, which differs between versions of huggingface_hub
        message = f"{address} is not cached, and cannot be downloaded from {hub}: {reason(error)}"
        raise FileNotFoundError(
            f"{message}. With the network, the same call loads it; without, give a folder on this machine."
        ) from None


def _instead(address: HubAddress) -> str:
    """Say what the repository has that is named like the address."""
    from huggingface_hub import HfApi

    with _errors_of(address):
        files = HfApi(endpoint=endpoint()).list_repo_files(address.repository, revision=address.revision)
    parents = {parent.as_posix() for file in files for parent in Path(file).parents} - {"."}
    there = sorted({*files, *parents})
    close = difflib.get_close_matches(address.path, there, cutoff=0.5) or [name for name in there if "/" not in name]
    return f"the repository has {', '.join(close[:5]) or 'no files'}" + (" …" if len(close) > 5 else "")


def _record(address: HubAddress, snapshot: Path, names: Sequence[str]) -> None:
    """Check and record the sha256 of files that were not recorded yet, or have changed since.

    Raises:
        OSError: the record cannot be written.
        ValueError: a file differs from what the hub announced.
    """
    record = cache_root() / "hub" / address.repository / f"{address.revision}.json"
    files = _recorded(record)
    stats = {name: (snapshot / name).stat() for name in names}
    new = {name: {"bytes": stat.st_size, "modified": stat.st_mtime_ns} for name, stat in stats.items()}
    new = {name: entry for name, entry in new.items() if not entry.items() <= files.get(name, {}).items()}
    if not new:
        return
    for name, entry in new.items():
        entry["sha256"] = _checked_sha256(snapshot / name)
    content = {
        "repository": address.repository,
        "revision": address.revision,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "files": dict(sorted({**files, **new}.items())),
    }
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        replace_file(record, (json.dumps(content, indent=2) + "\n").encode())
    except OSError as error:
        message = f"cannot write to the cache {record.parent}: {error.strerror or error}"
        raise OSError(f"{message}; set {CACHE_VARIABLE} to another folder.") from error


def _recorded(record: Path) -> dict[str, dict[str, Any]]:
    try:
        return dict(json.loads(record.read_bytes())["files"])
    except (OSError, ValueError, KeyError, TypeError):  # missing or damaged: it is written again
        return {}


def _checked_sha256(file: Path) -> str:
    """Return the sha256 of a cached file; the cache names large files by the one that the hub announced."""
    found, stored = sha256(file), file.resolve()
    if SHA256.fullmatch(stored.name) and stored.name != found:
        raise ValueError(
            f"{stored} in Hugging Face's cache is damaged: its sha256 is {found}. Delete it, and load it again."
        )
    return found
