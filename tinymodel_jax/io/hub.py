"""The model hub: published models, dictionaries and GPT-2's BPE, downloaded once and kept in this package's own format.

A conversion that is complete in the cache (`$TINYMODEL_CACHE`, else `~/.cache/tinymodel_jax`) is returned without any
request and without `huggingface_hub`; one that lacks a file or a byte is made again. It is built beside its place and
moved there whole, so that concurrent processes see all of it or nothing. Checksums are verified where they are known.

The downloaded `.pt` is not kept: it holds the same numbers as its conversion, 88 to 154 MB, and nothing reads it again.
One that is in Hugging Face's own cache already is used from there, never touched. Nothing is uploaded, and no newer
version is looked for: every published file has had one version only.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from tinymodel_jax.io import artifacts
from tinymodel_jax.io.convert import PUBLISHED_N_HEADS, convert_dictionary, convert_model
from tinymodel_jax.io.torch_files import load_torch_file
from tinymodel_jax.sites import KINDS, Site
from tinymodel_jax.tokenization import Tokenizer

REPOSITORY = "noanabeshima/tiny_model"
MODELS = ("tiny_model", "tiny_model_1_epoch", "tiny_model_2L_1E", "tiny_model_2L_3E")
TOKENIZER_REPOSITORIES = ("roneneldan/TinyStories", "openai-community/gpt2")
CACHE_VARIABLE = "TINYMODEL_CACHE"

SHA256 = {
    f"{REPOSITORY}/tiny_model.pt": "dec406b1ad94cb345b2606d7f8cffa7c1114fcb60850e949eb17274cec30a8c3",
    f"{REPOSITORY}/tiny_model_2L_1E.pt": "04e8df0cd677a7060558e5c9eb3aaa30dbfe84e4ecc92bf17ef0e405dcf33baf",
    f"{REPOSITORY}/tiny_model_2L_3E.pt": "26dfc06da85d0e5d4de51a2e90108f9d585a81677bf4bac0ac079e780fda31f4",
    f"{REPOSITORY}/mlp/M2_S-2_R1_P0.pt": "25eec217d1c72e4d83180698a252235692a536bbe598c68e97a0fa5140a0ebdd",
    f"{REPOSITORY}/res_pre_mlp/Rm0_S-3_R1_P0.pt": "a691258a2de93c8679f3c25c17fc0a7640aecc70744146a5cfa57621df0152d9",
    "openai-community/gpt2/vocab.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "openai-community/gpt2/merges.txt": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
"""Known checksums. The hub announces one for each other large file, which is verified instead."""

_SOURCE_FILE = "source.json"
_SHA256_NAME = re.compile("[0-9a-f]{64}")


class _Source(NamedTuple):
    """Files of one hub repository that together make one cached folder."""

    repository: str
    files: tuple[str, ...]

    def __str__(self) -> str:
        return " and ".join(f"{self.repository}/{file}" for file in self.files)


class _NotThereError(Exception):
    """The hub answered that it has no such file or repository."""


def model_folder(name: str) -> Path:
    """Return the folder of a published model, as `artifacts.load_model` reads it; download and convert it if needed.

    Raises:
        FileNotFoundError: no model is published by that name, or the hub cannot be reached or lacks it.
        ModuleNotFoundError: `huggingface_hub` is needed and not installed.
        ValueError: what was downloaded has another checksum than it should, or is no model.
    """
    if name not in MODELS:
        raise FileNotFoundError(
            f"there is no model {name!r}: it is no folder or file here, and the published models are "
            f"{', '.join(MODELS)}. A folder of save_pretrained or a reference .pt file works, too."
        )

    def build(folder: Path, pt_file: Path) -> None:
        converted = convert_model(load_torch_file(pt_file), PUBLISHED_N_HEADS)
        artifacts.save_model(converted.config, converted.params, folder, dictionaries=converted.dictionaries)

    otherwise = "A local file needs no network: TinyModel('FILE.pt'), or convert it: tinymodel-convert lm FILE.pt DEST."
    return _converted(cache_folder() / "models" / name, [_Source(REPOSITORY, (f"{name}.pt",))], build, otherwise)


def dictionary_folder(tag: str) -> Path:
    """Return the folder of a published dictionary, as `artifacts.load_dictionary` reads it; download it if needed.

    A tag may stand for several files (`Site.published_files`): the first that the hub has is taken, once for all.

    Args:
        tag: site (`M2`) or file (`A2_S-3_R1_P0`).

    Raises:
        FileNotFoundError: it is no tag, nothing is published for it, or the hub cannot be reached or lacks it.
        ModuleNotFoundError, ValueError: as `model_folder`.
    """
    site = _published_site(tag)

    def build(folder: Path, pt_file: Path) -> None:
        converted = convert_dictionary(load_torch_file(pt_file), site)
        artifacts.save_dictionary(converted.config, converted.params, folder)

    sources = [_Source(REPOSITORY, (f"{file}.pt",)) for file in site.published_files()]
    otherwise = (
        f"A local file needs no network: lm.attach({site.tag!r}, 'FILE.pt'), or convert it: "
        f"tinymodel-convert dictionary FILE.pt DEST --site {site.tag}."
    )
    return _converted(cache_folder() / "dictionaries" / site.tag, sources, build, otherwise)


def tokenizer_folder() -> Path:
    """Return the folder of the published tokenizer, as `Tokenizer.from_pretrained` reads it; download it if needed.

    Raises:
        FileNotFoundError: the hub cannot be reached, or has none of the repositories.
        ModuleNotFoundError, ValueError: as `model_folder`.
    """

    def build(folder: Path, vocab_json: Path, merges_txt: Path) -> None:
        # Hugging Face's cache may hold the two in folders that hold other files, too: only these two are wanted.
        gpt2 = Path(shutil.copy(vocab_json, folder)).parent
        shutil.copy(merges_txt, folder)
        tokenizer = Tokenizer.from_gpt2(gpt2)
        for file in (vocab_json, merges_txt):
            (folder / file.name).unlink()
        tokenizer.save_pretrained(folder)

    sources = [_Source(repository, ("vocab.json", "merges.txt")) for repository in TOKENIZER_REPOSITORIES]
    otherwise = (
        "Local files need no network: set TINYMODEL_TOKENIZER to a folder with GPT-2's vocab.json and merges.txt, "
        "or with a saved tokenizer."
    )
    return _converted(cache_folder() / "tokenizer", sources, build, otherwise)


def cache_folder() -> Path:
    """Return where conversions are kept: `$TINYMODEL_CACHE`, else `~/.cache/tinymodel_jax`; it need not exist."""
    named = os.environ.get(CACHE_VARIABLE)
    root = Path(named).expanduser() if named else Path.home() / ".cache" / "tinymodel_jax"
    # A release with another format finds nothing of this one, and converts anew.
    return root / f"v{artifacts.FORMAT_VERSION}"


def _published_site(tag: str) -> Site:
    try:
        # A file's suffix may hold odd characters, but as part of a path they would lead elsewhere.
        site = None if "/" in tag or "\\" in tag else Site.parse(tag)[0]
    except ValueError:
        site = None
    if site is None:
        raise FileNotFoundError(
            f"there is no dictionary {tag!r}: it is no folder or file here, and no tag of a published one. A tag is a "
            f"kind ({', '.join(KINDS)}) and a layer, optionally a file's suffix: 'M2', 'A2_S-3_R1_P0'."
        )
    if not site.published_files():
        raise FileNotFoundError(
            f"no dictionary is published as the default for {site.tag!r}. Name a published file, such as "
            f"'{site.kind}{site.layer}_S-2_R1_P0', or attach one: lm.attach({site.tag!r}, path)."
        )
    return site


def _converted(folder: Path, sources: Sequence[_Source], build: Callable[..., None], otherwise: str) -> Path:
    """Return the folder, made of the first source that the hub has unless it is complete.

    Args:
        build: given an empty folder and the paths of a source's files, fills the folder.
        otherwise: what the user can do without the hub; ends the errors.
    """
    if _is_complete(folder):
        return folder
    try:
        from huggingface_hub.utils import WeakFileLock
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{sources[0]} has to be downloaded, which needs huggingface_hub: pip install 'tinymodel-jax[hub]'. "
            f"{otherwise}"
        ) from error
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent)
    except OSError as error:
        raise OSError(f"cannot write to the cache ({error}); let {CACHE_VARIABLE} name another folder.") from error
    # The lock saves the processes of one machine from downloading the same file at once.
    with scratch as path, WeakFileLock(folder.parent / f".{folder.name}.lock"):
        if not _is_complete(folder):
            _make(folder, sources, build, otherwise, Path(path))
    return folder


def _make(folder: Path, sources: Sequence[_Source], build: Callable[..., None], otherwise: str, scratch: Path) -> None:
    """Download into `scratch`, convert there, and move the result to its place."""
    source, files = _first_available(sources, scratch / "download", otherwise)
    built = scratch / "built"
    built.mkdir()
    try:
        build(built, *files.values())
    except ValueError as error:
        raise ValueError(f"what was downloaded as {source} is unusable: {error}") from error
    _write_source(built, source, {file: _sha256(path) for file, path in files.items()})
    if folder.exists():
        folder.rename(scratch / "damaged")
    try:
        built.rename(folder)
    except OSError:
        # Where locks do nothing, as on some network drives, another process may have been first.
        if not _is_complete(folder):
            raise


def _first_available(
    sources: Sequence[_Source], scratch: Path, otherwise: str
) -> tuple[_Source, dict[str, Path]]:
    """Return the first source that the hub has, and where its files are now."""
    missing = []
    for source in sources:
        try:
            return source, {file: _fetch(source.repository, file, scratch, otherwise) for file in source.files}
        except _NotThereError as error:
            missing.append(str(error))
    raise FileNotFoundError(f"nothing to download: {'; '.join(missing)}. {otherwise}")


def _fetch(repository: str, file: str, scratch: Path, otherwise: str) -> Path:
    """Return the path of a hub file: in Hugging Face's cache if it is there intact, else downloaded into `scratch`."""
    import huggingface_hub as hf
    from huggingface_hub.errors import RemoteEntryNotFoundError, RepositoryNotFoundError

    cached = hf.try_to_load_from_cache(repository, file)
    if isinstance(cached, str):
        expected = _expected_sha256(repository, file, Path(cached))
        if expected is None or _sha256(Path(cached)) == expected:
            return Path(cached)
    endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or hf.constants.ENDPOINT
    try:
        # Asked first because the download's own question is repeated for 23 seconds where there is no network.
        hf.get_hf_file_metadata(hf.hf_hub_url(repository, file, endpoint=endpoint), endpoint=endpoint)
        path = Path(hf.hf_hub_download(repository, file, endpoint=endpoint, cache_dir=scratch))
    except (RemoteEntryNotFoundError, RepositoryNotFoundError) as error:
        missing = f"the file {file}" if isinstance(error, RemoteEntryNotFoundError) else "that repository, or no access"
        raise _NotThereError(f"{repository} at {endpoint} has no {missing}") from error
    except Exception as error:  # errors of its HTTP library pass through huggingface_hub, which has changed the library
        offline = " HF_HUB_OFFLINE is set." if hf.constants.HF_HUB_OFFLINE else ""
        reason = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
        raise FileNotFoundError(
            f"cannot download {repository}/{file} from {endpoint}: {reason}.{offline} {otherwise}"
        ) from error
    expected = _expected_sha256(repository, file, path)
    found = _sha256(path)
    if expected is not None and found != expected:
        raise ValueError(
            f"{repository}/{file} from {endpoint} has sha256 {found}, expected {expected}; the download is dropped. "
            "Try again; if it comes the same, what is served there is not the published file."
        )
    return path


def _expected_sha256(repository: str, file: str, path: Path) -> str | None:
    """Return the known checksum, else the one that the hub announced: Hugging Face's cache names large files by it."""
    announced = path.resolve().name
    return SHA256.get(f"{repository}/{file}") or (announced if _SHA256_NAME.fullmatch(announced) else None)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_source(folder: Path, source: _Source, checksums: dict[str, str]) -> None:
    """Record where a conversion comes from, and the sizes by which `_is_complete` knows it."""
    made = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    record = {
        "repository": source.repository,
        "sha256": checksums,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "bytes": {path.relative_to(folder).as_posix(): path.stat().st_size for path in made},
    }
    artifacts.replace_file(folder / _SOURCE_FILE, (json.dumps(record, indent=2) + "\n").encode())


def _is_complete(folder: Path) -> bool:
    """Whether the folder is a conversion with all its files in their full sizes."""
    try:
        sizes = json.loads((folder / _SOURCE_FILE).read_bytes())["bytes"]
        return all((folder / file).stat().st_size == size for file, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
