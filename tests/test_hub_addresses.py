"""Models and dictionaries of any repository on the hub, against a server on loopback: downloads and errors."""

import hashlib
import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import make_dictionary
from hub_server import TOKEN, HubServer
from huggingface_hub import constants

import convert_torch_weights
from tinymodel_jax.commands.options import ModelAndDictionaryOptions, dictionary_folders
from tinymodel_jax.dictionaries.dictionary import Dictionary
from tinymodel_jax.dictionaries.sites import Site
from tinymodel_jax.io.formats.transcoder_sets import save_transcoder_set
from tinymodel_jax.io.hub.addresses import HubAddress, pinned
from tinymodel_jax.io.torch_files import save_torch_file
from tinymodel_jax.lm import TinyModel

OWN = "user/stories"
MODEL_FILES = [f"{OWN}/config.json", f"{OWN}/model.safetensors"]


@pytest.fixture
def model(hub_server: HubServer, shared_lm: TinyModel, tmp_path: Path) -> HubServer:
    """A hub with the tiny model and its dictionaries, and beside them files that no model has."""
    shared_lm.save_pretrained(tmp_path / "model")
    put(hub_server, OWN, tmp_path / "model")
    hub_server.files[f"{OWN}/README.md"] = hub_server.files[f"{OWN}/checkpoint.safetensors"] = b"not a model's"
    return hub_server


def put(server: HubServer, place: str, folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            server.files[f"{place}/{path.relative_to(folder).as_posix()}"] = path.read_bytes()


def refused(error: type[Exception], call: Callable[[], Any]) -> str:
    """Return the message of the error that `call` raises, having checked that it is one line."""
    with pytest.raises(error) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_same(one: Any, other: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, dict(one.params), dict(other.params))
    assert one.config == other.config


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("hub:user/repo", HubAddress("user/repo")),
        ("user/repo@main", HubAddress("user/repo", "", "main")),
        (
            "hub:a-b/c.d/blocks.8.hook_resid_pre/x@refs/pr/1",
            HubAddress("a-b/c.d", "blocks.8.hook_resid_pre/x", "refs/pr/1"),
        ),
        (Path("hub:user/repo/M2"), HubAddress("user/repo", "M2")),
    ],
)
def test_an_address_has_a_repository_a_path_and_a_revision(text: Any, address: HubAddress) -> None:
    assert HubAddress.parse(str(text)) == address
    assert HubAddress.of(text) == (address if str(text).startswith("hub:") else None)
    assert HubAddress.parse(str(address)) == address


@pytest.mark.parametrize("text", ["hub:gpt2", "hub:user/repo/../x", "hub:user/repo@", "hub:/repo", "hub:user/a b"])
def test_what_is_not_an_address_is_refused_with_the_form(text: str) -> None:
    for load in (TinyModel, Dictionary.from_pretrained):
        message = refused(ValueError, lambda load=load: load(text))
        assert repr(text) in message
        assert "hub:OWNER/NAME" in message


def test_a_models_folder_on_the_hub_is_the_model_and_its_dictionaries_come_when_used(
    model: HubServer, shared_lm: TinyModel
) -> None:
    lm = TinyModel(f"hub:{OWN}")
    assert_same(lm, shared_lm)
    assert lm.dictionary_tags == shared_lm.dictionary_tags
    configs = [f"{OWN}/dictionaries/{tag}/config.json" for tag in lm.dictionary_tags]
    assert sorted(model.downloads()) == sorted([*MODEL_FILES, *configs])
    model.requests.clear()
    assert_same(lm["M1"].dictionary, shared_lm["M1"].dictionary)
    assert model.downloads() == [f"{OWN}/dictionaries/M1/dictionary.safetensors"]


def test_a_model_keeps_to_its_commit_when_the_repository_changes(model: HubServer, shared_lm: TinyModel) -> None:
    lm, commit = TinyModel(f"hub:{OWN}"), model.commit(OWN)
    model.files = {name: file for name, file in model.files.items() if "/M1/" not in name}
    assert model.commit(OWN) != commit
    assert pinned(f"hub:{OWN}") == f"hub:{OWN}@{model.commit(OWN)}"
    assert_same(lm["M1"].dictionary, shared_lm["M1"].dictionary)


def test_a_revision_is_a_branch_or_a_commit(model: HubServer, shared_lm: TinyModel, tmp_path: Path) -> None:
    other = make_dictionary("blocks.0.hook_mlp_in", "blocks.0.hook_mlp_out", seed=7)
    other.save_pretrained(tmp_path / "other")
    content = {path.name: path.read_bytes() for path in (tmp_path / "other").iterdir()}
    model.branches[OWN, "next/one"] = {f"dictionaries/M0/{name}": file for name, file in content.items()}
    place = f"hub:{OWN}/dictionaries/M0"
    assert_same(Dictionary.from_pretrained(f"{place}@next/one"), other)
    assert_same(Dictionary.from_pretrained(f"{place}@{model.commit(OWN, 'next/one')}"), other)
    assert_same(Dictionary.from_pretrained(place), shared_lm["M0"].dictionary)
    message = refused(FileNotFoundError, lambda: Dictionary.from_pretrained(f"{place}@absent"))
    assert f"{OWN} has no branch, tag or commit 'absent'" in message


