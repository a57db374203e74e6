"""The real TransformerLens computes what this package computes, and what it saves is read here.

Runs with TransformerLens 3 (`HookedTransformer`) and 4 (`TransformerBridge`); skipped where it is not installed.
"""

import importlib
import json
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import param_shapes, random_params

from convert_torch_weights import main as convert
from tinymodel_jax import ModelConfig, TinyModel, hook_names
from tinymodel_jax.params import flatten

torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")
transformer_lens = pytest.importorskip("transformer_lens")
IS_VERSION_3 = version("transformer_lens").startswith("3.")
pytestmark = pytest.mark.filterwarnings("ignore:HookedTransformer is deprecated:DeprecationWarning")

WIDE = ModelConfig(n_layers=2, d_model=16, n_heads=2, d_mlp=40, n_ctx=16, d_vocab=23)
"""An MLP that is not four times as wide as the residual stream."""
FLAT = ModelConfig(n_layers=1, d_model=4, n_heads=4, d_mlp=16, n_ctx=9, d_vocab=11)
"""Heads of width 1."""


def their_model(config: dict[str, Any], state: dict[str, Any]) -> Any:
    """Load a model as docs/coming-from/transformer-lens.md shows it, in either version."""
    if IS_VERSION_3:
        model = transformer_lens.HookedTransformer(config)
        missing, unexpected = model.load_state_dict(state, strict=False)
        assert not unexpected
        assert all(name.endswith((".mask", ".IGNORE")) for name in missing)
        return model
    conversion = importlib.import_module("transformer_lens.utilities.tl_checkpoint_conversion")
    model = transformer_lens.TransformerBridge.boot_native(config)
    model.load_state_dict(conversion.convert_tl_checkpoint(state, model.cfg), strict=True)
    return model


def their_state(model: Any) -> dict[str, Any]:
    state = model.state_dict() if IS_VERSION_3 else model.tl_parameters()
    return {name: tensor.detach() for name, tensor in state.items()}


def loaded(lm: TinyModel) -> Any:
    config, state = lm.to_hooked_transformer_state_dict()
    return their_model(config, {name: torch.tensor(array) for name, array in state.items()})


def assert_close(ours: Any, theirs: Any, name: str = "") -> None:
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4, err_msg=name)


@pytest.fixture(params=["wide", "flat", "mini"])
def pair(request: pytest.FixtureRequest) -> tuple[TinyModel, Any, np.ndarray]:
    """A model, the same model in TransformerLens, and three rows of ids that fill the context."""
    if request.param == "mini":
        lm = TinyModel("mini")
    else:
        config = {"wide": WIDE, "flat": FLAT}[request.param]
        lm = TinyModel.from_params(config, random_params(param_shapes(config), 0))
    rows = np.random.default_rng(0).integers(0, lm.config.begin_id, (3, min(lm.config.n_ctx, 48)))
    return lm, loaded(lm), rows.astype(np.int32)


def test_logits_and_loss_are_equal(pair: tuple[TinyModel, Any, np.ndarray]) -> None:
    lm, theirs, rows = pair
    with torch.no_grad():
        logits = theirs(torch.tensor(rows).long(), return_type="logits")
        loss = theirs(torch.tensor(rows).long(), return_type="loss", loss_per_token=True)
    assert_close(lm.logits(rows), logits.numpy())
    assert_close(lm.loss(rows, per_token=True), loss.numpy())


def test_the_values_at_every_hook_point_are_equal(pair: tuple[TinyModel, Any, np.ndarray]) -> None:
    """Version 4 has two differences: `hook_attn_in` is `attn.hook_in`, and `hook_attn_scores` has the pattern."""
    lm, theirs, rows = pair
    if IS_VERSION_3:
        theirs.set_use_attn_in(True)
    with torch.no_grad():
        _, cache = theirs.run_with_cache(torch.tensor(rows).long())
    _, acts = lm.run_with_cache(rows)
    assert tuple(acts) == hook_names(lm.config)
    visible = np.tril(np.ones((rows.shape[1], rows.shape[1]), bool))
    for name, value in acts.items():
        ours, found = np.asarray(value), cache[name if IS_VERSION_3 else name.replace("hook_attn_in", "attn.hook_in")]
        found = found.numpy()
        if name.endswith("hook_attn_in") and IS_VERSION_3:  # a copy for each head
            ours = np.broadcast_to(ours[:, :, None], found.shape)
        if name.endswith("hook_attn_scores"):
            if not IS_VERSION_3:
                continue
            assert np.all(found[..., ~visible] == -np.inf)
            assert np.all(ours[..., ~visible] == -1e9)
            ours, found = ours[..., visible], found[..., visible]
        assert_close(ours, found, name)


