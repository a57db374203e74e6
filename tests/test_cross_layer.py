"""Crosscoders and cross-layer transcoders, against sums over layers written by hand."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_dictionary
from oracle import F32, assert_close, error_of

from tinymodel_jax import interventions
from tinymodel_jax.analysis import attribution, sweeps, top_activations
from tinymodel_jax.analysis.search.logit_effects import logit_effects
from tinymodel_jax.config import ARCHITECTURES, DictionaryConfig
from tinymodel_jax.dictionaries.dictionary import Dictionary
from tinymodel_jax.dictionaries.encoding import encode
from tinymodel_jax.dictionaries.layers import is_written
from tinymodel_jax.dictionaries.sites import Site
from tinymodel_jax.lm import TinyModel
from tinymodel_jax.model.interventions import combine

LAYERS, WIDTH, FEATURES = 3, 16, 12
CROSSCODER, TRANSCODER = "Ra0+Ra1", "M0+M1"


def dictionary_at(tag: str, seed: int = 0, **options: Any) -> Dictionary:
    """Return a random dictionary at a joined site, with zeros where a cross-layer transcoder does not write."""
    site = Site.whole(tag)
    width = WIDTH * len(site.parts)
    found = make_dictionary(site.hook_in, site.hook_out, seed, d_in=width, d_out=width, **options)
    config = found.config
    written = is_written(config.n_features, config.d_out, config.n_layers)
    return Dictionary.from_params(config, {**found.params, "W_dec": jnp.where(written, found.params["W_dec"], 0)})


def options_of(architecture: str) -> dict[str, Any]:
    return {"architecture": architecture} | ({"k": 2} if architecture in ("topk", "batch_topk", "groupmax") else {})


def numbers(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def by_layer(dictionary: Dictionary, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the activations and the prediction of a cross-layer transcoder, one layer and one position at a time."""
    config, params = dictionary.config, {name: np.asarray(a, np.float64) for name, a in dictionary.params.items()}
    each, layers = config.n_features // LAYERS, range(LAYERS)
    acts, out = np.zeros((len(x), config.n_features)), np.tile(params["b_dec"], (len(x), 1))
    for row, inputs in enumerate(np.asarray(x, np.float64)):
        for layer in layers:
            own = slice(layer * each, (layer + 1) * each)
            of_layer = {name: a[..., own] if a.ndim else a for name, a in params.items() if "dec" not in name}
            of_layer = {name: jnp.asarray(a, jnp.float32) for name, a in of_layer.items()}
            options = {"architecture": config.architecture, "k": config.k}
            single = DictionaryConfig("a", "b", WIDTH, WIDTH, each, **options)
            acts[row, own] = encode(
                of_layer, single, jnp.asarray(inputs[layer * WIDTH : (layer + 1) * WIDTH], jnp.float32)
            )
            for to in range(layer, LAYERS):
                where = slice(to * WIDTH, (to + 1) * WIDTH)
                out[row, where] += acts[row, own] @ params["W_dec"][own, where]
    return acts, out


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_cross_layer_transcoder_is_a_sum_over_pairs_of_layers(architecture: str) -> None:
    dictionary = dictionary_at("M0+M1+M2", **options_of(architecture))
    x = numbers(5, LAYERS * WIDTH)
    acts, out = by_layer(dictionary, np.asarray(x))
    assert (acts > 0).any()
    assert_close(dictionary.encode(x), acts, F32)
    assert_close(dictionary(x), out, F32)
    chosen = [7, 0, 3, 11]
    assert_close(dictionary.encode(x, chosen), acts[:, chosen], F32)
    assert_close(dictionary.encode(x, 6), acts[:, 6], F32)


def test_initial_parameters_write_to_no_earlier_layer() -> None:
    config = dictionary_at("M0+M1+M2").config
    W_dec = np.asarray(Dictionary(config).init(jax.random.key(0))["params"]["W_dec"])
    np.testing.assert_array_equal(W_dec != 0, is_written(FEATURES, LAYERS * WIDTH, LAYERS))
    assert W_dec[0].all()
    assert not W_dec[FEATURES - 1, : 2 * WIDTH].any()


