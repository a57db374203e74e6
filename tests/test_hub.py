"""The hub: what is downloaded, verified, converted and cached, against a server on loopback; its errors, one by one.

GPT-2's files are not in the repository: the tests that need them are skipped where test_tokenization.py's are.
"""

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tokenizers
from hub_server import HubServer
from huggingface_hub import constants, hf_hub_download
from tokenizers import decoders, models, pre_tokenizers

from tinymodel_jax.config import ModelConfig
from tinymodel_jax.dictionaries.dictionary import Dictionary
from tinymodel_jax.io import artifacts, default_tokenizer
from tinymodel_jax.io.convert import dictionary_tensors, export_model, model_tensors
from tinymodel_jax.io.hub import published as hub
from tinymodel_jax.io.torch_files import save_torch_file
from tinymodel_jax.lm import TinyModel
from tinymodel_jax.lm.dictionaries import ModelDictionaries
from tinymodel_jax.text.tokenizer import Tokenizer

REPOSITORY = Path(__file__).parents[1]
PUBLISHED_SHA256 = dict(hub.SHA256)
CONFIG = ModelConfig(n_layers=1, d_model=32, n_heads=16, d_mlp=128, n_ctx=16, d_vocab=50)
TOK_IDS = np.arange(12).reshape(2, 6)
MODEL = f"{hub.REPOSITORY}/tiny_model.pt"
GPT2_FILES = ("vocab.json", "merges.txt")
TINY_STORIES, GPT2 = hub.TOKENIZER_REPOSITORIES


@pytest.fixture(scope="session")
def model_pt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small bfloat16 model with the published keys."""
    rng = np.random.default_rng(0)
    params = {t.name: (0.1 * rng.normal(size=t.shape)).astype(ml_dtypes.bfloat16) for t in model_tensors(CONFIG)}
    path = tmp_path_factory.mktemp("published") / "model.pt"
    save_torch_file(export_model(CONFIG, params), path)
    return path


@pytest.fixture(scope="session")
def dictionary_pt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small float32 dictionary with the published keys, as wide as the model."""
    rng = np.random.default_rng(1)
    path = tmp_path_factory.mktemp("published") / "dictionary.pt"
    tensors = dictionary_tensors(20, CONFIG.d_model, CONFIG.d_model)
    save_torch_file({t.key: rng.normal(size=t.torch_shape).astype(np.float32) for t in tensors}, path)
    return path


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def server(hub_server: HubServer, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    """An empty hub that the environment names, empty caches, and no known checksum."""
    monkeypatch.setattr(hub, "SHA256", {})
    return hub_server


@pytest.fixture
def publish(server: HubServer, model_pt: Path, dictionary_pt: Path) -> Callable[..., None]:
    """Put the small model or the small dictionary on the server, under names without `.pt`."""

    def put(*names: str) -> None:
        for name in names:
            source = model_pt if name in hub.MODELS else dictionary_pt
            server.files[f"{hub.REPOSITORY}/{name}.pt"] = source.read_bytes()

    return put


def refused(error: type[Exception], call: Callable[[], Any]) -> str:
    """Return the message of the error that `call` raises, having checked that it is one line."""
    with pytest.raises(error) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def left_in(folder: Path) -> list[str]:
    """Return what is in a cache but its folders and locks."""
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.suffix != ".lock")


def forbid_torch_files(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(path: Any) -> None:
        raise AssertionError(f"{path} is read")

    monkeypatch.setattr(hub, "load_torch_file", read)
    monkeypatch.setattr(artifacts, "read_tensors", read)


def forbid_huggingface_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]:
        monkeypatch.setitem(sys.modules, name, None)


# Models


@pytest.mark.parametrize("name", hub.MODELS)
def test_a_published_name_gives_the_model_of_its_file(
    name: str, publish: Callable[..., None], model_pt: Path, cache: Path
) -> None:
    publish(name)
    lm = TinyModel(name)
    assert lm.config.n_heads == 16
    np.testing.assert_array_equal(lm(TOK_IDS), TinyModel(model_pt, n_heads=16)(TOK_IDS))
    folder = f"v1/models/{name}"
    assert left_in(cache) == [f"{folder}/config.json", f"{folder}/model.safetensors", f"{folder}/source.json"]


