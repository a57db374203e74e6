"""Uploads to the hub: all files in one commit, so that a failed upload leaves the repository as it was.

The repository and the branch are created if they do not exist. What is there is respected: another program's
configuration is not overwritten, parts of an earlier model are not left to be mistaken for the new one's, and a card
that someone wrote is kept.
"""

from __future__ import annotations

import contextlib
import json
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from tinymodel_jax.io.hub.addresses import HubAddress
from tinymodel_jax.io.hub.cards import Card, dictionary_card, repository_card
from tinymodel_jax.io.hub.client import LOG_IN, endpoint, reason, require_client

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from tinymodel_jax.dictionaries.dictionary import Dictionary

CARD, CONFIG = "README.md", "config.json"
PARTS = {
    "model": ("dictionaries/*/config.json", "tokenizer.json", "token_table.json"),
    "dictionary": ("dictionary.safetensors", "sae_weights.safetensors", "sae.safetensors", "ae.pt"),
}
"""Kind of an upload -> files that its loader reads if they are there."""

Files = Mapping[str, Path | bytes]
"""Name in the folder -> the file on this machine, or its content."""


def push(address: HubAddress, files: Files, cards: Mapping[str, Card], private: bool | None = None) -> str:
    """Upload a folder with its card; return its address, with the new commit as revision.

    Args:
        address: folder of a repository; its revision, if any, is a branch.
        cards: name of a folder inside it -> its card; "" is the folder itself.
        private: whether a new repository is private; None takes the owner's default.

    Raises:
        ModuleNotFoundError: `huggingface_hub` is not installed.
        OSError: the upload failed, and changed nothing; the message says how to go on.
        ValueError: the address is a commit, the repository is public and not to be, or has files that the upload would
            overwrite or mix with its own. Nothing was uploaded.
    """
    require_client(f"uploading to {address}")
    from huggingface_hub import CommitOperationAdd, HfApi

    if re.fullmatch("[0-9a-f]{40}", address.revision or ""):
        raise ValueError(f"{address}: a commit cannot be changed; name a branch, or leave out the revision.")
    api = HfApi(endpoint=endpoint())
    with _failures(address):
        api.create_repo(address.repository, private=private, exist_ok=True)
        if address.revision is not None:
            api.create_branch(address.repository, branch=address.revision, exist_ok=True)
        is_private = api.model_info(address.repository).private
        there = api.list_repo_files(address.repository, revision=address.revision)
    if private and not is_private:
        raise ValueError(
            f"{address.repository} exists and is public, so nothing was uploaded; make it private at "
            f"{endpoint()}/{address.repository}/settings, or name another repository."
        )
    content = {address.joined(name).path: file for name, file in files.items()}
    _require_own_place(api, address, content, there, cards[""].kind)
    content |= _cards_to_write(api, address, cards, there)
    operations = [CommitOperationAdd(name, file) for name, file in sorted(content.items())]
    with _failures(address):
        commit = api.create_commit(
            address.repository,
            operations,
            commit_message=f"Upload {address.path or 'a ' + cards[''].kind} with tinymodel_jax",
            revision=address.revision,
        )
    return str(address._replace(revision=commit.oid))


def push_dictionary(
    dictionary: Dictionary, address: str, license: str | None, private: bool | None, format: str | None
) -> str:
    """Do `Dictionary.push_to_hub`."""
    place = HubAddress.parse(address)
    with tempfile.TemporaryDirectory() as folder:
        dictionary.save_pretrained(folder, format)
        card = dictionary_card(place, dictionary.config, license=license, format=format)
        return push(place, files_in(Path(folder)), {"": card}, private)


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


def _require_own_place(api: HfApi, address: HubAddress, content: Files, there: Sequence[str], kind: str) -> None:
    """Check that the upload neither overwrites nor continues something else.

    Raises:
        ValueError: it would.
    """
    for name in sorted({*content} & {*there}):
        if name.endswith(CONFIG) and (found := _format(_read(api, address, name))) != _format(_bytes(content[name])):
            raise ValueError(
                f"{address.repository} has another {name} (it describes {found!r}), so nothing was uploaded; name "
                "another folder or repository."
            )
    parts = [address.joined(pattern).path for pattern in PARTS.get(kind, ())]
    left = [name for name in there if name not in content and any(fnmatch(name, part) for part in parts)]
    if left:
        raise ValueError(
            f"{address} has parts of another upload that this one lacks, so nothing was uploaded: {', '.join(left)}. "
            "Delete them there, or name another folder, repository or branch."
        )


def _cards_to_write(
    api: HfApi, address: HubAddress, cards: Mapping[str, Card], there: Sequence[str]
) -> dict[str, bytes]:
    """Return the cards that are new or replace one of their kind."""
    names = {address.joined(folder, CARD).path: card for folder, card in cards.items()}
    written = {
        name: card.content()
        for name, card in names.items()
        if name not in there or card.marker.encode() in _read(api, address, name)
    }
    if CARD not in there and CARD not in written:
        written[CARD] = repository_card(address, cards[""]).content()
    return written


def _read(api: HfApi, address: HubAddress, name: str) -> bytes:
    with _failures(address):
        return Path(api.hf_hub_download(address.repository, name, revision=address.revision)).read_bytes()


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
def _failures(address: HubAddress) -> Iterator[None]:
    """Turn every error of the client into an `OSError` of one line that says how to go on."""
    try:
        yield
    except Exception as error:  # errors of its HTTP library, too, which differs between versions of huggingface_hub
        cause = error.__cause__ or error.__context__
        why = f"{reason(error)} ({reason(cause)})" if isinstance(error, RuntimeError) and cause else reason(error)
        if isinstance(error, ValueError) and not hasattr(error, "response"):
            why = " ".join(str(error).split())  # the hub's own words about the card's metadata
        refused = getattr(getattr(error, "response", None), "status_code", None) in (401, 403)
        advice = "Do the same again to upload it; large files that arrived are not sent again."
        if refused or "oken" in why:
            advice = f"{LOG_IN[0].upper()}{LOG_IN[1:]} to a token that may write to {address.repository}."
        raise OSError(f"the upload to {address} failed, and changed nothing there: {why}. {advice}") from error
