"""Uploads to the hub: all files in one commit, so that a failed upload leaves the files there as they were.

All checks come first; then the repository and the branch are created if they do not exist. What is there is respected:
another program's configuration is not overwritten, parts of an earlier model are not left to be mistaken for the new
one's, and a card that someone wrote is kept. A commit that someone else makes in between lets the upload fail.
"""

from __future__ import annotations

import contextlib
import json
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, NamedTuple

from tinymodel_jax.io.config_files import CONFIG_FILE, DICTIONARIES, TOKENIZER_FILES
from tinymodel_jax.io.data_files import DICTIONARY_FILE
from tinymodel_jax.io.formats import circuit_tracer, dictionary_learning, saelens, sparsify
from tinymodel_jax.io.formats.names import LIBRARIES
from tinymodel_jax.io.hub.addresses import HubAddress
from tinymodel_jax.io.hub.cards import Card, dictionary_card, repository_card, transcoder_set_card
from tinymodel_jax.io.hub.client import LOG_IN, endpoint, reason, require_client
from tinymodel_jax.io.hub.folders import SETTINGS

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from tinymodel_jax.dictionaries.dictionary import Dictionary

CARD = "README.md"
PARTS = {
    "model": (f"{DICTIONARIES}/*/{CONFIG_FILE}", *TOKENIZER_FILES),
    "dictionary": (DICTIONARY_FILE, saelens.WEIGHTS, sparsify.WEIGHTS, dictionary_learning.WEIGHTS),
}
"""Kind of an upload -> files that its loader reads if they are there."""

Files = Mapping[str, Path | bytes]
"""Name in the folder -> the file on this machine, or its content."""


class _Place(NamedTuple):
    """Where an upload goes, as it is before the upload."""

    api: HfApi
    address: HubAddress
    commit: str | None
    """The newest one, of the main branch if the branch does not exist; None if the repository does not exist."""
    files: Sequence[str]
    """Names of all files of the repository."""
    has_branch: bool


def push(address: HubAddress, files: Files, cards: Mapping[str, Card], private: bool | None = None) -> str:
    """Upload a folder with its card; return its address, with the new commit as revision.

    Args:
        address: folder of a repository; its revision, if any, is a branch.
        cards: name of a folder inside it -> its card; "" is the folder itself.
        private: whether a new repository is private; None takes the owner's default.

    Raises:
        ModuleNotFoundError: `huggingface_hub` is not installed.
        OSError: the upload failed, and changed no file; the message says how to go on.
        ValueError: the address is a commit, the repository is public and not to be, or has files that the upload would
            overwrite or mix with its own. Nothing was uploaded or created.
    """
    return _upload(_place(address, private), files, cards, private)


def push_dictionary(
    dictionary: Dictionary, address: str, license: str | None, private: bool | None, format: str | None
) -> str:
    """Do `Dictionary.push_to_hub`."""
    if format is not None and format not in LIBRARIES:
        raise ValueError(
            f"push_to_hub has no format {format!r}, got for {address}; choose {', '.join(LIBRARIES)}, or leave it "
            "out for this package's own folder."
        )
    place = _place(HubAddress.parse(address), private)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        files = _saved(dictionary, format, place, folder)
        if format != "circuit-tracer":
            card = dictionary_card(place.address, dictionary.config, license=license, format=format)
            return _upload(place, files, {"": card}, private)
        weights = next(name for name in files if name.endswith(".safetensors"))
        layers = [path.name for path in folder.glob(circuit_tracer.LAYERS)]
        card = transcoder_set_card(place.address, weights, layers, dictionary.config, license)
        return str(HubAddress.parse(_upload(place, files, {"": card}, private)).joined(weights))


def require_access(address: HubAddress) -> None:
    """Check that an upload could begin: the client is installed, the hub answers, and the user is logged in.

    Raises:
        ModuleNotFoundError, OSError: it could not.
    """
    require_client(f"uploading to {address}")
    from huggingface_hub import HfApi

    with _failures(address):
        HfApi(endpoint=endpoint()).whoami()


def files_in(folder: Path) -> dict[str, Path | bytes]:
    """Return the files of a folder, for `push`."""
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}


def _place(address: HubAddress, private: bool | None) -> _Place:
    """Look at the repository; change nothing.

    Raises:
        ModuleNotFoundError, OSError, ValueError: as `push`.
    """
    require_client(f"uploading to {address}")
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    if re.fullmatch("[0-9a-f]{40}", address.revision or ""):
        raise ValueError(f"{address}: a commit cannot be changed; name a branch, or leave out the revision.")
    api, has_branch = HfApi(endpoint=endpoint()), True
    with _failures(address):
        try:
            found = api.model_info(address.repository)
        except RepositoryNotFoundError:
            return _Place(api, address, None, (), address.revision in (None, "main"))
        if address.revision is not None:
            try:
                found = api.model_info(address.repository, revision=address.revision)
            except RevisionNotFoundError:
                has_branch = False
        files = api.list_repo_files(address.repository, revision=found.sha)
    if private and not found.private:
        raise ValueError(
            f"{address.repository} exists and is public, so nothing was uploaded; make it private at "
            f"{endpoint()}/{address.repository}/settings, or name another repository."
        )
    return _Place(api, address, found.sha, files, has_branch)


