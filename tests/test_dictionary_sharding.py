"""Dictionaries on eight devices: every mesh gives one device's loss curves, and no whole dictionary ever travels."""

import jax
import numpy as np
import pytest
from eight_devices import on_eight_devices
from jax.sharding import PartitionSpec as P

from tinymodel_jax.config import TRAINED_ARCHITECTURES, TrainedArchitecture
from tinymodel_jax.training.dictionary_recipe import recipe_preset
from tinymodel_jax.training.dictionary_state import ActivationStatistics
from tinymodel_jax.training.sharding import DICTIONARY_RULES, partition_specs, path_name
from train.sweep import init_members, parse_members

FEATURES, WIDTH, VECTORS = 512, 32, 64

CURVES = f"""
import json, sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from tinymodel_jax.config import ModelConfig
from tinymodel_jax.dictionaries.sites import Site
from tinymodel_jax.training.data import DataMeta, TokenData
from tinymodel_jax.training.sharding import make_mesh
from tinymodel_jax.model.transformer import Transformer
from train.activations import ActivationOptions, ModelActivations
from train.dictionaries import compiled, first_statistics
from train.hlo import collectives
from train.sweep import Sweep, parse_members, site_recipe

FEATURES, WIDTH, VECTORS = {FEATURES}, {WIDTH}, {VECTORS}
config = ModelConfig(n_layers=2, d_model=WIDTH, n_heads=4, d_mlp=64, n_ctx=16, d_vocab=512)
params = Transformer(config).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
params = {{**params, "W_E": 50 * params["W_E"]}}
# enough ids that no batch holds two equal vectors: where activations tie, which are kept is a matter of their order
rows = np.random.default_rng(0).integers(0, 500, (200, 16)).astype("<u2")
rows[::3, 10:] = config.pad_id
counts = {{"train": 200, "valid": 200}}
tokens = dict.fromkeys(counts, int((rows != config.pad_id).sum()))
meta = DataMeta(16, 512, False, counts, tokens, counts, {{}}, "", "", "", None, None, 0)
data = TokenData(rows, rows, meta, Path("."))
sites = [Site("M", 0), Site("Ra", 1)]


def run(axes, architecture, devices=None):
    mesh = make_mesh(axes, devices)
    knob = {{"k": "3,6"}} if architecture in ("topk", "batch_topk") else {{"l1": "0.5,1"}}
    members = parse_members({{**knob, "seed": "0"}})
    source = ModelActivations(config, params, sites, data, ActivationOptions(batch_size=VECTORS, data_seed=1), mesh)
    changes = dict(batch_size=VECTORS, dead_after=100, learning_rate=1e-3)
    changes |= {{"reservoir_size": 16}} if architecture in ("relu", "gated") else {{"aux_features": 16}}
    recipes = {{n: site_recipe("house", architecture, FEATURES, 20, WIDTH, members, **changes) for n in source.places}}
    program = compiled(source, Sweep(recipes, members), mesh)
    states, losses = program.init(first_statistics(source)), []
    executable = program.step.lower(states, source.context, source.make_batch(0)).compile()
    found = collectives(executable.as_text(), mesh.shape)
    for step in range(20):
        states, metrics = program.step(states, source.context, source.make_batch(step))
        losses.append([np.asarray(metrics[name]["loss"]).tolist() for name in sorted(metrics)])
    return {{
        "losses": losses,
        "moved": [[one.kind, array.shape] for one in found for array in one.arrays],
        "shard": states["M0"].params["W_enc_T"].addressable_shards[0].data.shape,
    }}


architecture = "ARCHITECTURE"
result = {{"one": run("data=1", architecture, jax.devices()[:1])}}
for axes in ("data=8", "model=8", "data=2,model=2,sweep=2"):
    result[axes] = run(axes, architecture)
print(json.dumps(result))
"""


