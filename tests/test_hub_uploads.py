"""Uploads to any repository on the hub, against a server on loopback: what one commit holds, cards, and failures."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import make_dictionary
from hub_server import TOKEN, HubServer
from huggingface_hub import constants
from test_hub_addresses import assert_same, refused

from tinymodel_jax.bundled import storyworld
from tinymodel_jax.config import DictionaryConfig
from tinymodel_jax.dictionaries.dictionary import Dictionary
from tinymodel_jax.dictionaries.sites import Site
from tinymodel_jax.io.hub.addresses import HubAddress
from tinymodel_jax.io.hub.cards import dictionary_card
from tinymodel_jax.lm import TinyModel

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's, of its httpx
OWN = "user/stories"
SAE = ("blocks.1.hook_attn_out", "blocks.1.hook_attn_out")


@pytest.fixture
def hub(hub_server: HubServer, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    """An empty hub to which the user may write."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return hub_server


def card_of(hub: HubServer, name: str = f"{OWN}/README.md") -> tuple[dict[str, Any], str]:
    """Return the metadata and the text of a card."""
    _, metadata, text = hub.files[name].decode().split("---\n", 2)
    return yaml.safe_load(metadata), text


def test_a_model_is_uploaded_in_one_commit_and_loaded_back(hub: HubServer, shared_lm: TinyModel) -> None:
    address = shared_lm.push_to_hub(OWN, license="mit")
    assert address == f"hub:{OWN}@{hub.commit(OWN)}"
    assert len(hub.messages) == 1
    lm = TinyModel(address)
    assert_same(lm, shared_lm)
    assert_same(lm["Rm1"].dictionary, shared_lm["Rm1"].dictionary)
    metadata, text = card_of(hub)
    assert metadata["license"] == "mit"
    assert (metadata["library_name"], metadata["pipeline_tag"]) == ("tinymodel_jax", "text-generation")
    assert {"interpretability", "jax", "sparse-autoencoder", "transcoder"} <= set(metadata["tags"])
    assert f'lm = TinyModel("hub:{OWN}")' in text
    assert all(f"`{tag}`" in text for tag in shared_lm.dictionary_tags)


def test_a_models_tokenizer_is_uploaded_too(hub: HubServer, story_model: Path) -> None:
    TinyModel(story_model).push_to_hub(OWN)
    assert TinyModel(f"hub:{OWN}").tokenizer.fingerprint == storyworld.tokenizer().fingerprint
    assert "license" not in card_of(hub)[0]


def test_a_dictionary_goes_to_a_folder_with_its_card_and_the_repository_gets_one(hub: HubServer) -> None:
    dictionary = make_dictionary(*SAE, architecture="topk", k=3)
    address = dictionary.push_to_hub(f"{OWN}/saes/A1", license="apache-2.0")
    assert address == f"hub:{OWN}/saes/A1@{hub.commit(OWN)}"
    assert_same(Dictionary.from_pretrained(address), dictionary)
    metadata, text = card_of(hub, f"{OWN}/saes/A1/README.md")
    assert metadata["tags"] == ["interpretability", "jax", "sparse-autoencoder", "topk"]
    assert f'Dictionary.from_pretrained("hub:{OWN}/saes/A1")' in text
    assert card_of(hub)[0]["license"] == "apache-2.0"
    assert "(saes/A1/README.md)" in card_of(hub)[1]
    hub.files[f"{OWN}/README.md"] = b"written by hand"
    make_dictionary(*SAE).push_to_hub(f"{OWN}/saes/other")
    assert hub.files[f"{OWN}/README.md"] == b"written by hand"


def test_a_dictionary_is_exchanged_in_another_librarys_format(hub: HubServer) -> None:
    dictionary = make_dictionary(*SAE)
    address = dictionary.push_to_hub(f"{OWN}/A1", format="saelens")
    weights = f"{OWN}/A1/sae_weights.safetensors"
    assert {weights, f"{OWN}/A1/cfg.json"} < hub.files.keys()
    metadata, _ = card_of(hub, f"{OWN}/A1/README.md")
    assert (metadata["library_name"], metadata["tags"][-1]) == ("saelens", "saelens")
    for name in (address, f"hub:{weights}"):
        loaded = Dictionary.from_pretrained(name)
        assert (loaded.config.hook_in, loaded.config.n_features) == (SAE[0], dictionary.config.n_features)
        np.testing.assert_allclose(loaded.params["W_dec"], dictionary.params["W_dec"], rtol=1e-6)
    message = refused(ValueError, lambda: dictionary.push_to_hub(f"{OWN}/A1"))
    assert f"hub:{OWN}/A1 holds a dictionary of saelens. Nothing was written" in message