def _saved(dictionary: Dictionary, format: str | None, place: _Place, folder: Path) -> Files:
    """Write a dictionary into a folder that looks like the one on the hub; return the files that are new or changed.

    So `save_pretrained` refuses what it refuses in a folder on this machine. Settings are downloaded, and of a
    transcoder set the layer with which it compares the new one; all other files are empty.
    """
    there = [name.rpartition("/") for name in place.files]
    names = [name for parent, _, name in there if parent == place.address.path]
    read = {*SETTINGS}
    if format == "circuit-tracer":
        own = circuit_tracer.layer_file(circuit_tracer.as_layer(dictionary).number)
        read |= {*sorted(name for name in names if fnmatch(name, circuit_tracer.LAYERS) and name != own)[:1]}
    before = {name: _read(place, place.address.joined(name).path) if name in read else b"" for name in names}
    for name, content in before.items():
        (folder / name).write_bytes(content)
    try:
        dictionary.save_pretrained(folder, format)
    except ValueError as error:
        raise ValueError(str(error).replace(str(folder), str(place.address))) from error
    files = files_in(folder)
    return {name: path for name, path in files.items() if name not in before or _bytes(path) != before[name]}


def _upload(place: _Place, files: Files, cards: Mapping[str, Card], private: bool | None) -> str:
    """Do `push`: check, create what does not exist, and commit on top of the commit that was checked."""
    from huggingface_hub import CommitOperationAdd

    address = place.address
    content = {address.joined(name).path: file for name, file in files.items()}
    _require_own_place(place, content, cards[""].kind)
    content |= _cards_to_write(place, cards)
    operations = [CommitOperationAdd(name, file) for name, file in sorted(content.items())]
    made = _create(place, private)
    with _failures(address, made):
        commit = place.api.create_commit(
            address.repository,
            operations,
            commit_message=f"Upload {address.path or 'a ' + cards[''].kind} with tinymodel_jax",
            revision=address.revision,
            parent_commit=place.commit,
        )
    return str(address._replace(revision=commit.oid))


def _create(place: _Place, private: bool | None) -> str:
    """Create the repository and the branch if they do not exist; say which."""
    made, address = "", place.address
    if place.commit is None:
        with _failures(address):
            place.api.create_repo(address.repository, private=private)
        made = f"the new repository {address.repository} without files"
    if not place.has_branch:
        with _failures(address, made):
            place.api.create_branch(address.repository, branch=str(address.revision), revision=place.commit)
        made = made or f"the new branch {address.revision} with the files of the main one"
    return made


def _require_own_place(place: _Place, content: Files, kind: str) -> None:
    """Check that the upload neither overwrites nor continues something else.

    Raises:
        ValueError: it would.
    """
    address = place.address
    for name in sorted({*content} & {*place.files}):
        own = _format(_bytes(content[name])) if PurePosixPath(name).name == CONFIG_FILE else None
        if own is not None and (found := _format(_read(place, name))) != own:
            raise ValueError(
                f"{address.repository} has another {name} (it describes {found!r}), so nothing was uploaded; name "
                "another folder or repository."
            )
    parts = [address.joined(pattern).path for pattern in PARTS.get(kind, ())]
    left = [name for name in place.files if name not in content and any(fnmatch(name, part) for part in parts)]
    if left:
        raise ValueError(
            f"{address} has parts of another upload that this one lacks, so nothing was uploaded: {', '.join(left)}. "
            "Delete them there, or name another folder, repository or branch."
        )


def _cards_to_write(place: _Place, cards: Mapping[str, Card]) -> dict[str, bytes]:
    """Return the cards that are new or replace one of their kind."""
    names = {place.address.joined(folder, CARD).path: card for folder, card in cards.items()}
    written = {
        name: card.content()
        for name, card in names.items()
        if name not in place.files or card.marker.encode() in _read(place, name)
    }
    if CARD not in place.files and CARD not in written:
        written[CARD] = repository_card(place.address, cards[""]).content()
    return written


def _read(place: _Place, name: str) -> bytes:
    with _failures(place.address):
        return Path(place.api.hf_hub_download(place.address.repository, name, revision=place.commit)).read_bytes()


def _bytes(file: Path | bytes) -> bytes:
    return file if isinstance(file, bytes) else file.read_bytes()


def _format(config: bytes) -> str | None:
    """Return what a configuration says that it describes."""
    try:
        content = json.loads(config)
    except ValueError:
        return None
    return content.get("format") if isinstance(content, dict) else None


@contextlib.contextmanager
def _failures(address: HubAddress, made: str = "") -> Iterator[None]:
    """Turn every error of the client into an `OSError` of one line that says how to go on.

    Args:
        made: what this upload has created so far.
    """
    try:
        yield
    except Exception as error:  # errors of its HTTP library, too, which differs between versions of huggingface_hub
        cause = error.__cause__ or error.__context__
        why = f"{reason(error)} ({reason(cause)})" if isinstance(error, RuntimeError) and cause else reason(error)
        if isinstance(error, ValueError) and not hasattr(error, "response"):
            why = " ".join(str(error).split())  # the hub's own words about the card's metadata
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status == 412:  # the parent of the commit is no longer the newest
            why = "someone else has changed the repository in the meantime"
        advice = "Do the same again to upload it; large files that arrived are not sent again."
        if status in (401, 403) or "oken" in why:
            advice = f"{LOG_IN[0].upper()}{LOG_IN[1:]} to a token that may write to {address.repository}."
        changed = f"left {made}" if made else "changed nothing there"
        raise OSError(f"the upload to {address} failed, and {changed}: {why}. {advice}") from error
