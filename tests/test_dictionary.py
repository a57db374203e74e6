"""Dictionaries of all architectures against NumPy float64 and the reference, indices, and binding of parameters."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import pytest
from conftest import OUR_KIND, make_dictionary, random_params
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import F32, GOLDEN, assert_close, error_of

from tinymodel_jax.config import ARCHITECTURES, DictionaryConfig
from tinymodel_jax.dictionaries.dictionary import Dictionary, resolve_indices
from tinymodel_jax.dictionaries.encoding import keep_top_k, param_shapes

SAE = ("blocks.0.hook_mlp_out", "blocks.0.hook_mlp_out")
TRANSCODER = ("blocks.0.hook_mlp_in", "blocks.0.hook_mlp_out")
VARIANTS = [
    (architecture, hooks, {"skip": skip, "subtract_b_dec": subtract})
    for architecture in ARCHITECTURES
    for hooks, skip in ((SAE, False), (TRANSCODER, False), (TRANSCODER, True))
    for subtract in (False, True)
]
VARIANTS += [
    ("topk", hooks, {"normalize": normalize, "subtract_b_dec": True, "skip": True})
    for hooks in (SAE, TRANSCODER)
    for normalize in ("layer_norm", "constant_norm")
]


def make(architecture, hooks=SAE, **options):
    k = 3 if architecture in ("topk", "batch_topk", "groupmax") else None
    return make_dictionary(*hooks, architecture=architecture, k=k, **options)


def inputs(seed=0, shape=(2, 5, 16)):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize(("architecture", "hooks", "options"), VARIANTS)
def test_encoding_and_prediction_equal_numpy_s(architecture, hooks, options):
    dictionary, x = make(architecture, hooks, **options), inputs()
    acts = dictionary.encode(x)
    expected = oracle.encode(dictionary.params, dictionary.config, x)
    assert_close(acts, expected, F32)
    assert 0 < (expected > 0).sum() < expected.size
    assert_close(dictionary(x), oracle.reconstruct(dictionary.params, dictionary.config, x), F32)
    decoded = expected @ np.asarray(dictionary.params["W_dec"], np.float64) + np.asarray(dictionary.params["b_dec"])
    assert_close(dictionary.decode(acts), decoded, F32)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "indices", [0, -1, 7, np.int64(3), [1, 5, 5, -2], [], slice(0, 10, 3), slice(None, None, -1), np.array([4, 2])]
)
def test_indices_give_the_columns_of_the_whole(architecture, indices):
    dictionary, x = make(architecture), inputs()
    assert_close(dictionary.encode(x, indices=indices), np.asarray(dictionary.encode(x))[..., indices], F32)


@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a not in ("topk", "groupmax")])
def test_some_features_alone_encode_and_write_as_they_did_among_all(architecture):
    dictionary, x, chosen = make(architecture, TRANSCODER, skip=True), inputs(), [4, 0, 7]
    part = dictionary.with_features(chosen)
    assert part.config.n_features == 3
    acts = dictionary.encode(x)
    assert_close(part.encode(x), acts[..., jnp.array(chosen)], F32)
    others = acts.at[..., jnp.array(chosen)].set(0)
    assert_close(part(x), dictionary(x) - others @ dictionary.params["W_dec"], F32)


@pytest.mark.parametrize(("features", "says"), [([], r"got \[\]"), ([1, 1], "each once"), ([99], "out of range")])
def test_a_dictionary_of_no_feature_or_of_one_twice_is_refused(features, says):
    with pytest.raises(ValueError, match=says):
        make("relu").with_features(features)


@settings(max_examples=30)
@given(st.data())
def test_top_k_keeps_exactly_the_k_largest_and_lower_indices_of_equals(data):
    values = st.sampled_from([-2.0, -1.0, 0.0, 0.5, 1.0, 2.0, 3.0])
    row = np.array(data.draw(st.lists(values, min_size=8, max_size=8)), np.float32)
    k = data.draw(st.integers(1, 8))
    kept = sorted(range(8), key=lambda i: (-row[i], i))[:k]
    expected = [max(row[i], 0) if i in kept else 0 for i in range(8)]
    np.testing.assert_array_equal(keep_top_k(jnp.asarray(row), k), expected)


@pytest.mark.parametrize("k", [1, 5, 12])
def test_exactly_k_features_are_active_where_enough_are_positive(k):
    dictionary = make_dictionary(*SAE, architecture="topk", k=k)
    params = {**dictionary.params, "b_enc": dictionary.params["b_enc"] + 50}
    acts = Dictionary.from_params(dictionary.config, params).encode(inputs())
    np.testing.assert_array_equal((acts > 0).sum(-1), np.full((2, 5), k))


def test_features_of_a_groupmax_dictionary_are_not_taken_out_of_their_groups():
    assert "keep it whole" in error_of(lambda: make("groupmax").with_features([0, 1, 2]))


@pytest.mark.parametrize("normalize", ["layer_norm", "constant_norm"])
def test_an_input_without_size_is_encoded_and_has_finite_gradients(normalize):
    dictionary = make("relu", normalize=normalize)
    zeros = jnp.zeros((2, 16))
    bias = np.maximum(dictionary.params["b_enc"], 0)
    assert_close(dictionary.encode(zeros), np.stack([bias, bias]), F32)
    assert_close(dictionary(zeros), np.zeros((2, 16)), F32)
    assert np.isfinite(jax.grad(lambda x: dictionary(x).sum())(zeros)).all()


def test_a_negative_threshold_is_no_threshold():
    dictionary, x = make("jumprelu"), inputs()
    shared = {**dictionary.params, "threshold": jnp.full(12, -3.0)}
    relu = oracle.encode(shared, make("relu").config, x)
    assert_close(Dictionary.from_params(dictionary.config, shared).encode(x), relu, F32)


def test_a_threshold_is_a_gate_not_a_shift():
    dictionary, x = make("jumprelu"), inputs()
    params = {**dictionary.params, "threshold": jnp.full(12, 0.5)}
    acts = np.asarray(Dictionary.from_params(dictionary.config, params).encode(x))
    assert acts[acts > 0].min() > 0.5
    assert (acts == 0).any()


def test_any_leading_shape_is_kept():
    dictionary = make("relu")
    for shape in ((16,), (3, 16), (2, 3, 4, 16)):
        assert dictionary.encode(inputs(shape=shape)).shape == (*shape[:-1], 12)
        assert dictionary(inputs(shape=shape)).shape == shape


def test_a_dictionary_computes_in_its_own_number_format():
    dictionary, x = make("relu"), inputs()
    assert dictionary.encode(x.astype(jnp.bfloat16)).dtype == jnp.float32
    half = Dictionary.from_params(
        DictionaryConfig(**{**dictionary.config.to_dict(), "dtype": "bfloat16"}), dictionary.params
    )
    assert half.encode(x).dtype == half(x).dtype == jnp.bfloat16
    assert half.params["W_enc"].dtype == jnp.float32


def test_a_dictionary_without_parameters_is_used_like_a_linen_module():
    bound, x = make("gated", TRANSCODER, skip=True), inputs()
    module = Dictionary(bound.config)
    variables = module.init(jax.random.key(0), x)
    assert jax.tree.map(jnp.shape, dict(variables["params"])) == param_shapes(bound.config)
    assert not np.asarray(variables["params"]["W_skip"]).any()
    given_params = {"params": bound.params}
    np.testing.assert_array_equal(module.apply(given_params, x), bound(x))
    np.testing.assert_array_equal(module.apply(given_params, x, method="encode"), bound.encode(x))
    assert "from_pretrained" in error_of(lambda: module.encode(x))


def test_a_bound_dictionary_works_under_jit_and_grad():
    dictionary, x = make("relu"), inputs()
    assert_close(jax.jit(dictionary.encode)(x), oracle.encode(dictionary.params, dictionary.config, x), F32)
    _, w = jax.jit(lambda i: dictionary.encode(x, indices=i))(jnp.int32(3)), dictionary.params["W_enc"]
    slope = jax.grad(lambda x: dictionary.encode(x)[3])(jnp.asarray(w[:, 3]) * 10)
    assert_close(slope, w[:, 3], F32)


@pytest.mark.parametrize("theirs", [f"{kind}{layer}" for kind in ("A", "T", "M", "Ra", "Rm") for layer in range(4)])
def test_decoding_equals_the_reference_s(golden_dictionaries, golden, theirs):
    stored = golden("sparse_acts_readonly.npz")
    dictionary = golden_dictionaries[f"{OUR_KIND[theirs[:-1]]}{theirs[-1]}"]
    decoded = dictionary.decode(jnp.asarray(stored[theirs][:, :2]))
    assert_close(decoded, stored[f"{theirs}/recon_of_acts"], GOLDEN)


def test_parameters_that_do_not_fit_are_all_named():
    dictionary = make("jumprelu")
    wrong = {**dictionary.params, "W_dec": jnp.zeros((16, 12)), "W_skip": jnp.zeros((16, 16))}
    del wrong["threshold"]
    message = error_of(lambda: Dictionary.from_params(dictionary.config, wrong))
    assert "missing 'threshold' (12,)" in message
    assert "unexpected 'W_skip'" in message
    assert "'W_dec' has shape (16, 12), expected (12, 16)" in message


def test_parameters_are_stored_in_the_format_that_the_config_says():
    config = DictionaryConfig(*SAE, 16, 16, 12, param_dtype="bfloat16")
    params = random_params(param_shapes(config), 0)
    assert Dictionary.from_params(config, params).params["W_enc"].dtype == ml_dtypes.bfloat16


def test_an_input_of_another_width_is_an_error():
    dictionary = make("relu")
    expected = "x has shape (2, 15); its last axis must be d_in=16."
    assert error_of(lambda: dictionary.encode(jnp.zeros((2, 15)))) == expected
    assert error_of(lambda: dictionary(jnp.zeros((2, 15)))) == expected
    assert "acts has shape (2, 13)" in error_of(lambda: dictionary.decode(jnp.zeros((2, 13))))


@pytest.mark.parametrize(
    ("indices", "says"),
    [
        (12, "feature 12 is out of range; the dictionary has features 0..11"),
        (-13, "feature -13 is out of range"),
        ([0, 99], "feature 99 is out of range"),
        (1.0, "indices: got 1.0; expected an int, a slice, or a flat list of ints"),
        (True, "indices: got True"),
        ("7", "indices: got '7'"),
        (np.ones((3, 3)), "indices: got float64 values of shape (3, 3)"),
        ([[1], [2]], "values of shape (2, 1)"),
    ],
)
def test_indices_that_are_none_are_named(indices, says):
    assert says in error_of(lambda: resolve_indices(indices, 12))
    assert says in error_of(lambda: make("relu").encode(inputs(), indices=indices))


def test_neighbours_are_the_other_features_with_the_largest_cosine():
    dictionary = make_dictionary("a", "b", n_features=700)  # more than are compared together
    silent = dictionary.params["W_dec"].at[5].set(0)
    dictionary = Dictionary.from_params(dictionary.config, dictionary.params | {"W_dec": silent})
    W = np.asarray(silent, np.float64)
    for feature in (0, 5, 699):
        near = dictionary.neighbours(feature, 3)
        norms = np.linalg.norm(W, axis=1) * np.linalg.norm(W[feature])
        cosines = np.divide(W @ W[feature], norms, out=np.zeros(700), where=norms > 0)
        cosines[feature] = -np.inf
        order = np.argsort(-cosines, kind="stable")[:3]
        np.testing.assert_array_equal(near.features, order)
        assert_close(near.cosine, cosines[order], F32)
    every = dictionary.neighbours(slice(None), 3)
    assert every.features.shape == every.cosine.shape == (700, 3)
    for one, (features, cosine) in enumerate(zip(*dictionary.neighbours([5, 699], 3), strict=True)):
        np.testing.assert_array_equal(features, every.features[[5, 699][one]])
        assert_close(cosine, every.cosine[[5, 699][one]], F32)


def test_neighbours_that_do_not_exist_are_refused():
    dictionary = make_dictionary("a", "b")
    assert "n=12 is outside 1..11" in error_of(lambda: dictionary.neighbours(0, 12))
    assert "feature 12 is out of range" in error_of(lambda: dictionary.neighbours(12))


def test_directions_are_read_and_written_by_features_of_their_own(lm, tok_ids):
    hook = "blocks.1.mlp.hook_post"
    lm.attach(hook, Dictionary.from_directions(hook, np.eye(32)))
    post = np.asarray(lm.run_with_cache(tok_ids, hook)[1][hook])
    assert_close(np.asarray(lm[hook](tok_ids)), post, F32)
    directions = np.random.default_rng(0).normal(size=(5, 16))
    dictionary, x = Dictionary.from_directions("blocks.0.hook_resid_mid", directions), np.asarray(inputs(), np.float64)
    acts = np.maximum(x @ directions.T, 0)
    assert_close(np.asarray(dictionary.encode(inputs())), acts, F32)
    assert_close(np.asarray(dictionary(inputs())), acts @ directions, F32)


@pytest.mark.parametrize("wrong", [np.zeros(4), np.zeros((0, 4)), np.full((2, 4), np.nan), np.array([["a", "b"]])])
def test_what_is_not_a_table_of_directions_is_refused(wrong):
    message = error_of(lambda: Dictionary.from_directions("blocks.0.hook_resid_mid", wrong))
    assert f"values of shape {wrong.shape}; pass finite numbers (n, width)" in message
