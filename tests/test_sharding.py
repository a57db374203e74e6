"""Meshes and partition rules; training on eight devices gives the one-device loss curve."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import param_shapes
from eight_devices import on_eight_devices
from jax.sharding import PartitionSpec as P

from tinymodel_jax.config import ModelConfig
from tinymodel_jax.training.lm_step import LMOptimizer, init_state, make_optimizer
from tinymodel_jax.training.sharding import (
    LM_FSDP_RULES,
    LM_RULES,
    STEP_RULES,
    checksum,
    make_mesh,
    partition_specs,
    path_name,
    shardings,
)


def test_every_parameter_of_the_published_model_has_the_spec_of_the_table() -> None:
    optimizer = make_optimizer(LMOptimizer(), 10)
    state = jax.eval_shape(lambda key: init_state(key, ModelConfig(), optimizer), jax.random.key(0))
    specs = partition_specs(state, (*LM_FSDP_RULES, *STEP_RULES))
    named = {path_name(path): spec for path, spec in jax.tree_util.tree_leaves_with_path(specs)}
    in_block = {
        "attn/W_Q": P("model", "data", None),
        "attn/W_K": P("model", "data", None),
        "attn/W_V": P("model", "data", None),
        "attn/W_O": P("model", None, "data"),
        "attn/b_O": P(None),
        "mlp/W_in": P("data", "model"),
        "mlp/b_in": P("model"),
        "mlp/W_out": P("model", "data"),
        "mlp/b_out": P(None),
    }
    top = {"W_E": P(None, "data"), "W_pos": P(None, "data"), "W_U": P("data", "model"), "b_U": P("model")}
    params = {**top, **{f"blocks_{layer}/{name}": spec for layer in range(4) for name, spec in in_block.items()}}
    for where in ("params", "optimizer/1/mu", "optimizer/1/nu"):
        for name, spec in params.items():
            assert named.pop(f"{where}/{name}") == spec
    assert set(named.values()) == {P()}, "what is left counts steps"
    assert set(named) == {"step", "optimizer/1/count", "optimizer/3/count"}


@pytest.mark.parametrize("rules", [LM_RULES, LM_FSDP_RULES])
def test_the_parameters_of_a_model_are_placed_by_the_same_table(lm, rules) -> None:
    mesh = make_mesh("", jax.devices()[:1])
    placed = shardings(lm.params, rules, mesh)
    on_mesh = lm.with_params(lm.config, jax.device_put(lm.params, placed))
    assert placed["blocks_1"]["mlp"]["W_in"].spec == (P(None, "model") if rules is LM_RULES else P("data", "model"))
    np.testing.assert_array_equal(on_mesh.logits(np.arange(5)), lm.logits(np.arange(5)))


def test_the_thresholds_of_jumprelu_neurons_are_placed_with_their_biases(config) -> None:
    sparse = dataclasses.replace(config, mlp_activation="jumprelu")
    specs = partition_specs(param_shapes(sparse), LM_RULES)
    assert specs["blocks_0"]["mlp"]["threshold"] == specs["blocks_0"]["mlp"]["b_in"] == P("model")


def test_a_leaf_without_a_rule_and_a_rule_without_a_leaf_are_errors() -> None:
    with pytest.raises(ValueError, match=r"no sharding rule matches 'W_new'"):
        partition_specs({"W_new": jnp.zeros(2)}, LM_RULES)
    with pytest.raises(ValueError, match="match nothing: other"):
        partition_specs({"a": jnp.zeros(2)}, [("a", P()), ("other", P())])


@pytest.mark.parametrize("axes", ["data", "data=x", "rows=1", "data=1,data=1", "data=0", "data=1000"])
def test_an_impossible_mesh_is_an_error_that_quotes_it(axes: str) -> None:
    with pytest.raises(ValueError, match=axes):
        make_mesh(axes)


def test_a_checksum_notices_any_flipped_bit() -> None:
    rng = np.random.default_rng(0)
    array = rng.standard_normal((7, 5)).astype(np.float32)
    tree = {"a": jnp.asarray(array), "b": jnp.arange(3)}
    before = np.asarray(checksum(tree))
    for _ in range(50):
        flipped = array.copy().view(np.uint32)
        flipped.flat[rng.integers(flipped.size)] ^= np.uint32(1 << rng.integers(32))
        after = np.asarray(checksum({**tree, "a": jnp.asarray(flipped.view(np.float32))}))
        assert after[0] != before[0]
        assert after[1] == before[1]


CURVES = """
import json
import jax, numpy as np
from tinymodel_jax.config import ModelConfig
from tinymodel_jax.training.sharding import checksum
from tinymodel_jax.training.lm_step import LMOptimizer
from tinymodel_jax.training.sharding import make_mesh
from train.lm import compiled