def test_tags_of_joined_sites_are_read_and_written() -> None:
    site, feature = Site.parse("Ra0+Rm0+blocks.1.hook_resid_postN12")
    assert (site.tag, site.layer, feature) == ("Ra0+Rm0+blocks.1.hook_resid_post", 1, 12)
    assert Site.at(site.hook_in, site.hook_out) == site
    assert site.hook_in == "blocks.0.hook_resid_pre+blocks.0.hook_resid_mid+blocks.1.hook_resid_post"
    transcoder = Site.whole("M0+M1")
    assert (transcoder.hook_in, transcoder.hook_out) == (
        "blocks.0.hook_mlp_in+blocks.1.hook_mlp_in",
        "blocks.0.hook_mlp_out+blocks.1.hook_mlp_out",
    )
    assert Site.parse("M1+5") == (Site("M", 1), 5)  # any character but a digit may precede a feature
    assert "different kinds" in error_of(lambda: Site.parse("Ra0+M1"))
    assert "once, in the order" in error_of(lambda: Site.parse("Ra1+Ra0"))
    assert "before its end" in error_of(lambda: Site.parse("M0N3+M1"))
    assert "'Ra0+Q1' is not a dictionary tag" in error_of(lambda: Site.parse("Ra0+Q1"))


BAD_CONFIGS = {
    "features": (("a+b", "c+d", 4, 4, 5), {}, "n_features=5 is not a multiple of 2"),
    "width": (("a+b", "a+b", 5, 5, 4), {}, "d_in=5 is not a multiple of 2"),
    "hook points": (("a+b", "c", 4, 4, 4), {}, "joins 2 hook points and hook_out 1"),
    "skip": (("a+b", "c+d", 4, 4, 4), {"skip": True}, "takes no skip"),
    "k": (("a+b", "c+d", 4, 4, 4), {"architecture": "topk", "k": 3}, "k=3 is above 2, the features of each"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_sizes_that_do_not_divide_are_named(case: str) -> None:
    sizes, options, message = BAD_CONFIGS[case]
    assert message in error_of(lambda: DictionaryConfig(*sizes, **options))


def test_a_saved_dictionary_of_joined_sites_is_read_again(tmp_path: Any) -> None:
    for tag in (CROSSCODER, TRANSCODER):
        dictionary = dictionary_at(tag)
        dictionary.save_pretrained(tmp_path / tag)
        found = Dictionary.from_pretrained(tmp_path / tag, tag)
        assert found.config == dictionary.config
        jax.tree.map(np.testing.assert_array_equal, found.params, dictionary.params)


@pytest.fixture
def joined(lm: TinyModel) -> TinyModel:
    """The tiny model with a crosscoder and a cross-layer transcoder."""
    lm.attach(CROSSCODER, dictionary_at(CROSSCODER, 1))
    lm.attach(TRANSCODER, dictionary_at(TRANSCODER, 2))
    return lm


def test_activations_are_those_of_the_concatenated_values(joined: TinyModel, tok_ids: np.ndarray) -> None:
    for tag in (CROSSCODER, TRANSCODER):
        dictionary = joined[tag].dictionary
        _, acts = joined.run_with_cache(tok_ids)
        x = jnp.concatenate([acts[name] for name in dictionary.config.hooks_in], axis=-1)
        assert_close(joined[tag](tok_ids), dictionary.encode(x), F32)
        assert_close(joined[f"{tag}N8"](tok_ids), dictionary.encode(x, 8), F32)


def by_hand(lm: TinyModel, tag: str, tok_ids: np.ndarray, change: Any = lambda acts: acts) -> Any:
    """Return the log-probabilities with the predictions from changed activations written by functions as hooks."""
    dictionary, hooks = lm[tag].dictionary, {}
    _, clean = lm.run_with_cache(tok_ids)
    config, width = dictionary.config, WIDTH
    for part, name in enumerate(config.hooks_out):

        def hook(value: Any, acts: Any, part: int = part) -> Any:
            del value
            source = clean if config.is_crosscoder else acts
            known = config.hooks_in if config.is_crosscoder else config.hooks_in[: part + 1]
            x = jnp.concatenate([source[name] for name in known], axis=-1)
            x = jnp.pad(x, ((0, 0), (0, 0), (0, config.d_in - x.shape[-1])))
            return dictionary.decode(change(dictionary.encode(x)))[..., part * width : (part + 1) * width]

        hooks[name] = hook
    return lm.run_with_hooks(tok_ids, hooks)[0]


@pytest.mark.parametrize("tag", [CROSSCODER, TRANSCODER])
def test_a_splice_replaces_every_value_that_the_dictionary_predicts(
    joined: TinyModel, tok_ids: np.ndarray, tag: str
) -> None:
    expected = by_hand(joined, tag, tok_ids)
    assert_close(joined.splice(tag)(tok_ids), expected, F32)
    assert_close(joined.run_with_hooks(tok_ids, interventions.splice(joined[tag]))[0], expected, F32)
    assert_close(joined.splice(tag, include_error=True)(tok_ids), joined(tok_ids), F32)
    assert joined.splice(tag).spliced == (tag,)


@pytest.mark.parametrize("tag", [CROSSCODER, TRANSCODER])
def test_an_edit_of_features_changes_what_a_splice_decodes(joined: TinyModel, tok_ids: np.ndarray, tag: str) -> None:
    features, amounts = [1, 7], jnp.asarray([0.5, 2.0])
    edit = interventions.clamp(joined[tag], features, amounts)
    expected = by_hand(joined, tag, tok_ids, lambda acts: acts.at[..., jnp.asarray(features)].set(amounts))
    assert_close(joined.splice(tag).run_with_hooks(tok_ids, edit)[0], expected, F32)


@pytest.mark.parametrize("tag", [CROSSCODER, TRANSCODER])
def test_without_a_splice_an_edit_keeps_the_dictionarys_error(joined: TinyModel, tok_ids: np.ndarray, tag: str) -> None:
    edit = interventions.steer_features(joined[tag], [3, 8], 1.5)
    rows, hooks = joined[tag].dictionary.params["W_dec"][jnp.asarray([3, 8])].sum(axis=0), {}
    _, clean = joined.run_with_cache(tok_ids)
    for part, name in enumerate(joined[tag].dictionary.config.hooks_out):
        added = 1.5 * rows[part * WIDTH : (part + 1) * WIDTH]
        # along the stream, a crosscoder's changes do not add up: the value is the clean one plus this layer's row
        start = clean[name] if tag == CROSSCODER else 0
        hooks |= interventions.patch(name, start + added) if tag == CROSSCODER else interventions.steer(name, added)
    assert_close(joined.run_with_hooks(tok_ids, edit)[0], joined.run_with_hooks(tok_ids, hooks)[0], F32)
    unchanged = interventions.scale_features(joined[tag], slice(None), 1.0)
    assert_close(joined.run_with_hooks(tok_ids, unchanged)[0], joined(tok_ids), F32)


def test_a_crosscoder_reads_the_pass_with_all_other_edits(joined: TinyModel, tok_ids: np.ndarray) -> None:
    other = interventions.steer("blocks.0.hook_attn_out", np.ones(WIDTH, np.float32))
    both = combine(interventions.ablate(joined[CROSSCODER], [0, 5]), other)
    _, clean = joined.run_with_hooks(tok_ids, other, keep="blocks.*.hook_resid_pre")
    crosscoder = joined[CROSSCODER].dictionary
    acts = crosscoder.encode(jnp.concatenate([*clean.values()], axis=-1), [0, 5])
    lost = acts @ crosscoder.params["W_dec"][jnp.asarray([0, 5])]
    moved = jnp.any(acts != 0, axis=-1)
    hooks = [
        interventions.patch(name, clean[name] - lost[..., part * WIDTH : (part + 1) * WIDTH], moved)
        for part, name in enumerate(crosscoder.config.hooks_out)
    ]
    expected = joined.run_with_hooks(tok_ids, combine(other, *hooks))[0]
    assert_close(joined.run_with_hooks(tok_ids, both)[0], expected, F32)


def test_edits_of_two_crosscoders_at_one_hook_point_add_up(joined: TinyModel, tok_ids: np.ndarray) -> None:
    one, other = joined[CROSSCODER].dictionary, dictionary_at(CROSSCODER, 5)
    both = combine(interventions.steer_features(one, 3, 1.0), interventions.steer_features(other, 4, 1.0))
    row = one.params["W_dec"][3] + other.params["W_dec"][4]
    together = dataclasses.replace(one, params={**one.params, "W_dec": one.params["W_dec"].at[3].set(row)})
    expected = joined.run_with_hooks(tok_ids, interventions.steer_features(together, 3, 1.0))[0]
    assert_close(joined.run_with_hooks(tok_ids, both)[0], expected, F32)


def test_a_perfect_cross_layer_transcoder_gives_the_clean_logits(joined: TinyModel, tok_ids: np.ndarray) -> None:
    """Its features are the neurons, which write to their own layer only."""
    config, neurons = joined.config, joined.config.d_mlp
    site, blocks = Site.whole(TRANSCODER), [joined.params[f"blocks_{layer}"]["mlp"] for layer in range(config.n_layers)]
    W_dec = jax.scipy.linalg.block_diag(*(block["W_out"] for block in blocks))
    params = {
        name: jnp.concatenate([block[of] for block in blocks], axis=-1)
        for name, of in (("W_enc", "W_in"), ("b_enc", "b_in"), ("b_dec", "b_out"))
    } | {"W_dec": W_dec}
    sizes = 2 * WIDTH, 2 * WIDTH, 2 * neurons
    joined.attach(TRANSCODER, Dictionary.from_params(DictionaryConfig(site.hook_in, site.hook_out, *sizes), params))
    assert_close(joined.splice(TRANSCODER)(tok_ids), joined(tok_ids), F32)


def test_splices_of_joined_sites_act_in_the_order_of_the_forward_pass(joined: TinyModel, tok_ids: np.ndarray) -> None:
    joined.attach("Mo0", make_dictionary("blocks.0.hook_mlp_out", "blocks.0.hook_mlp_out", 9))
    spliced = joined.splice(["Mo0", TRANSCODER])
    once = joined.splice(TRANSCODER).run_with_hooks(tok_ids, interventions.splice(joined["Mo0"]))[0]
    assert_close(spliced(tok_ids), once, F32)
    # layer 1 of the spliced transcoder reads what its layer 0 wrote
    _, acts = joined.splice(TRANSCODER).run_with_cache(tok_ids)
    x = jnp.concatenate([acts[f"blocks.{layer}.hook_mlp_in"] for layer in range(2)], axis=-1)
    assert_close(joined.splice(TRANSCODER)[TRANSCODER](tok_ids), joined[TRANSCODER].dictionary.encode(x), F32)


def test_a_spliced_cross_layer_transcoder_generates(joined: TinyModel, tok_ids: np.ndarray) -> None:
    spliced = joined.splice(TRANSCODER)
    edit = interventions.steer_features(joined[TRANSCODER], 2, 1.0)
    out = spliced.generate_ids(tok_ids[:, :5], n_toks=4, temperature=0.0, hooks=edit)
    again = spliced.run_with_hooks(out[:, :-1], edit)[0]
    np.testing.assert_array_equal(np.asarray(again).argmax(axis=-1)[:, 4:], out[:, 5:])
    message = error_of(lambda: joined.splice(CROSSCODER).generate_ids(tok_ids[:, :5], n_toks=2))
    assert "read a first pass over whole rows" in message


def test_gradients_flow_through_a_first_pass(joined: TinyModel, tok_ids: np.ndarray) -> None:
    dictionary = joined[CROSSCODER].dictionary

    def loss(scale: Any) -> Any:
        edit = interventions.scale_features(dictionary, 3, scale)
        return joined.loss(tok_ids, hooks=edit)

    step = 1e-2
    slope = (loss(1 + step) - loss(1 - step)) / (2 * step)
    assert abs(float(jax.grad(loss)(1.0)) - float(slope)) < 1e-3


def test_what_depends_on_a_crosscoders_first_pass_is_refused(joined: TinyModel, tok_ids: np.ndarray) -> None:
    joined.attach("M0", make_dictionary("blocks.0.hook_mlp_in", "blocks.0.hook_mlp_out", 3))
    spliced = joined.splice([CROSSCODER, "M0"])  # M0 acts between what the crosscoder writes and what it reads
    assert "depends on the later splices of M0" in error_of(lambda: spliced["M0"](tok_ids))
    for call in (lambda: sweeps.ablate(spliced, TRANSCODER, tok_ids), lambda: sweeps.ablate(spliced, "Ra1", tok_ids)):
        assert "need whole passes; sweep the model without the crosscoder" in error_of(call)
    reader = joined.splice(CROSSCODER)["M0"]  # behind its first hook point, and nothing else is spliced
    name = "blocks.0.hook_mlp_in"
    _, acts = joined.run_with_hooks(tok_ids, interventions.splice(joined[CROSSCODER]), keep=(name,))
    assert_close(reader(tok_ids), reader.dictionary.encode(acts[name]), F32)


def test_features_of_a_cross_layer_transcoder_keep_their_layer(joined: TinyModel) -> None:
    dictionary = joined[TRANSCODER].dictionary
    per_layer = dictionary.config.features_per_layer
    x = numbers(4, 2 * WIDTH)
    chosen = [1, 0, per_layer + 2, per_layer]
    assert_close(dictionary.with_features(chosen).encode(x), dictionary.encode(x, chosen), F32)
    for features in ([0, 1], [per_layer, 0], [0, 1, per_layer]):
        assert "as many features of each layer, in the order" in error_of(partial(dictionary.with_features, features))


def test_joined_hook_points_of_different_widths_are_refused(lm: TinyModel) -> None:
    tag = "Ra0+blocks.0.mlp.hook_post"
    message = error_of(lambda: lm.attach(tag, dictionary_at(tag)))
    assert "16 for each of 2 hook points, but blocks.0.mlp.hook_post is 32 wide" in message


@pytest.mark.parametrize("tag", [CROSSCODER, TRANSCODER])
def test_a_sweep_gives_what_each_edit_alone_gives(joined: TinyModel, tok_ids: np.ndarray, tag: str) -> None:
    positions = np.arange(tok_ids.shape[1]) < 8
    clean = joined.loss(tok_ids, np.ones(tok_ids.shape))
    swept = sweeps.ablate(joined, tag, tok_ids, [1, 8, 10], positions=positions, metric="loss")
    steered = sweeps.steer(joined, tag, tok_ids, [0.5, -1.0], [3], readout="Mo1")
    for found, edit in (
        (swept.loss, [interventions.ablate(joined[tag], f, positions) for f in (1, 8, 10)]),
        (steered.loss[0], [interventions.steer_features(joined[tag], 3, s) for s in (0.5, -1.0)]),
    ):
        alone = [joined.loss(tok_ids, np.ones(tok_ids.shape), hooks=one) - clean for one in edit]
        assert_close(found, np.asarray(alone), F32)
    spliced = joined.splice(tag)
    assert "need whole passes" in error_of(lambda: sweeps.ablate(spliced, "M1", tok_ids))
    readout = error_of(lambda: sweeps.ablate(joined, "M0", tok_ids, [0], readout=CROSSCODER))
    assert "reads several hook points; name a dictionary of one" in readout
    vectors = np.ones((1, WIDTH))
    assert "added at one hook point" in error_of(lambda: sweeps.steer(joined, tag, tok_ids, 1.0, vectors=vectors))


def test_the_logit_effects_are_of_all_that_stays_in_the_stream(joined: TinyModel) -> None:
    W_U = joined.params["W_U"]
    for tag in (CROSSCODER, TRANSCODER):
        rows = joined[tag].dictionary.params["W_dec"]
        left = rows[:, WIDTH:] + (rows[:, :WIDTH] if tag == TRANSCODER else 0)
        effects = np.array(left @ W_U)
        effects -= effects.mean(axis=1, keepdims=True)
        found = logit_effects(joined, tag, top=2)
        assert_close(found.promoted_effect, -np.sort(-effects, axis=1)[:, :2], F32)


def test_top_activations_are_found_for_joined_sites(joined: TinyModel, tok_ids: np.ndarray) -> None:
    for tag in (CROSSCODER, TRANSCODER):
        found = top_activations.top_activations(joined, tag, tok_ids, k=1)
        peaks = np.asarray(joined[tag](tok_ids)).max(axis=(0, 1))
        assert_close(found.largest, peaks, F32)


def test_attribution_is_the_gradient_of_an_edit_of_each_feature(joined: TinyModel, tok_ids: np.ndarray) -> None:
    features = [1, 8, 10]
    estimates = attribution.attribute(joined, TRANSCODER, tok_ids, features, metric="loss").change

    def loss(factors: jax.Array) -> jax.Array:
        edit = interventions.scale_features(joined[TRANSCODER], features, factors)
        return joined.loss(tok_ids, np.ones(tok_ids.shape), hooks=edit)

    assert_close(estimates, -jax.grad(loss)(jnp.ones(len(features))), F32)
    message = error_of(lambda: attribution.attribute(joined, CROSSCODER, tok_ids))
    assert "which no gradient at them estimates" in message