FOREIGN = {
    "config.json": {"architectures": ["GPT2LMHeadModel"]},
    "cfg.json": {"project": "mine"},
    "config.yaml": {"model": {"lr": 1}},
}


@pytest.mark.parametrize(
    ("format", "name"),
    [
        (None, "config.json"),
        ("dictionary_learning", "config.json"),
        ("saelens", "cfg.json"),
        ("sparsify", "cfg.json"),
        ("circuit-tracer", "config.yaml"),
    ],
)
def test_another_programs_settings_are_not_overwritten(format: str | None, name: str, hub: HubServer) -> None:
    hub.files[f"{OWN}/A1/{name}"] = json.dumps(FOREIGN[name]).encode()
    places = {"circuit-tracer": ("blocks.1.hook_mlp_in", "blocks.1.hook_mlp_out")}
    recipe = {"architecture": "topk", "k": 3} if format == "sparsify" else {}
    dictionary, before = make_dictionary(*places.get(str(format), SAE), **recipe), dict(hub.files)
    message = refused(ValueError, lambda: dictionary.push_to_hub(f"{OWN}/A1@dev", format=format))
    assert message.startswith(f"hub:{OWN}/A1@dev")
    assert name in message
    assert (hub.files, hub.branches, hub.messages) == (before, {}, [])


def test_a_format_does_not_replace_another_and_replaces_itself(hub: HubServer) -> None:
    dictionary = make_dictionary(*SAE, architecture="topk", k=3)
    dictionary.push_to_hub(f"{OWN}/A1", format="sparsify")
    message = refused(ValueError, lambda: dictionary.push_to_hub(f"{OWN}/A1", format="saelens"))
    assert f"hub:{OWN}/A1 holds a dictionary of sparsify" in message
    other = make_dictionary(*SAE, architecture="topk", k=2)
    assert Dictionary.from_pretrained(other.push_to_hub(f"{OWN}/A1", format="sparsify")).config.k == 2


def test_the_layers_of_a_transcoder_set_are_uploaded_one_by_one(hub: HubServer) -> None:
    transcoders = [make_dictionary(f"blocks.{n}.hook_mlp_in", f"blocks.{n}.hook_mlp_out", seed=n) for n in range(2)]
    for layer, transcoder in enumerate(transcoders):
        address = transcoder.push_to_hub(f"{OWN}/set", format="circuit-tracer")
        assert address == f"hub:{OWN}/set/layer_{layer}.safetensors@{hub.commit(OWN)}"
        assert Dictionary.from_pretrained(address).config.hook_in == transcoder.config.hook_in
    _, text = card_of(hub, f"{OWN}/set/README.md")
    assert "Each layer has a file: `layer_0.safetensors`, `layer_1.safetensors`." in text
    assert f'Dictionary.from_pretrained("hub:{OWN}/set/layer_1.safetensors")' in text
    settings = hub.files[f"{OWN}/set/config.yaml"]
    attention = make_dictionary("blocks.2.hook_attn_in", "blocks.2.hook_attn_out")
    message = refused(ValueError, lambda: attention.push_to_hub(f"{OWN}/set", format="circuit-tracer"))
    assert "the same hook points in every layer" in message
    assert hub.files[f"{OWN}/set/config.yaml"] == settings


def test_a_format_of_single_files_is_refused_by_name(hub: HubServer) -> None:
    message = refused(ValueError, lambda: make_dictionary(*SAE).push_to_hub(f"{OWN}/A1", format="tinymodel-pt"))
    assert "push_to_hub has no format 'tinymodel-pt'" in message
    assert hub.requests == []


def test_a_card_names_the_kind_of_a_dictionary_of_several_hook_points() -> None:
    address = HubAddress.parse(OWN)
    for tag, kind in (
        ("Ra0+Ra1", "A crosscoder of"),
        ("M0+M1", "A cross-layer transcoder of"),
        ("A1", "A sparse auto"),
    ):
        site = Site.whole(tag)
        config = DictionaryConfig(site.hook_in, site.hook_out, d_in=8, d_out=8, n_features=6)
        assert kind in dictionary_card(address, config).text


def test_a_branch_is_made_and_main_stays(hub: HubServer, shared_lm: TinyModel) -> None:
    dictionary = make_dictionary(*SAE)
    shared_lm.push_to_hub(OWN)
    before = hub.commit(OWN)
    dictionary.push_to_hub(f"{OWN}/saes/A1@next")
    assert hub.commit(OWN) == before
    assert_same(Dictionary.from_pretrained(f"hub:{OWN}/saes/A1@next"), dictionary)
    message = refused(ValueError, lambda: dictionary.push_to_hub(f"{OWN}/A1@{before}"))
    assert "a commit cannot be changed" in message