def test_weights_have_equal_names_and_values(pair: tuple[TinyModel, Any, np.ndarray]) -> None:
    lm, theirs, _ = pair
    for name in ("W_E", "W_pos", "W_Q", "W_K", "W_V", "W_O", "b_O", "W_in", "b_in", "W_out", "b_out", "W_U", "b_U"):
        np.testing.assert_array_equal(getattr(lm, name), getattr(theirs, name).detach().numpy(), name)


def test_an_edit_at_a_hook_point_has_the_same_effect(pair: tuple[TinyModel, Any, np.ndarray]) -> None:
    lm, theirs, rows = pair
    last = lm.config.n_layers - 1
    for name in (f"blocks.{last}.hook_resid_pre", f"blocks.{last}.hook_attn_out", f"blocks.{last}.mlp.hook_post"):
        with torch.no_grad():
            their = theirs.run_with_hooks(
                torch.tensor(rows).long(), fwd_hooks=[(name, lambda value, hook: value * 0.5)]
            )
        our, _ = lm.run_with_hooks(rows, {name: lambda value, acts: value * 0.5})
        assert_close(our, torch.log_softmax(their, -1).numpy(), name)


def test_a_model_that_is_saved_there_is_the_same_here(tmp_path: Path) -> None:
    """From memory, and from the files of docs/coming-from/transformer-lens.md: through the converter, and directly."""
    lm = TinyModel.from_params(WIDE, random_params(param_shapes(WIDE), 0))
    theirs = loaded(lm)
    for parameter in theirs.parameters():
        parameter.data *= 1.5
    biases = ("b_Q", "b_K", "b_V") if IS_VERSION_3 else ("q.bias", "k.bias", "v.bias")
    assert not any(value.any() for name, value in theirs.state_dict().items() if name.endswith(biases))
    rows = np.random.default_rng(1).integers(0, 19, (2, 16)).astype(np.int32)
    with torch.no_grad():
        expected = theirs(torch.tensor(rows).long(), return_type="logits").numpy()
    fields, state = theirs.cfg.to_dict(), their_state(theirs)
    back = TinyModel.from_transformer_lens(fields, state)
    assert back.config == WIDE
    assert_close(back.logits(rows), expected)

    torch.save(state, tmp_path / "theirs.pt")
    safetensors_torch.save_file(
        {name: value.contiguous() for name, value in state.items()}, tmp_path / "st.safetensors"
    )
    for path in (tmp_path / "theirs.pt", tmp_path / "st.safetensors"):
        path.with_suffix(".json").write_text(json.dumps(fields, default=str))
        assert convert(["lm", str(path), str(tmp_path / "ours")]) == 0
        np.testing.assert_array_equal(TinyModel(tmp_path / "ours").logits(rows), back.logits(rows))
        np.testing.assert_array_equal(TinyModel(path).logits(rows), back.logits(rows))


@pytest.mark.parametrize("file", ["lm.safetensors", "lm.pt"])
def test_the_exported_files_load_there(tmp_path: Path, file: str) -> None:
    lm = TinyModel("mini")
    lm.save_pretrained(tmp_path / "ours")
    assert convert(["export-lm", str(tmp_path / "ours"), str(tmp_path / file), "--format", "transformer-lens"]) == 0
    config, path = json.loads((tmp_path / "lm.json").read_text()), tmp_path / file
    state = torch.load(path, weights_only=True) if path.suffix == ".pt" else safetensors_torch.load_file(path)
    rows = np.array(lm.to_tokens("Once upon a time, there was a little"))
    with torch.no_grad():
        logits = their_model(config, state)(torch.tensor(rows).long(), return_type="logits")
    assert_close(lm.logits(rows), logits.numpy())


def test_the_code_of_the_page_loads_and_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "coming-from" / "transformer-lens.md").read_text(encoding="utf-8")
    version_3, version_4, saves = [code for code in re.findall(r"```py\n(.*?)```", page, re.S) if "model" in code][:3]
    monkeypatch.chdir(tmp_path)
    TinyModel("mini").save_pretrained("ours")
    assert convert(["export-lm", "ours", "runs/lens.safetensors", "--format", "transformer-lens"]) == 0
    if not IS_VERSION_3:
        saves = saves.replace("model.state_dict()", "model.tl_parameters()")
    exec((version_3 if IS_VERSION_3 else version_4) + saves, {})
    for name, array in flatten(TinyModel("runs/theirs.pt").params).items():
        np.testing.assert_array_equal(array, flatten(TinyModel("mini").params)[name])