def test_a_conversion_keeps_the_number_format_and_says_where_it_comes_from(
    publish: Callable[..., None], model_pt: Path
) -> None:
    publish("tiny_model")
    folder = hub.model_folder("tiny_model")
    assert all(array.dtype == ml_dtypes.bfloat16 for array in artifacts.load_model(folder).params.values())
    source = json.loads((folder / "source.json").read_text())
    assert source["repository"] == "noanabeshima/tiny_model"
    assert source["sha256"] == {"tiny_model.pt": hashlib.sha256(model_pt.read_bytes()).hexdigest()}
    assert source["date"].endswith("+00:00")


def test_a_conversion_can_be_read_by_whom_the_user_lets_read_files(
    publish: Callable[..., None], tmp_path: Path
) -> None:
    publish("tiny_model")
    ordinary = tmp_path / "file"
    ordinary.touch()
    modes = {path.stat().st_mode for path in hub.model_folder("tiny_model").iterdir()}
    assert modes == {ordinary.stat().st_mode}


def test_a_second_start_asks_no_hub_and_reads_no_torch_file(
    publish: Callable[..., None], server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish("tiny_model", "mlp/M0_S-2_R1_P0")
    first = TinyModel(), hub.dictionary_folder("M0")
    server.requests.clear()
    forbid_torch_files(monkeypatch)
    forbid_huggingface_hub(monkeypatch)
    np.testing.assert_array_equal(TinyModel()(TOK_IDS), first[0](TOK_IDS))
    assert hub.dictionary_folder("M0") == first[1]
    assert server.requests == []


@pytest.mark.parametrize("damage", ["missing", "truncated", "source"])
def test_a_damaged_conversion_is_made_again(
    damage: str, publish: Callable[..., None], server: HubServer, model_pt: Path, cache: Path
) -> None:
    publish("tiny_model")
    folder = hub.model_folder("tiny_model")
    files = left_in(cache)
    if damage == "missing":
        (folder / "config.json").unlink()
    elif damage == "truncated":
        os.truncate(folder / "model.safetensors", 1000)
    else:
        (folder / "source.json").write_text("[]")
    server.requests.clear()
    np.testing.assert_array_equal(TinyModel()(TOK_IDS), TinyModel(model_pt, n_heads=16)(TOK_IDS))
    assert server.downloads() == [MODEL]
    assert left_in(cache) == files


def test_an_unknown_model_lists_the_published_ones(server: HubServer) -> None:
    message = refused(FileNotFoundError, lambda: TinyModel("tiny_modle"))
    assert "'tiny_modle'" in message
    assert all(name in message for name in hub.MODELS)
    assert "save_pretrained" in message
    assert ".pt" in message
    assert server.requests == []


# Dictionaries


def test_a_models_dictionary_comes_from_the_hub_and_is_loaded_once(
    publish: Callable[..., None],
    server: HubServer,
    dictionary_pt: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ModelDictionaries, "_has_published_sizes", True)  # the small model is smaller
    publish("tiny_model", "mlp/M0_S-2_R1_P0")
    lm, local = TinyModel(), TinyModel()
    server.requests.clear()
    local.attach("M0", dictionary_pt)
    acts = lm["M0"](TOK_IDS)
    np.testing.assert_array_equal(acts, local["M0"](TOK_IDS))
    assert server.downloads() == [f"{hub.REPOSITORY}/mlp/M0_S-2_R1_P0.pt"]
    shutil.rmtree(cache)
    server.requests.clear()
    np.testing.assert_allclose(lm["M0N3"](TOK_IDS), acts[..., 3], rtol=1e-6, atol=1e-6)
    assert server.requests == []


@pytest.mark.parametrize(
    ("tag", "file", "reads", "predicts"),
    [
        ("M2", "mlp/M2_S-2_R1_P0", "blocks.2.hook_mlp_in", "blocks.2.hook_mlp_out"),
        ("M3", "mlp/M3_S-1_B0_P0", "blocks.3.hook_mlp_in", "blocks.3.hook_mlp_out"),
        ("T1", "mlp_map_test/M1_S-3_R1_P0", "blocks.1.hook_mlp_in", "blocks.1.hook_mlp_out"),
        ("A2_S-3_R1_P0", "attn/A2_S-3_R1_P0", "blocks.2.hook_attn_out", "blocks.2.hook_attn_out"),
        ("Ra0", "res_pre_attn/Ra0_S-3_R1_P0", "blocks.0.hook_resid_pre", "blocks.0.hook_resid_pre"),
        ("Rm0", "res_pre_mlp/Rm0_S-3_R1_P0", "blocks.0.hook_resid_mid", "blocks.0.hook_resid_mid"),
    ],
)
def test_a_tag_gives_its_published_file_at_its_site(
    tag: str, file: str, reads: str, predicts: str, publish: Callable[..., None], server: HubServer
) -> None:
    publish(file)
    config = Dictionary.from_pretrained(tag).config
    assert (config.hook_in, config.hook_out, config.n_features) == (reads, predicts, 20)
    assert server.downloads() == [f"{hub.REPOSITORY}/{file}.pt"]


def test_the_first_of_a_tags_files_that_exists_is_taken(publish: Callable[..., None], server: HubServer) -> None:
    publish("attn_test/A2_S-3_R1_P0")
    folder = hub.dictionary_folder("A2_S-3_R1_P0")
    assert json.loads((folder / "source.json").read_text())["sha256"].keys() == {"attn_test/A2_S-3_R1_P0.pt"}
    server.requests.clear()
    assert hub.dictionary_folder("A2_S-3_R1_P0") == folder
    assert server.requests == []


def test_a_later_file_does_not_stand_in_for_one_that_the_hub_has_but_fails_to_send(
    publish: Callable[..., None], server: HubServer, cache: Path
) -> None:
    publish("attn/A2_S-3_R1_P0", "attn_test/A2_S-3_R1_P0")
    server.statuses[f"{hub.REPOSITORY}/attn/A2_S-3_R1_P0.pt"] = 503
    message = refused(FileNotFoundError, lambda: hub.dictionary_folder("A2_S-3_R1_P0"))
    assert "attn/A2_S-3_R1_P0.pt" in message
    assert "503" in message
    assert left_in(cache) == []


@pytest.mark.parametrize(
    ("tag", "said"),
    [
        ("no/such/folder", "'no/such/folder'"),
        ("M2_S-2/../x_P0", "'M2_S-2/../x_P0'"),
        ("B2", "Ra, A, Rm, T, M, Mo"),
        ("M4", "'M4'"),
        ("Mo1", "lm.attach('Mo1'"),
    ],
)
def test_a_tag_without_a_published_file_is_refused_without_asking(tag: str, said: str, server: HubServer) -> None:
    assert said in refused(FileNotFoundError, lambda: Dictionary.from_pretrained(tag))
    assert server.requests == []


# What can go wrong


def test_a_file_that_the_hub_lacks_is_named_with_a_way_out(
    publish: Callable[..., None], server: HubServer, cache: Path
) -> None:
    publish("tiny_model")
    message = refused(FileNotFoundError, lambda: TinyModel("tiny_model_1_epoch"))
    assert f"{server.url} has no tiny_model_1_epoch.pt in noanabeshima/tiny_model" in message
    assert "A local file needs no network: TinyModel('FILE.pt')" in message
    message = refused(FileNotFoundError, lambda: hub.dictionary_folder("M0_S-3_R1_P0"))
    assert "mlp/M0_S-3_R1_P0.pt" in message
    assert "mlp_map_test/M0_S-3_R1_P0.pt" in message
    assert "A local file needs no network: lm.attach('M0_S-3_R1_P0', 'FILE.pt')" in message
    assert left_in(cache) == []


def test_a_hub_without_the_repository_is_told_from_a_missing_file(server: HubServer) -> None:
    message = refused(FileNotFoundError, TinyModel)
    assert f"{server.url} has no repository noanabeshima/tiny_model" in message


def test_no_network_is_one_error_at_once(server: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
    start = time.monotonic()
    for load, way_out in [
        (TinyModel, "TinyModel('FILE.pt')"),
        (lambda: hub.dictionary_folder("M2"), "lm.attach('M2'"),
        (hub.tokenizer_folder, "TINYMODEL_TOKENIZER"),
    ]:
        message = refused(FileNotFoundError, load)
        assert "refused" in message
        assert way_out in message
        with pytest.raises(FileNotFoundError) as caught:
            load()
        shown = traceback.format_exception(caught.value)
        assert shown == traceback.format_exception(caught.value, chain=False), "the library's own errors show, too"
    assert time.monotonic() - start < 10  # huggingface_hub alone retries for 23 seconds, three times
    assert left_in(cache) == []


def test_a_cache_that_cannot_be_made_is_named_with_the_reason(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TINYMODEL_CACHE", str(tmp_path / "file"))
    message = refused(OSError, TinyModel)
    assert message.startswith(f"cannot write to the cache {tmp_path / 'file' / 'v1' / 'models'}: Not a directory; set ")
    assert server.requests == []


def test_offline_mode_is_named(
    publish: Callable[..., None], server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish("tiny_model")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refused(FileNotFoundError, TinyModel)
    assert server.requests == []


def test_a_missing_huggingface_hub_names_the_extra(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        forbid_huggingface_hub(patch)
        message = refused(ModuleNotFoundError, TinyModel)
    assert "pip install 'tinymodel-jax[hub]'" in message
    assert "TinyModel('FILE.pt')" in message


def test_a_page_that_is_no_hub_is_not_taken_for_a_model(server: HubServer) -> None:
    server.statuses[MODEL] = 200  # like the login page of a network
    assert f"{MODEL} cannot be downloaded from {server.url}" in refused(FileNotFoundError, TinyModel)


@pytest.mark.parametrize("name", PUBLISHED_SHA256)
def test_a_file_with_another_checksum_than_the_published_one_is_refused(
    name: str, server: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "SHA256", PUBLISHED_SHA256)
    content = b"another file"
    repository, _, file = name.removeprefix("noanabeshima/").partition("/")
    if repository == "tiny_model":
        server.files[name] = content
        stem = Path(file).stem
        load = (lambda: hub.model_folder(stem)) if stem in hub.MODELS else (lambda: hub.dictionary_folder(stem))
    else:
        server.files |= {f"{GPT2}/{file}": content for file in GPT2_FILES}
        monkeypatch.setattr(hub, "SHA256", {name: PUBLISHED_SHA256[name]})
        load = hub.tokenizer_folder
    message = refused(ValueError, load)
    assert name in message
    assert f"has sha256 {hashlib.sha256(content).hexdigest()}, expected {PUBLISHED_SHA256[name]}" in message
    assert left_in(cache) == []


def test_the_published_checksums_are_those_of_the_documentation() -> None:
    text = (REPOSITORY / "docs/how-to/work-offline.md").read_text("utf-8")
    assert all(f"`{name}`" in text and sha256 in text for name, sha256 in PUBLISHED_SHA256.items())


def test_a_file_that_changed_on_its_way_is_refused_and_downloaded_anew_the_next_time(
    publish: Callable[..., None], server: HubServer, cache: Path
) -> None:
    publish("tiny_model")
    right = server.files[MODEL]
    server.sent_instead[MODEL] = right[:-1] + bytes([right[-1] ^ 1])
    message = refused(ValueError, TinyModel)
    assert f"expected {hashlib.sha256(right).hexdigest()}" in message
    assert left_in(cache) == []
    server.sent_instead.clear()
    assert TinyModel().config == CONFIG
    assert server.downloads() == [MODEL, MODEL]


def test_a_connection_that_breaks_is_resumed(
    publish: Callable[..., None], server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish("tiny_model")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    server.breaks[MODEL] = [5000]
    assert TinyModel().config == CONFIG
    assert server.downloads() == [MODEL, MODEL]


@pytest.mark.parametrize("size", [0, 5000])
def test_a_truncated_download_is_one_error_and_the_next_try_works(
    size: int, publish: Callable[..., None], server: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish("tiny_model")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    server.breaks[MODEL] = [size] + [0] * 20
    message = refused(FileNotFoundError, TinyModel)
    assert "noanabeshima/tiny_model/tiny_model.pt cannot be downloaded" in message
    assert left_in(cache) == []
    server.breaks.clear()
    assert TinyModel().config == CONFIG


def test_a_file_shorter_than_announced_is_refused_with_both_sizes(
    publish: Callable[..., None], server: HubServer, cache: Path
) -> None:
    publish("tiny_model")
    size = len(server.files[MODEL])
    server.sent_instead[MODEL] = server.files[MODEL][:1234]
    message = refused(FileNotFoundError, TinyModel)
    assert f"of size {size} but has size 1234" in message
    assert left_in(cache) == []
    server.sent_instead.clear()
    assert TinyModel().config == CONFIG


def test_a_file_that_is_no_model_is_refused(server: HubServer, dictionary_pt: Path, cache: Path) -> None:
    for content, said in [(dictionary_pt.read_bytes(), "not a TinyModel language model"), (b"text", "PyTorch file")]:
        server.files[MODEL] = content
        message = refused(ValueError, TinyModel)
        assert "noanabeshima/tiny_model/tiny_model.pt" in message
        assert said in message
    assert left_in(cache) == []


def test_a_cache_that_cannot_be_written_is_named(
    publish: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish("tiny_model")
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("TINYMODEL_CACHE", str(file))
    message = refused(OSError, TinyModel)
    assert str(file) in message
    assert "TINYMODEL_CACHE" in message


def test_an_interrupted_conversion_leaves_nothing(
    publish: Callable[..., None], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    publish("tiny_model")
    with monkeypatch.context() as patch:
        patch.setattr(hub, "convert_model", interrupt)
        with pytest.raises(KeyboardInterrupt):
            hub.model_folder("tiny_model")
    assert left_in(cache) == []
    assert TinyModel().config == CONFIG


# Hugging Face's own cache


def test_a_file_in_hugging_faces_cache_is_used_without_asking_and_left_there(
    publish: Callable[..., None], server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish("tiny_model")
    downloaded = Path(hf_hub_download(hub.REPOSITORY, "tiny_model.pt", endpoint=server.url))
    server.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert TinyModel().config == CONFIG
    assert server.requests == []
    assert downloaded.read_bytes() == server.files[MODEL]


def test_a_wrong_file_in_hugging_faces_cache_is_passed_over(
    publish: Callable[..., None], server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish("tiny_model")
    downloaded = Path(hf_hub_download(hub.REPOSITORY, "tiny_model.pt", endpoint=server.url))
    downloaded.write_bytes(b"damaged")
    monkeypatch.setattr(hub, "SHA256", {MODEL: hashlib.sha256(server.files[MODEL]).hexdigest()})
    server.requests.clear()
    assert TinyModel().config == CONFIG
    assert server.downloads() == [MODEL]


def test_a_downloaded_torch_file_is_kept_nowhere(
    publish: Callable[..., None], server: HubServer, tmp_path: Path
) -> None:
    publish("tiny_model")
    hub.model_folder("tiny_model")
    size = len(server.files[MODEL])
    assert not [path for path in tmp_path.rglob("*") if path.suffix == ".pt" or path.stat().st_size == size]


# Several at once


def test_threads_at_once_download_once(publish: Callable[..., None], server: HubServer) -> None:
    publish("tiny_model")
    with ThreadPoolExecutor(4) as pool:
        folders = list(pool.map(hub.model_folder, ["tiny_model"] * 4))
    assert artifacts.load_model(folders[0]).config == CONFIG
    assert server.downloads() == [MODEL]


def test_without_working_locks_the_first_of_two_wins(
    publish: Callable[..., None], server: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish("tiny_model")
    both = threading.Barrier(2)
    convert = hub.convert_model

    def convert_together(*args: Any) -> Any:
        both.wait(timeout=60)
        return convert(*args)

    monkeypatch.setattr("huggingface_hub.utils.WeakFileLock", lambda path: nullcontext())
    monkeypatch.setattr(hub, "convert_model", convert_together)
    with ThreadPoolExecutor(2) as pool:
        folders = list(pool.map(hub.model_folder, ["tiny_model"] * 2))
    assert folders[0] == folders[1]
    assert artifacts.load_model(folders[0]).config.n_heads == 16
    assert len(left_in(cache)) == 3
    assert server.downloads() == [MODEL, MODEL]


def test_processes_at_once_find_the_hub_by_the_environment_and_download_once(
    publish: Callable[..., None], server: HubServer, cache: Path, tmp_path: Path
) -> None:
    publish("tiny_model_1_epoch")  # which has no known checksum
    program = "from tinymodel_jax.io.hub import published as hub; print(hub.model_folder('tiny_model_1_epoch'))"
    own = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "0"}
    environment = {**os.environ, **own}
    processes = [
        subprocess.Popen([sys.executable, "-c", program], cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    folders = [Path(process.communicate(timeout=120)[0].decode().strip()) for process in processes]
    assert folders == [cache / "v1/models/tiny_model_1_epoch"] * 2
    assert artifacts.load_model(folders[0]).config.n_heads == 16
    assert server.downloads() == [f"{hub.REPOSITORY}/tiny_model_1_epoch.pt"]


# The tokenizer


@pytest.fixture
def fresh_default_tokenizer() -> Iterator[Callable[[], Tokenizer]]:
    """The default tokenizer as a new process finds it."""

    def load() -> Tokenizer:
        default_tokenizer.default_tokenizer.cache_clear()
        return default_tokenizer.default_tokenizer()

    yield load
    default_tokenizer.default_tokenizer.cache_clear()


@pytest.fixture
def any_bpe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let any BPE do as GPT-2's."""

    def from_gpt2(folder: str | os.PathLike[str]) -> Tokenizer:
        assert sorted(os.listdir(folder)) == sorted(GPT2_FILES)
        files = [str(Path(folder) / name) for name in GPT2_FILES]
        bpe: Any = tokenizers.Tokenizer(models.BPE.from_file(*files))
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        return Tokenizer(bpe)

    monkeypatch.setattr(Tokenizer, "from_gpt2", from_gpt2)


def small_bpe_files(repository: str) -> dict[str, bytes]:
    vocab = {letter: i for i, letter in enumerate("abcdehnotu")} | {"th": 10, "the": 11}
    return {f"{repository}/vocab.json": json.dumps(vocab).encode(), f"{repository}/merges.txt": b"t h\nth e\n"}


@pytest.mark.parametrize("repository", hub.TOKENIZER_REPOSITORIES)
def test_the_default_tokenizer_comes_from_the_first_repository_that_exists(
    repository: str,
    server: HubServer,
    cache: Path,
    any_bpe: None,
    fresh_default_tokenizer: Callable[[], Tokenizer],
) -> None:
    server.files = small_bpe_files(repository)
    server.small = set(server.files)
    first = fresh_default_tokenizer()
    assert first.encode("the hut") == [11, *first.encode(" "), 5, 9, 8]
    assert server.downloads() == [f"{repository}/vocab.json", f"{repository}/merges.txt"]
    assert json.loads((hub.tokenizer_folder() / "source.json").read_text())["repository"] == repository
    assert left_in(cache) == [f"v1/tokenizer/{name}.json" for name in ("source", "token_table", "tokenizer")]
    server.requests.clear()
    assert fresh_default_tokenizer().encode("the hut") == first.encode("the hut")
    assert server.requests == []


def test_asking_for_what_no_tokenizer_has_loads_none(
    server: HubServer, any_bpe: None, fresh_default_tokenizer: Callable[[], Tokenizer]
) -> None:
    lazy = default_tokenizer.LazyTokenizer()
    assert not any(hasattr(lazy, name) for name in ("shape", "__jax_array__", "_repr_html_", "tokenize", "_bpe"))
    assert server.requests == []
    server.files = small_bpe_files(TINY_STORIES)
    server.small = set(server.files)
    found = fresh_default_tokenizer()
    public = ["vocab_size", "begin_id", "end_id", "pad_id", "unk_id", "fingerprint"]
    assert [getattr(lazy, name) for name in public] == [getattr(found, name) for name in public]
    assert lazy.encode("the") == found.encode("the")


def test_a_repository_that_lacks_one_of_the_two_files_is_passed_over(server: HubServer, any_bpe: None) -> None:
    server.files = {**small_bpe_files(TINY_STORIES), **small_bpe_files(GPT2)}
    del server.files[f"{TINY_STORIES}/merges.txt"]
    assert json.loads((hub.tokenizer_folder() / "source.json").read_text())["repository"] == GPT2


def test_a_hub_without_any_tokenizer_says_how_to_give_one(server: HubServer) -> None:
    message = refused(FileNotFoundError, hub.tokenizer_folder)
    assert TINY_STORIES in message
    assert GPT2 in message
    assert "TINYMODEL_TOKENIZER" in message


def test_another_vocabulary_is_refused(server: HubServer, cache: Path) -> None:
    server.files = small_bpe_files(TINY_STORIES)
    message = refused(ValueError, hub.tokenizer_folder)
    assert f"{TINY_STORIES}/vocab.json" in message
    assert "12 entries, not 50257" in message
    assert left_in(cache) == []


def test_gpt2s_files_are_the_published_ones_and_give_the_published_ids(
    server: HubServer, monkeypatch: pytest.MonkeyPatch, fresh_default_tokenizer: Callable[[], Tokenizer]
) -> None:
    folder = Path(os.environ.get("TINYMODEL_TEST_GPT2", REPOSITORY.parent / "shared/data/gpt2")).expanduser()
    if not (folder / "vocab.json").is_file():
        pytest.skip(f"GPT-2's vocab.json and merges.txt are not in {folder}; TINYMODEL_TEST_GPT2 names another folder")
    monkeypatch.setattr(hub, "SHA256", PUBLISHED_SHA256)
    server.files = {f"{GPT2}/{name}": (folder / name).read_bytes() for name in GPT2_FILES}
    server.small = set(server.files)
    tok_ids, _ = fresh_default_tokenizer()(["Once upon a time", "In the forest"])
    assert tok_ids.tolist() == [[9996, 51, 56, 4, 36], [9996, 662, 2, 284, 9997]]