def test_a_dictionary_is_attached_by_its_address(model: HubServer, lm: TinyModel) -> None:
    lm.attach("M1", f"hub:{OWN}/dictionaries/M1")
    wrong = f"hub:{OWN}/dictionaries/M0"
    assert f"{wrong} is a dictionary from blocks.0" in refused(ValueError, lambda: lm.attach("M1", wrong))


def test_a_torch_file_on_the_hub_is_read_by_the_reader_that_runs_nothing(
    hub_server: HubServer, golden_lm: TinyModel, tmp_path: Path
) -> None:
    file = Path(__file__).parent / "data/lm_f32_zip.pt"
    hub_server.files[f"{OWN}/old/lm.pt"] = file.read_bytes()
    assert_same(TinyModel(f"hub:{OWN}/old/lm.pt", n_heads=golden_lm.config.n_heads), golden_lm)
    hub_server.files[f"{OWN}/old/lm.pt"] = b"cos\nsystem\n(S'true'\ntR."
    assert "lm.pt" in refused(ValueError, lambda: TinyModel(f"hub:{OWN}/old/lm.pt"))
    save_torch_file({"a": np.ones(3, np.float32)}, tmp_path / "other.pt")
    hub_server.files[f"{OWN}/other.pt"] = (tmp_path / "other.pt").read_bytes()
    assert "site" in refused(ValueError, lambda: Dictionary.from_pretrained(f"hub:{OWN}/other.pt"))


