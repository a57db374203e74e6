"""Compiled programs on disk: where they are, that they are used, and that nothing breaks without them."""

from collections.abc import Iterator
from pathlib import Path

import jax
import jax.monitoring
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from oracle import error_of

import tinymodel_jax
from tinymodel_jax.commands.frame import run_commands, with_compilation_cache
from tinymodel_jax.runtime.compilation_cache import VARIABLE, processor, use_compilation_cache

OPTIONS = (
    "jax_compilation_cache_dir",
    "jax_compilation_cache_max_size",
    "jax_persistent_cache_min_compile_time_secs",
)

_loaded: list[str] = []
jax.monitoring.register_event_listener(
    lambda event, **_: _loaded.append(event) if event == "/jax/compilation_cache/cache_hits" else None
)


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path) -> Iterator[None]:
    """The package's cache is in the test's folder, and JAX's settings are as before afterwards."""
    before = {name: getattr(jax.config, name) for name in OPTIONS}
    monkeypatch.setenv("TINYMODEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(VARIABLE)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def compile_anew() -> int:
    """Compile a program that this process has forgotten; return how many were loaded from disk."""
    jax.clear_caches()
    start = len(_loaded)
    jax.jit(lambda x: x * 3 + 1)(np.ones(5, np.float32))
    return len(_loaded) - start


def test_a_program_that_is_on_disk_is_not_compiled_again(tmp_path):
    assert compile_anew() == 0  # JAX has now decided that there is no cache
    folder = tinymodel_jax.use_compilation_cache()
    assert folder == tmp_path / "cache" / "programs" / processor()
    assert [compile_anew(), compile_anew()] == [0, 1]
    assert list((tmp_path / "cache" / "programs" / processor()).glob("*-cache"))
    assert use_compilation_cache() == folder


def test_a_command_uses_the_cache_and_the_variable_names_or_disables_it(monkeypatch, tmp_path):
    seen = []

    def command() -> None:
        """Do nothing."""
        seen.append(jax.config.jax_compilation_cache_dir)  # pyright: ignore[reportAttributeAccessIssue]

    for value in ("off", "0", str(tmp_path / "elsewhere")):
        monkeypatch.setenv(VARIABLE, value)
        assert run_commands("program", "", {"one": with_compilation_cache(command)}, ["one"]) == 0
    assert seen == [None, None, str(tmp_path / "elsewhere" / processor())]


def test_a_folder_that_the_user_gave_to_jax_stays_unless_another_is_named(tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
    assert use_compilation_cache() == tmp_path / "own"
    assert use_compilation_cache(tmp_path / "named") == tmp_path / "named" / processor()


def test_a_folder_that_cannot_be_written_is_an_error_only_if_it_was_named(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "file"))
    assert use_compilation_cache() is None
    with pytest.raises(OSError, match="file"):
        use_compilation_cache(tmp_path / "file")


def test_a_read_only_folder_is_left_alone(monkeypatch, tmp_path):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert use_compilation_cache() is None
    message = error_of(lambda: use_compilation_cache(tmp_path), PermissionError)
    assert f"cannot write compiled programs to {Path(tmp_path)}" in message
