"""Published models, dictionaries and GPT-2's BPE, downloaded once and cached in this package's format.

The cache is `$TINYMODEL_CACHE`, by default `~/.cache/tinymodel_jax`. A complete conversion is used without any request
and without `huggingface_hub`; an incomplete one is made again. Conversions are built in a scratch folder and moved into
place, so concurrent processes never see a partial one. Known checksums are verified.

The downloaded `.pt` file, 60 to 154 MB, is deleted after its conversion. A file that is already in Hugging Face's cache
is read there and left in place. Newer versions are not looked for.
"""

from __future__ import annotations

import datetime
import difflib
import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from tinymodel_jax.dictionaries.sites import KINDS, Site
from tinymodel_jax.io import artifacts
from tinymodel_jax.io.config_files import FORMAT_VERSION
from tinymodel_jax.io.convert import PUBLISHED_N_HEADS, convert_dictionary, convert_model
from tinymodel_jax.io.hub.client import SHA256 as SHA256_PATTERN
from tinymodel_jax.io.hub.client import endpoint, reason, require_client, sha256
from tinymodel_jax.io.torch_files import load_torch_file
from tinymodel_jax.runtime.atomic_files import replace_file
from tinymodel_jax.runtime.paths import CACHE_VARIABLE, cache_root
from tinymodel_jax.text.tokenizer import Tokenizer

REPOSITORY = "noanabeshima/tiny_model"
MODELS = ("tiny_model", "tiny_model_1_epoch", "tiny_model_2L_1E", "tiny_model_2L_3E")
TOKENIZER_REPOSITORIES = ("roneneldan/TinyStories", "openai-community/gpt2")

