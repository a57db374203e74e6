"""Shared by all tests: JAX's settings, hypothesis's settings, a tiny model, and the reference's golden vectors.

Matrix products run at the highest precision and mixed number formats are an error, so that a test on an accelerator
measures the package rather than the hardware's defaults.

Most of the suite's time is compilation, so XLA optimizes nothing here and, in JAX 0.10, generates code in its older,
faster way: a program compiles in an eighth of the time. `XLA_FLAGS= python -m pytest` compiles as users do.
"""

import ctypes
import gc
import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hypothesis
import jax
import jax.monitoring
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hub_server import HubServer, running_server

from tinymodel_jax.bundled import storyworld
from tinymodel_jax.config import DictionaryConfig, ModelConfig
from tinymodel_jax.dictionaries.dictionary import Dictionary
from tinymodel_jax.dictionaries.encoding import param_shapes as dictionary_shapes
from tinymodel_jax.dictionaries.sites import Site
from tinymodel_jax.io import default_tokenizer
from tinymodel_jax.io.convert import convert_dictionary
from tinymodel_jax.lm import TinyModel
from tinymodel_jax.model.transformer import Transformer

FAST_COMPILATION = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if jax.__version_info__ < (0, 11):  # later versions fail on this option
    FAST_COMPILATION += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", FAST_COMPILATION)  # read at the first computation
os.environ["TINYMODEL_COMPILATION_CACHE"] = "off"  # tests count compilations, and must not fill the user's cache
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_numpy_dtype_promotion", "strict")
hypothesis.settings.register_profile("repository", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("repository")

DATA = Path(__file__).parent / "data"
OUR_KIND = {"A": "A", "T": "M", "M": "Mo", "Ra": "Ra", "Rm": "Rm"}
"""What the reference version that made the golden vectors calls a kind, and what it is called here."""
N_HEADS = 4
"""Attention heads of the golden model."""

_compiled: list[str] = []


def _note(event: str, duration_secs: float, **kwargs: str | int) -> None:
    del duration_secs, kwargs
    if event == "/jax/core/compile/backend_compile_duration":
        _compiled.append(event)


jax.monitoring.register_event_duration_secs_listener(_note)


class Count:
    """Number of programs compiled so far in a `with` block."""

    def __init__(self) -> None:
        self.start = len(_compiled)

    @property
    def value(self) -> int:
        return len(_compiled) - self.start


@pytest.fixture
def compilations():
    """A context manager that counts all programs that XLA compiles inside it."""

    @contextmanager
    def counting() -> Iterator[Count]:
        yield Count()

    return counting


@contextmanager
def as_users_run_it() -> Iterator[None]:
    """Turn off the type checks at run time, which only tests have and which would hide the package's own errors."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def no_type_checks() -> Iterator[None]:
    """`as_users_run_it` for a whole test."""
    with as_users_run_it():
        yield


def param_shapes(config: ModelConfig) -> dict[str, Any]:
    """Return the parameter tree as `jax.ShapeDtypeStruct`s, without computing anything."""
    tok_ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(Transformer(config).init, jax.random.key(0), tok_ids)["params"]


def random_params(shapes: Any, seed: int, scale: float = 0.25) -> Any:
    """Return a tree of normal draws: 1 / sqrt(d_model) large, so that values stay of size 1 through the layers."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf if isinstance(leaf, tuple) else leaf.shape) * scale, jnp.float32),
        shapes,
        is_leaf=lambda leaf: isinstance(leaf, tuple),
    )


def make_dictionary(hook_in: str, hook_out: str, seed: int = 0, **options: Any) -> Dictionary:
    """Return a random dictionary of 12 features for the tiny model."""
    config = DictionaryConfig(hook_in, hook_out, **{"d_in": 16, "d_out": 16, "n_features": 12, **options})
    return Dictionary.from_params(config, random_params(dictionary_shapes(config), seed))


@pytest.fixture(scope="session")
def config() -> ModelConfig:
    """A model small enough to compute by hand: 2 layers, d_model 16, context 16, 23 ids."""
    return ModelConfig(n_layers=2, d_model=16, n_heads=2, d_mlp=32, n_ctx=16, d_vocab=23)


@pytest.fixture(scope="session")
def params(config: ModelConfig) -> Any:
    """Parameters of the tiny model."""
    return random_params(param_shapes(config), 0)


@pytest.fixture(scope="session")
def shared_lm(config: ModelConfig, params: Any) -> TinyModel:
    """The model that `lm` copies."""
    model = TinyModel.from_params(config, params)
    for seed, tag in enumerate(("M0", "Ra1", "A1", "Rm1", "M1", "Mo1")):
        site = Site.parse(tag)[0]
        model.attach(tag, make_dictionary(site.hook_in, site.hook_out, seed))
    return model