def test_a_cached_commit_is_loaded_without_a_request_and_a_cached_branch_offline(
    model: HubServer, shared_lm: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = f"hub:{OWN}@{model.commit(OWN)}"
    for name in (f"hub:{OWN}", commit):
        assert TinyModel(name)["M0"].dictionary.config == shared_lm["M0"].dictionary.config
    model.requests.clear()
    TinyModel(commit)["M0"]
    assert model.requests == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert_same(TinyModel(f"hub:{OWN}"), shared_lm)
    assert model.requests == []
    message = refused(FileNotFoundError, lambda: Dictionary.from_pretrained(f"hub:{OWN}/dictionaries/A1"))
    assert f"hub:{OWN}/dictionaries/A1 is not cached" in message
    assert "HF_HUB_OFFLINE" in message


def test_an_interrupted_download_is_resumed(model: HubServer, shared_lm: TinyModel, monkeypatch: Any) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    model.breaks[MODEL_FILES[1]] = [5000]
    assert_same(TinyModel(f"hub:{OWN}"), shared_lm)
    assert model.downloads().count(MODEL_FILES[1]) == 2


def test_the_sha256_of_what_was_loaded_is_recorded_with_the_commit(model: HubServer, tmp_path: Path) -> None:
    TinyModel(f"hub:{OWN}")["M0"]
    record = json.loads((tmp_path / f"cache/hub/{OWN}/{model.commit(OWN)}.json").read_text())
    assert (record["repository"], record["revision"]) == (OWN, model.commit(OWN))
    loaded = {name.removeprefix(f"{OWN}/") for name in model.downloads()}
    assert record["files"].keys() == loaded
    for name, entry in record["files"].items():
        assert entry["sha256"] == hashlib.sha256(model.files[f"{OWN}/{name}"]).hexdigest()


def test_a_cached_file_that_differs_from_what_the_hub_announced_is_refused(model: HubServer, tmp_path: Path) -> None:
    TinyModel(f"hub:{OWN}")
    (stored,) = (tmp_path / "huggingface").rglob("snapshots/*/model.safetensors")
    content = bytearray(stored.read_bytes())
    content[-1] ^= 1
    os.chmod(stored.resolve(), 0o600)
    stored.resolve().write_bytes(content)
    message = refused(ValueError, lambda: TinyModel(f"hub:{OWN}"))
    assert f"{stored.resolve()} in Hugging Face's cache is damaged" in message
    stored.resolve().unlink()
    assert TinyModel(f"hub:{OWN}").config


def test_another_programs_model_is_refused_before_its_weights(model: HubServer) -> None:
    model.files[f"{OWN}/config.json"] = b'{"architectures": ["GPT2LMHeadModel"]}'
    assert "config.json describes None" in refused(ValueError, lambda: TinyModel(f"hub:{OWN}"))
    assert MODEL_FILES[1] not in model.downloads()


def test_of_a_transcoder_set_only_the_layer_of_the_site_is_downloaded(hub_server: HubServer, tmp_path: Path) -> None:
    sites = [Site.whole(f"M{layer}") for layer in range(2)]
    transcoders = {site.tag: make_dictionary(site.hook_in, site.hook_out, seed=site.layer) for site in sites}
    save_transcoder_set(transcoders, tmp_path)
    put(hub_server, "user/set", tmp_path)
    assert "give site=" in refused(ValueError, lambda: Dictionary.from_pretrained("hub:user/set"))
    assert_same(Dictionary.from_pretrained("hub:user/set", site="M1"), transcoders["M1"])
    assert hub_server.downloads() == ["user/set/config.yaml", "user/set/layer_1.safetensors"]
    message = refused(FileNotFoundError, lambda: Dictionary.from_pretrained("hub:user/set", site="M7"))
    assert "the repository has layer_1.safetensors, layer_0.safetensors" in message


def test_a_dictionary_beside_a_model_is_downloaded_without_it(model: HubServer, tmp_path: Path) -> None:
    dictionary = make_dictionary("blocks.1.hook_attn_out", "blocks.1.hook_attn_out")
    dictionary.save_pretrained(tmp_path / "sae", format="saelens")
    put(model, OWN, tmp_path / "sae")
    assert Dictionary.from_pretrained(f"hub:{OWN}").config == dictionary.config
    assert sorted(model.downloads()) == [f"{OWN}/{n}" for n in ("cfg.json", "config.json", "sae_weights.safetensors")]


def test_a_private_repository_takes_the_users_token(
    model: HubServer, shared_lm: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.private.add(OWN)
    message = refused(FileNotFoundError, lambda: TinyModel(f"hub:{OWN}"))
    assert f"{model.url} has no repository {OWN}, or gives no access to it" in message
    assert "hf auth login" in message
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert_same(TinyModel(f"hub:{OWN}"), shared_lm)


def test_a_gated_repository_says_where_to_ask(model: HubServer) -> None:
    model.gated.add(OWN)
    assert f"ask for access at {model.url}/{OWN}" in refused(FileNotFoundError, lambda: TinyModel(f"hub:{OWN}"))


def test_what_is_not_in_a_repository_is_named_with_what_is(model: HubServer) -> None:
    message = refused(FileNotFoundError, lambda: Dictionary.from_pretrained(f"hub:{OWN}/dictionary/M0"))
    assert f"has nothing to load at hub:{OWN}/dictionary/M0: the repository has dictionaries/M0" in message
    message = refused(FileNotFoundError, lambda: TinyModel("hub:user/absent"))
    assert "has no repository user/absent" in message
    message = refused(FileNotFoundError, lambda: TinyModel(f"hub:{OWN}/dictionaries"))
    assert "has nothing to load" in message or "holds no model" in message


def test_options_of_commands_take_addresses(model: HubServer, shared_lm: TinyModel, capsys: Any) -> None:
    options = ModelAndDictionaryOptions(f"hub:{OWN}", None, Path(f"hub:{OWN}/dictionaries/M1"))
    assert_same(options.load_with_dictionary(Site.whole("M1"))["M1"].dictionary, shared_lm["M1"].dictionary)
    assert f'lm.attach("M1", "hub:{OWN}/dictionaries/M1")' in options.python(Site.whole("M1"))
    (alone,) = dictionary_folders(Path(f"hub:{OWN}/dictionaries/M1"))
    several = dictionary_folders(Path(f"hub:{OWN}/dictionaries@{model.commit(OWN)}"))
    assert alone in several
    assert {folder.name for folder in several} == set(shared_lm.dictionary_tags)
    assert "repository user/absent" in refused(FileNotFoundError, lambda: dictionary_folders(Path("hub:user/absent")))
    model.files[f"{OWN}/lm.pt"] = (Path(__file__).parent / "data/lm_f32_zip.pt").read_bytes()
    assert capsys.readouterr().err == ""
    assert convert_torch_weights.main(["inspect", f"hub:{OWN}/lm.pt"]) == 0
    assert "zip format" in capsys.readouterr().out


def test_folders_of_other_libraries_are_found_among_dictionaries(hub_server: HubServer, tmp_path: Path) -> None:
    for layer, format in enumerate((None, "saelens")):
        dictionary = make_dictionary(f"blocks.{layer}.hook_attn_out", f"blocks.{layer}.hook_attn_out")
        dictionary.save_pretrained(tmp_path / f"A{layer}", format=format)
    (tmp_path / "plots").mkdir()
    put(hub_server, "user/saes", tmp_path)
    for place in (tmp_path, Path("hub:user/saes")):
        found = dictionary_folders(place)
        assert [folder.name for folder in found] == ["A0", "A1"]
        assert dictionary_folders(found[1]) == [found[1]]


def test_no_network_is_one_error_at_once(hub_server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
    start = time.monotonic()
    for name in (f"hub:{OWN}", f"hub:{OWN}@{'0' * 40}"):
        message = refused(FileNotFoundError, lambda name=name: TinyModel(name))
        assert f"{name} is not cached, and cannot be downloaded" in message
        assert "refused" in message
    assert time.monotonic() - start < 5