def test_a_card_is_replaced_by_one_of_its_kind_unless_someone_has_written_it(
    hub: HubServer, shared_lm: TinyModel
) -> None:
    shared_lm.push_to_hub(OWN)
    shared_lm.push_to_hub(OWN, license="mit")
    assert card_of(hub)[0]["license"] == "mit"
    lines = hub.files[f"{OWN}/README.md"].splitlines(keepends=True)
    edited = b"".join(line for line in lines if not line.startswith(b"<!--"))
    hub.files[f"{OWN}/README.md"] = edited
    shared_lm.push_to_hub(OWN, license="gpl-3.0")
    assert hub.files[f"{OWN}/README.md"] == edited


def test_a_private_repository_is_made_private_and_a_public_one_is_not_taken_for_one(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    dictionary = make_dictionary(*SAE)
    dictionary.push_to_hub("user/own/A1", private=True)
    assert hub.private == {"user/own"}
    hub.repositories.add("user/shown")
    message = refused(ValueError, lambda: dictionary.push_to_hub("user/shown/A1", private=True))
    assert "user/shown exists and is public, so nothing was uploaded" in message
    assert len(hub.messages) == 1
    monkeypatch.delenv("HF_TOKEN")
    assert "gives no access" in refused(FileNotFoundError, lambda: Dictionary.from_pretrained("hub:user/own/A1"))


@pytest.mark.parametrize("step", ["create", "preupload", "upload", "commit"])
def test_a_failed_upload_changes_nothing_and_the_next_one_goes_on(
    step: str, hub: HubServer, shared_lm: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    first = make_dictionary(*SAE).push_to_hub(f"{OWN}/A1")
    hub.statuses[step] = 500
    to = f"{'user/new' if step == 'create' else OWN}/lm"
    message = refused(OSError, lambda: shared_lm.push_to_hub(to))
    assert f"the upload to hub:{to} failed, and changed nothing there" in message
    assert "500" in message
    assert "Do the same again" in message
    assert first.endswith(hub.commit(OWN))
    hub.statuses.clear()
    hub.requests.clear()
    assert_same(TinyModel(shared_lm.push_to_hub(to)), shared_lm)
    assert (("PUT", "upload") in hub.requests) == (step != "commit")


def test_a_commit_of_someone_else_in_between_lets_the_upload_fail(hub: HubServer) -> None:
    dictionary = make_dictionary(*SAE)
    dictionary.push_to_hub(f"{OWN}/A0")
    hub.commit_before = {f"{OWN}/A1/config.json": b"{}"}
    message = refused(OSError, lambda: dictionary.push_to_hub(f"{OWN}/A1"))
    assert "someone else has changed the repository in the meantime" in message
    assert hub.files[f"{OWN}/A1/config.json"] == b"{}"


def test_without_a_token_or_a_network_an_upload_says_what_to_do(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    dictionary = make_dictionary(*SAE)
    monkeypatch.delenv("HF_TOKEN")
    message = refused(OSError, lambda: dictionary.push_to_hub(f"{OWN}/A1"))
    assert f"Log in with `hf auth login`, or set HF_TOKEN to a token that may write to {OWN}." in message
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refused(OSError, lambda: dictionary.push_to_hub(f"{OWN}/A1"))
    assert "not an address" in refused(ValueError, lambda: dictionary.push_to_hub("stories"))


def test_a_licence_that_the_hub_does_not_know_is_refused_with_its_words(hub: HubServer) -> None:
    dictionary = make_dictionary(*SAE)
    message = refused(OSError, lambda: dictionary.push_to_hub(OWN, license="no licence"))
    assert '"license" must be one of' in message
    assert f"failed, and left the new repository {OWN} without files" in message
    assert hub.files == {}


def test_an_upload_does_not_overwrite_or_continue_something_else(
    hub: HubServer, shared_lm: TinyModel, lm: TinyModel
) -> None:
    hub.files["user/other/config.json"] = b'{"architectures": ["GPT2LMHeadModel"]}'
    message = refused(ValueError, lambda: shared_lm.push_to_hub("user/other"))
    assert "user/other has another config.json" in message
    shared_lm.push_to_hub(OWN)
    alone = lm.with_params(lm.config, lm.params)
    message = refused(ValueError, lambda: alone.push_to_hub(OWN))
    assert "parts of another upload that this one lacks" in message
    assert "dictionaries/Mo1/config.json" in message
    assert len(hub.messages) == 1