SHA256 = {
    f"{REPOSITORY}/tiny_model.pt": "dec406b1ad94cb345b2606d7f8cffa7c1114fcb60850e949eb17274cec30a8c3",
    f"{REPOSITORY}/tiny_model_2L_1E.pt": "04e8df0cd677a7060558e5c9eb3aaa30dbfe84e4ecc92bf17ef0e405dcf33baf",
    f"{REPOSITORY}/tiny_model_2L_3E.pt": "26dfc06da85d0e5d4de51a2e90108f9d585a81677bf4bac0ac079e780fda31f4",
    f"{REPOSITORY}/mlp/M2_S-2_R1_P0.pt": "25eec217d1c72e4d83180698a252235692a536bbe598c68e97a0fa5140a0ebdd",
    f"{REPOSITORY}/res_pre_mlp/Rm0_S-3_R1_P0.pt": "a691258a2de93c8679f3c25c17fc0a7640aecc70744146a5cfa57621df0152d9",
    "openai-community/gpt2/vocab.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "openai-community/gpt2/merges.txt": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
"""Known checksums. For other large files, the checksum that the hub announces is verified."""

_SOURCE_FILE = "source.json"


class _Source(NamedTuple):
    """Files of one hub repository that together make one cached folder."""

    repository: str
    files: tuple[str, ...]

    def __str__(self) -> str:
        return " and ".join(f"{self.repository}/{file}" for file in self.files)


class _File(NamedTuple):
    """A downloaded file."""

    name: str
    path: Path
    sha256: str


class _NotThereError(Exception):
    """The hub answered that the file or repository does not exist."""


def model_folder(name: str) -> Path:
    """Return the folder of a published model, as `artifacts.load_model` reads it; download and convert it if needed.

    Raises:
        FileNotFoundError: the name is not a published model's, the hub cannot be reached, or it does not have the file.
        ModuleNotFoundError: `huggingface_hub` is needed and not installed.
        ValueError: the downloaded file has the wrong checksum, or does not hold a model.
    """
    if name not in MODELS:
        close = difflib.get_close_matches(name, ("mini", *MODELS), n=1)
        raise FileNotFoundError(
            f"{name!r} is not a folder, a file or a published model{f'; did you mean {close[0]!r}?' if close else '.'} "
            f"The published models are {', '.join(MODELS)}; 'mini' comes with the package. A folder written by "
            "save_pretrained, a reference .pt file or another repository, hub:OWNER/NAME, also works."
        )

    def build(folder: Path, pt_file: Path) -> None:
        converted = convert_model(load_torch_file(pt_file), PUBLISHED_N_HEADS)
        artifacts.save_model(converted.config, converted.params, folder, dictionaries=converted.dictionaries)

    otherwise = (
        "A local file needs no network: TinyModel('FILE.pt'). Nor does the bundled model: TinyModel('mini'), in "
        "commands --model mini."
    )
    return _converted(cache_folder() / "models" / name, [_Source(REPOSITORY, (f"{name}.pt",))], build, otherwise)


def dictionary_folder(tag: str) -> Path:
    """Return the folder of a published dictionary, as `artifacts.load_dictionary` reads it; download it if needed.

    Of the files that the tag may mean (`Site.published_files`), the first that the hub has is used.

    Args:
        tag: site (`M2`) or file (`A2_S-3_R1_P0`).

    Raises:
        FileNotFoundError: it is not a tag, nothing is published for it, the hub cannot be reached, or it does not have
            the file.
        ModuleNotFoundError, ValueError: as `model_folder`.
    """
    site = _published_site(tag)

    def build(folder: Path, pt_file: Path) -> None:
        artifacts.save_dictionary(convert_dictionary(load_torch_file(pt_file), site), folder)

    sources = [_Source(REPOSITORY, (f"{file}.pt",)) for file in site.published_files()]
    otherwise = f"A local file needs no network: lm.attach({site.tag!r}, 'FILE.pt')."
    return _converted(cache_folder() / "dictionaries" / site.tag, sources, build, otherwise)


def tokenizer_folder() -> Path:
    """Return the folder of the published tokenizer, as `Tokenizer.from_pretrained` reads it; download it if needed.

    Raises:
        FileNotFoundError: the hub cannot be reached, or does not have any of the repositories.
        ModuleNotFoundError, ValueError: as `model_folder`.
    """

    def build(folder: Path, vocab_json: Path, merges_txt: Path) -> None:
        # Their folder may hold other files that from_gpt2 would prefer.
        with tempfile.TemporaryDirectory() as gpt2:
            shutil.copy(vocab_json, gpt2)
            shutil.copy(merges_txt, gpt2)
            Tokenizer.from_gpt2(gpt2).save_pretrained(folder)

    sources = [_Source(repository, ("vocab.json", "merges.txt")) for repository in TOKENIZER_REPOSITORIES]
    otherwise = (
        "Local files need no network: set TINYMODEL_TOKENIZER to a folder with GPT-2's vocab.json and merges.txt, "
        "or with a saved tokenizer."
    )
    return _converted(cache_folder() / "tokenizer", sources, build, otherwise)


def cache_folder() -> Path:
    """Return the folder of the conversions, which may not exist yet."""
    # Each format version has its own folder.
    return cache_root() / f"v{FORMAT_VERSION}"


def _published_site(tag: str) -> Site:
    try:
        # A file's suffix may hold any characters; slashes would lead out of the folder.
        site = None if "/" in tag or "\\" in tag else Site.parse(tag)[0]
    except ValueError:
        site = None
    if site is None:
        raise FileNotFoundError(
            f"{tag!r} is not a folder, a file or the tag of a dictionary. A tag is a kind "
            f"({', '.join(KINDS)}) and a layer, optionally a file's suffix: 'M2', 'A2_S-3_R1_P0'."
        )
    if not site.published_files():
        raise FileNotFoundError(
            f"{site.tag!r} has no published default dictionary. Name a published file, such as 'A2_S-3_R1_P0', or "
            f"attach one: lm.attach({site.tag!r}, path)."
        )
    return site


def _converted(folder: Path, sources: Sequence[_Source], build: Callable[..., None], otherwise: str) -> Path:
    """Return the folder; if it is incomplete, make it from the first source that the hub has.

    Args:
        build: a function that takes an empty folder and the paths of a source's files, and fills the folder.
        otherwise: what the user can do without the hub, for the end of error messages.
    """
    if _is_complete(folder):
        return folder
    require_client(f"downloading {sources[0]}", otherwise)
    from huggingface_hub.utils import WeakFileLock

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent)
    except OSError as error:
        reason = f"cannot write to the cache {folder.parent}: {error.strerror or error}"
        raise OSError(f"{reason}; set {CACHE_VARIABLE} to another folder.") from error
    # The lock keeps processes on one machine from downloading the same file at once.
    with scratch as path, WeakFileLock(folder.parent / f".{folder.name}.lock"):
        if not _is_complete(folder):
            _make(folder, sources, build, otherwise, Path(path))
    return folder


