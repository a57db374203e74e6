"""Tags of dictionaries: the reference's list of strings, round trips, and junk."""

import json
from pathlib import Path

import pytest
from conftest import as_users_run_it
from hypothesis import example, given
from hypothesis import strategies as st
from oracle import error_of

from tinymodel_jax.config import ModelConfig
from tinymodel_jax.dictionaries.sites import HOOKS, KINDS, Site
from tinymodel_jax.model.hook_points import hook_names

REFERENCE = json.loads((Path(__file__).parent / "data" / "parse_mlp_tag.json").read_text("utf-8"))
"""String -> [published file, kind, layer, feature], false (no tag), or the exception that the reference raises."""

# Where the package differs from the reference, and why.
OTHER_DEFAULT_FILE = {
    # the reference's code names mlp/M1_S-4_R1_P0; its documentation and hub have the sparse MLPs under S-2
    "M1": "mlp/M1_S-2_R1_P0",
    "M1N123": "mlp/M1_S-2_R1_P0",
    "M1.123": "mlp/M1_S-2_R1_P0",
    "M1 5": "mlp/M1_S-2_R1_P0",
    "M01": "mlp/M1_S-2_R1_P0",
    # the hub has the twins of M under the letter M; there is no T0_… there
    "T0_S-3_R1_P0": "mlp_map_test/M0_S-3_R1_P0",
    # the reference looks for MLP-output SAEs among the sparse MLPs, where there are none
    "Mo0_S-3_R1_P0": "mlp_out/Mo0_S-3_R1_P0",
}
RAISES_THERE_BUT_PARSES_HERE = {
    # a site without a published default: a dictionary can be attached to it
    "Mo1": (Site("Mo", 1), None),
    # parsing does not check layers; a model does
    "M4": (Site("M", 4), None),
    "M10": (Site("M", 10), None),
}
PARSES_THERE_BUT_NOT_HERE = {
    "A1\n5",  # a line break as the separator is a mistake, not a tag
}


@pytest.mark.parametrize("text", REFERENCE)
def test_a_tag_means_what_it_means_in_the_reference(text):
    expected = REFERENCE[text]
    if text in RAISES_THERE_BUT_PARSES_HERE:
        assert expected == "AssertionError"
        assert Site.parse(text) == RAISES_THERE_BUT_PARSES_HERE[text]
    elif not expected or text in PARSES_THERE_BUT_NOT_HERE:
        assert "is not a dictionary tag, such as" in error_of(lambda: Site.parse(text))
    else:
        file, kind, layer, feature = expected
        site, found = Site.parse(text)
        assert (site.kind, site.layer, found) == (kind, layer, feature)
        assert OTHER_DEFAULT_FILE.get(text, file) in site.published_files()


def test_every_listed_difference_from_the_reference_is_one():
    for text, ours in OTHER_DEFAULT_FILE.items():
        assert REFERENCE[text][0] != ours
        assert REFERENCE[text][0] not in Site.parse(text)[0].published_files() or text.startswith("M0_")
    assert all(isinstance(REFERENCE[text], list) for text in PARSES_THERE_BUT_NOT_HERE)


suffixes = st.builds(
    "_S-{}_{}{}_P{}".format, st.integers(0, 9), st.sampled_from("RB"), st.integers(0, 9), st.integers(0, 9)
)
NAMED = sorted(set(HOOKS) - {Site(kind, 0).hook_in.split(".", 2)[2] for kind in ("Ra", "A", "Rm", "Mo")})
"""Hook points that no kind is an SAE of."""
sites = st.one_of(
    st.builds(Site, st.sampled_from(sorted(KINDS)), st.integers(0, 10**6), st.one_of(st.just(""), suffixes)),
    st.builds(Site, st.sampled_from(NAMED), st.integers(0, 10**6)),
)
separators = st.characters(exclude_categories=["C", "Z"], exclude_characters="0123456789")


@given(sites, st.one_of(st.none(), st.integers(0, 10**8)), separators)
def test_what_is_written_as_a_tag_reads_as_the_same_site(site, feature, separator):
    text = site.tag if feature is None else f"{site.tag}{separator}{feature}"
    assert Site.parse(text) == (site, feature)


@given(st.one_of(st.text(), st.text("MRaAoTm0123456789N_S-P. \n"), st.integers(), st.none(), st.binary()))
@example("M" + "9" * 5000)
@example("M1N" + "9" * 5000)
@example("M²")
@example("M1N٣")
def test_junk_is_a_tag_or_a_one_line_value_error(junk):
    with as_users_run_it():
        try:
            site, feature = Site.parse(junk)
        except ValueError:
            assert repr(junk)[:80] in error_of(lambda: Site.parse(junk))
        else:
            assert feature is None or feature >= 0
            assert Site.parse(site.tag) == (site, None)


def test_sites_of_a_block_are_ordered_as_the_forward_pass_meets_what_they_replace():
    order = hook_names(ModelConfig(n_layers=1))
    replaced = [order.index(Site(kind, 0).hook_out) for kind in KINDS]
    assert replaced == sorted(replaced)
    assert all(order.index(Site(kind, 0).hook_in) <= order.index(Site(kind, 0).hook_out) for kind in KINDS)
    assert Site("Mo", 0).order < Site("Ra", 1).order


def test_a_hook_point_is_a_site_by_its_name():
    assert Site.parse("blocks.1.attn.hook_zN12") == (Site("attn.hook_z", 1), 12)
    assert Site.whole("blocks.3.hook_resid_post").hook_in == "blocks.3.hook_resid_post"
    assert Site.at("blocks.0.mlp.hook_pre", "blocks.0.mlp.hook_pre").tag == "blocks.0.mlp.hook_pre"
    for kind in ("Ra", "A", "Rm", "Mo"):
        assert Site.whole(Site(kind, 2).hook_in) == Site(kind, 2)


@pytest.mark.parametrize("name", ["blocks.1.attn.hook_pattern", "blocks.1.attn.hook_attn_scores", "hook_embed"])
def test_a_hook_point_without_a_width_or_a_block_is_not_a_site(name):
    assert "Closest: " in error_of(lambda: Site.parse(name))


def test_only_transcoders_read_another_hook_point_than_they_predict():
    assert {kind for kind in KINDS if Site(kind, 0).hook_in != Site(kind, 0).hook_out} == {"T", "M"}


@pytest.mark.parametrize("layer", range(4))
def test_the_default_files_are_the_published_ones(layer):
    assert Site("M", layer).published_files() == (
        f"mlp/M{layer}_S-1_B0_P0" if layer == 3 else f"mlp/M{layer}_S-2_R1_P0",
    )
    assert Site("T", layer).published_files() == (f"mlp_map_test/M{layer}_S-3_R1_P0",)
    assert Site("A", layer).published_files() == (f"attn/A{layer}_S-{1 if layer < 2 else 3}_R1_P0",)
    assert Site("Ra", layer).published_files() == (f"res_pre_attn/Ra{layer}_S-3_R1_P0",)
    assert Site("Rm", layer).published_files() == (f"res_pre_mlp/Rm{layer}_S-3_R1_P0",)
    assert Site("Mo", layer).published_files() == ()


def test_a_layer_beyond_the_published_model_has_no_default_file():
    assert Site("M", 4).published_files() == ()