@pytest.fixture
def lm(shared_lm: TinyModel) -> TinyModel:
    """The tiny model, with a dictionary at M0 and at every site of layer 1."""
    return shared_lm.splice([])


def save_story_model(folder: Path, n_layers: int, tags: tuple[str, ...], n_features: int) -> Path:
    """Save a random model with the story world's tokenizer, context 64, and random dictionaries at some sites."""
    tokenizer = storyworld.tokenizer()
    config = ModelConfig(n_layers, d_model=16, n_heads=2, d_mlp=32, n_ctx=64, d_vocab=tokenizer.vocab_size)
    model = TinyModel.from_params(config, random_params(param_shapes(config), 0), tokenizer)
    for seed, tag in enumerate(tags):
        site = Site.whole(tag)
        model.attach(tag, make_dictionary(site.hook_in, site.hook_out, seed, n_features=n_features))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def story_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small model for tests of commands, with M0 and a dictionary of each kind in layer 1."""
    folder = tmp_path_factory.mktemp("story_model") / "lm"
    return save_story_model(folder, 2, ("M0", "Ra1", "A1", "Rm1", "M1", "Mo1"), 24)


@pytest.fixture(scope="session")
def tok_ids() -> np.ndarray:
    """Three rows of eleven ids, a length that the tiny model pads."""
    return np.random.default_rng(1).integers(0, 19, (3, 11)).astype(np.int32)


@pytest.fixture(scope="session")
def golden_dictionaries() -> dict[str, Dictionary]:
    """The reference's twenty random dictionaries, by our tags."""
    tensors = np.load(DATA / "sparse_all_tags.npz")
    found = {}
    for theirs in sorted({name.split("/")[0] for name in tensors.files}):
        site = Site.parse(f"{OUR_KIND[theirs[:-1]]}{theirs[-1]}")[0]
        state = {name.split("/")[1]: tensors[name] for name in tensors.files if name.startswith(f"{theirs}/")}
        converted = convert_dictionary(state, site)
        found[site.tag] = Dictionary.from_params(converted.config, converted.params)
    return found


@pytest.fixture(scope="session")
def shared_golden_lm(golden_dictionaries: dict[str, Dictionary]) -> TinyModel:
    """The model that `golden_lm` copies."""
    model = TinyModel(DATA / "lm_f32_zip.pt", n_heads=N_HEADS)
    for tag, dictionary in golden_dictionaries.items():
        model.attach(tag, dictionary)
    return model


@pytest.fixture
def golden_lm(shared_golden_lm: TinyModel) -> TinyModel:
    """The reference's random model (4 layers, d_model 64, context 32, 211 ids) with its twenty dictionaries."""
    return shared_golden_lm.splice([])


@pytest.fixture(scope="session")
def golden():
    """Load a file of golden vectors by its name."""

    def load(name: str) -> Any:
        path = DATA / name
        return json.loads(path.read_text("utf-8")) if path.suffix == ".json" else np.load(path)

    return load


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """Return what a command wrote to stderr, having checked that it is one line without a traceback."""
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "Traceback" not in error
    return error


@pytest.fixture
def standard_promotion() -> Iterator[None]:
    """For training: optax's schedules mix int32 steps and float32, which the suite's strict promotion forbids."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(autouse=True, scope="module")
def _memory_is_returned_after_each_file() -> Iterator[None]:
    """A process that runs many files would otherwise keep the programs of all of them, several gigabytes."""
    yield
    return_memory()


def return_memory() -> None:
    """Forget all compiled programs. Training programs tell glibc to keep freed memory, so it is asked to return it."""
    jax.clear_caches()
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


@pytest.fixture
def hub_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """An empty hub that the environment names, empty caches, no token, and no way to any other machine."""
    from huggingface_hub import close_session, constants  # slow to import

    elsewhere = []
    connect = socket.socket.connect

    def connect_to_loopback(self: socket.socket, address: Any) -> None:
        if address[0] not in ("127.0.0.1", "::1"):
            elsewhere.append(address)
            raise OSError(f"{address} is not loopback")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect_to_loopback)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", default_tokenizer.ENVIRONMENT_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("TINYMODEL_CACHE", str(tmp_path / "cache"))
    # huggingface_hub reads its environment only when it is imported.
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "huggingface"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    close_session()
    with running_server() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        yield running
    close_session()
    assert not elsewhere