def _make(folder: Path, sources: Sequence[_Source], build: Callable[..., None], otherwise: str, scratch: Path) -> None:
    """Download into `scratch`, convert there, and move the result to `folder`."""
    source, files = _first_available(sources, scratch / "download", otherwise)
    built = scratch / "built"
    built.mkdir()
    try:
        build(built, *(file.path for file in files))
    except ValueError as error:
        raise ValueError(f"the download of {source} is unusable: {error}") from error
    _write_source(built, source, files)
    if folder.exists() and not _is_complete(folder):
        folder.rename(scratch / "damaged")
    try:
        built.rename(folder)
    except OSError:
        # On file systems without locks, such as some network drives, another process may have been first.
        if not _is_complete(folder):
            raise


def _first_available(sources: Sequence[_Source], scratch: Path, otherwise: str) -> tuple[_Source, list[_File]]:
    """Return the first source that the hub has, and its files."""
    missing = []
    for source in sources:
        try:
            return source, [_fetch(source.repository, file, scratch, otherwise) for file in source.files]
        except _NotThereError as error:
            missing.append(str(error))
    raise FileNotFoundError(f"nothing to download: {'; '.join(missing)}. {otherwise}")


def _fetch(repository: str, name: str, scratch: Path, otherwise: str) -> _File:
    """Return a hub file, from Hugging Face's cache if it is intact there, otherwise downloaded into `scratch`."""
    from huggingface_hub import try_to_load_from_cache

    expected = SHA256.get(f"{repository}/{name}")
    cached = try_to_load_from_cache(repository, name)
    if isinstance(cached, str):
        file = _File(name, Path(cached), sha256(Path(cached)))
        if expected in (None, file.sha256):
            return file
    path, announced = _download(repository, name, scratch, otherwise)
    file = _File(name, path, sha256(path))
    expected = expected or announced
    if expected not in (None, file.sha256):
        raise ValueError(
            f"{repository}/{name} from {endpoint()} has sha256 {file.sha256}, expected {expected}; the download was "
            f"deleted. Try again; if this repeats, {endpoint()} does not serve the published file."
        )
    return file


def _download(repository: str, name: str, scratch: Path, otherwise: str) -> tuple[Path, str | None]:
    """Return the path of the downloaded file, and the sha256 that the hub announces for it (large files only)."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import RemoteEntryNotFoundError, RepositoryNotFoundError

    hub = endpoint()
    try:
        # The download makes the same request, but without a network it retries for 23 seconds.
        etag = get_hf_file_metadata(hf_hub_url(repository, name, endpoint=hub), endpoint=hub).etag
        path = Path(hf_hub_download(repository, name, endpoint=hub, cache_dir=scratch))
    except RemoteEntryNotFoundError as error:
        raise _NotThereError(f"{hub} has no {name} in {repository}") from error
    except RepositoryNotFoundError as error:
        raise _NotThereError(f"{hub} has no repository {repository}, or gives no access to it") from error
    except Exception as error:  # errors of its HTTP library, which differs between versions of huggingface_hub
        message = f"{repository}/{name} cannot be downloaded from {hub}: {reason(error)}. {otherwise}"
        raise FileNotFoundError(message) from None
    return path, etag if etag is not None and SHA256_PATTERN.fullmatch(etag) else None


def _write_source(folder: Path, source: _Source, files: Sequence[_File]) -> None:
    """Record where a conversion comes from, and the file sizes that `_is_complete` checks."""
    made = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    record = {
        "repository": source.repository,
        "sha256": {file.name: file.sha256 for file in files},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "bytes": {path.relative_to(folder).as_posix(): path.stat().st_size for path in made},
    }
    replace_file(folder / _SOURCE_FILE, (json.dumps(record, indent=2) + "\n").encode())


def _is_complete(folder: Path) -> bool:
    """Whether the folder is a conversion with all its files at their full sizes."""
    try:
        sizes = json.loads((folder / _SOURCE_FILE).read_bytes())["bytes"]
        return all((folder / file).stat().st_size == size for file, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