@pytest.mark.slow
@pytest.mark.parametrize("architecture", TRAINED_ARCHITECTURES)
def test_every_mesh_gives_the_loss_curves_of_one_device_and_moves_no_dictionary(architecture: str) -> None:
    curves = on_eight_devices(CURVES.replace("ARCHITECTURE", architecture))
    one = curves.pop("one")
    assert len(curves) == 3
    for axes, curve in curves.items():
        # float32 sums in another order, relative to the loss
        np.testing.assert_allclose(curve["losses"], one["losses"], rtol=1e-5, err_msg=axes)
        kinds = {kind for kind, _ in curve["moved"]}
        assert "all-reduce" in kinds, "the collectives were found at all"
        for kind, shape in curve["moved"]:
            if kind != "all-reduce":  # which is how data-parallel gradients are summed
                assert np.prod(shape) < FEATURES * WIDTH / 2, (axes, kind, shape)
    assert curves["data=8"]["shard"] == [2, FEATURES, WIDTH]
    assert curves["model=8"]["shard"] == [2, FEATURES // 8, WIDTH]
    assert curves["data=2,model=2,sweep=2"]["shard"] == [1, FEATURES // 2, WIDTH]


TIES = """
import functools, json
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from tinymodel_jax.training.dictionary_forward import execution_for, loss_and_gradient
from tinymodel_jax.training.dictionary_recipe import recipe_preset
from tinymodel_jax.training.dictionary_state import ActivationStatistics, init_state
from tinymodel_jax.training.sharding import make_mesh

recipe = recipe_preset("house", "ARCHITECTURE", 24, 10, k=5, batch_size=16)
state = init_state(jax.random.key(0), recipe, ActivationStatistics.zero(4).update(jnp.ones((1, 4))))
W = jnp.zeros((24, 4)).at[jnp.array([3, 4, 9, 15, 16, 23]), 0].set(1.0).at[20, 1].set(2.0)
params = state.params | {"W_enc_T": W, "W_dec": W, "b_enc": jnp.zeros(24), "b_dec": jnp.zeros(4)}
x, result = jnp.ones((16, 4)), {}
for axes, bitwise in [("", True), ("", False), ("data=8", True),
                      *[(a, False) for a in ("data=4,model=2", "model=8", "data=2,model=4")]]:
    mesh = make_mesh(axes) if axes else make_mesh("data=1", jax.devices()[:1])
    execution = execution_for(recipe, mesh=mesh)._replace(bitwise=bitwise)
    place = lambda array, *spec: jax.device_put(array, NamedSharding(mesh, P(*spec)))
    placed = {name: place(leaf, *([] if name == "b_dec" else ["model"])) for name, leaf in params.items()}
    compute = jax.jit(functools.partial(loss_and_gradient, recipe=recipe, execution=execution, widths=(24,)))
    outcome, _ = compute(placed, hyper=recipe.hyper(k=3), x=place(x, "data"), y=place(x, "data"))
    result[f"{axes} {bitwise}"] = [float(outcome.l0), outcome.fired.tolist(), outcome.residual.tolist()]
print(json.dumps(result))
"""


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["topk", "batch_topk"])
def test_every_mesh_keeps_the_same_of_equal_activations(architecture: str) -> None:
    found = on_eight_devices(TIES.replace("ARCHITECTURE", architecture))
    assert found[" True"][0] == 3
    assert all(each == found[" True"] for each in found.values()), found


@pytest.mark.parametrize("architecture", TRAINED_ARCHITECTURES)
def test_every_array_of_a_sweep_has_its_place(architecture: TrainedArchitecture) -> None:
    members = parse_members({"seed": "0,1"})
    recipe = recipe_preset("house", architecture, 24, 100, skip=True)
    statistics = ActivationStatistics.zero(8)
    states = jax.eval_shape(lambda: init_members(recipe, members, statistics, statistics))
    specs = jax.tree_util.tree_leaves_with_path(partition_specs(states, DICTIONARY_RULES))
    named = {path_name(path): spec for path, spec in specs}
    assert named["params/W_enc_T"] == named["moments/nu/W_dec"] == P("sweep", "model", None)
    assert named["silent_for"] == P("sweep", "model")
    assert named["params/b_dec"] == named["step"] == named["moments/count"] == P("sweep")
    if architecture == "jumprelu":
        assert named["params/threshold"] == P("sweep", "model")
        assert named["threshold"] == P("sweep")