assert len(jax.devices()) == 8
config = ModelConfig(n_layers=2, d_model=64, n_heads=8, d_mlp=128, n_ctx=16, d_vocab=64)
adamw, muon = (LMOptimizer(method, learning_rate=1e-2, warmup_steps=5) for method in ("adamw", "muon"))
batches = np.random.default_rng(0).integers(0, 60, (20, 16, 16)).astype(np.int32)

def curve(axes, fsdp, devices=None, optimizer=adamw, shard_optimizer=False, micro_batches=1):
    mesh = make_mesh(axes, devices)
    program = compiled(config, optimizer, 20, micro_batches, mesh, fsdp, shard_optimizer=shard_optimizer)
    state = program.init(jax.random.key(0))
    start = np.asarray(checksum(state)).tolist()
    losses = []
    for batch in batches:
        state, metrics = program.step(state, jax.device_put(batch, program.rows))
        losses.append(float(metrics["loss"]))
    leaves = [tree["blocks_0"]["mlp"]["W_in"] for tree in (state.params, *moments(state.optimizer))]
    return {"losses": losses, "start": start, "shards": [leaf.addressable_shards[0].data.shape for leaf in leaves]}

def moments(optimizer):
    return [part.mu for part in optimizer if hasattr(part, "mu")]

result = {"one": curve("data=1", False, jax.devices()[:1])}
for axes in ("data=8", "data=4,model=2", "model=8"):
    for fsdp in (False, True):
        result[axes + " fsdp" * fsdp] = curve(axes, fsdp)
result["data=8 optimizer"] = curve("data=8", False, shard_optimizer=True)
result["data=4,model=2 optimizer"] = curve("data=4,model=2", False, shard_optimizer=True, micro_batches=2)
result["muon"] = [curve("data=1", False, jax.devices()[:1], muon), curve("data=4,model=2", True, None, muon)]
print(json.dumps(result))
"""

COLLECTIVES = """
import json
import jax, jax.numpy as jnp
from tinymodel_jax.config import ModelConfig
from tinymodel_jax.training.lm_step import LMOptimizer
from tinymodel_jax.training.sharding import make_mesh
from train.hlo import collectives
from train.lm import compiled

# Every activation of a device's rows, 256 tokens wide and more, is larger than any parameter.
config = ModelConfig(n_layers=1, d_model=64, n_heads=8, d_mlp=128, n_ctx=16, d_vocab=96)

def exchanged(axes, fsdp):
    mesh = make_mesh(axes)
    program = compiled(config, LMOptimizer(), 20, 1, mesh, fsdp)
    rows = jax.ShapeDtypeStruct((128, 16), jnp.int32, sharding=program.rows)
    text = program.step.lower(program.abstract, rows).compile().as_text()
    found = collectives(text, mesh.shape)
    return [(one.kind, one.axes, array.shape, array.bytes) for one in found for array in one.arrays]

print(json.dumps({axes + " fsdp" * fsdp: exchanged(axes, fsdp)
                  for axes in ("data=8", "data=4,model=2") for fsdp in (False, True)}))
"""


@pytest.mark.slow
def test_devices_exchange_parameters_and_gradients_over_data_and_never_activations() -> None:
    found = on_eight_devices(COLLECTIVES)
    largest_parameter = 4 * 64 * 128
    for name, exchanged in found.items():
        assert exchanged, name
        for kind, axes, shape, n_bytes in exchanged:
            where = f"{name}: {kind} of {shape} over {axes}"
            assert n_bytes <= largest_parameter or axes == ["model"], where
            assert kind == "all-reduce" or name.endswith("fsdp"), f"{where}: parameters are whole where they compute"
    gathered = {name for name, exchanged in found.items() if any(kind == "all-gather" for kind, *_ in exchanged)}
    assert gathered == {"data=8 fsdp", "data=4,model=2 fsdp"}


@pytest.mark.slow
def test_every_mesh_gives_the_loss_curve_of_one_device() -> None:
    curves = on_eight_devices(CURVES)
    one, (muon, sharded_muon) = curves.pop("one"), curves.pop("muon")
    assert len(curves) == 8
    for name, curve in curves.items():
        assert curve["start"] == one["start"], f"{name}: the initial state must not depend on the mesh"
        # float32 sums in another order: 1e-5 on losses near 4
        np.testing.assert_allclose(curve["losses"], one["losses"], atol=1e-5, rtol=0, err_msg=name)
    np.testing.assert_allclose(sharded_muon["losses"], muon["losses"], atol=1e-5, rtol=0)
    assert curves["data=8"]["shards"] == [[64, 128]] * 2
    assert curves["data=8 fsdp"]["shards"] == [[8, 128]] * 2
    assert curves["data=8 optimizer"]["shards"] == [[64, 128], [8, 128]]
    assert curves["data=4,model=2 fsdp"]["shards"] == [[16, 64]] * 2
    assert curves["data=4,model=2 optimizer"]["shards"] == [[64, 64], [16, 64]]
