"""`fast_jit`: compiled with the faster options where they apply, and the user's own flags always win."""

import jax
import jax.numpy as jnp
import pytest
from oracle import error_of

from tinymodel_jax.runtime import compilation
from tinymodel_jax.runtime.compilation import fast_compiler_options, fast_jit


@pytest.fixture(autouse=True)
def forget_options():
    """Forget the options, which are computed once per process, before and after each test."""
    fast_compiler_options.cache_clear()
    yield
    fast_compiler_options.cache_clear()


def scaled(x, *, factor):
    """Multiply."""
    return x * factor


def test_it_computes_what_the_function_computes_and_keeps_its_name():
    fast = fast_jit(scaled, static_argnames=("factor",))
    assert (fast.__name__, fast.__doc__) == ("scaled", "Multiply.")
    assert float(fast(jnp.float32(2), factor=3)) == 6


def test_a_shape_is_compiled_once(compilations):
    fast = fast_jit(scaled, static_argnames=("factor",))
    x, y = (jax.block_until_ready(jnp.ones(n)) for n in (4, 5))
    fast(x, factor=3)
    with compilations() as compiled:
        fast(x, factor=3)
        assert compiled.value == 0
        fast(y, factor=3)
        assert compiled.value == 1
        fast(x, factor=4)
        assert compiled.value == 2


def test_it_works_inside_jit_grad_and_vmap():
    fast = fast_jit(lambda x: x**3)
    assert float(jax.jit(fast)(jnp.float32(2))) == 8
    assert float(jax.grad(fast)(jnp.float32(2))) == 12
    assert jax.vmap(fast)(jnp.array([1.0, 2.0])).tolist() == [1, 8]
    assert float(jax.jit(jax.grad(lambda x: fast(fast(x))))(jnp.float32(1))) == 9


def test_its_own_program_is_compiled_with_the_options_and_another_program_is_not(monkeypatch):
    monkeypatch.setattr(compilation, "fast_compiler_options", lambda **_: {"xla_no_such_flag": "1"})
    fast = fast_jit(lambda x: x + 1)
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_flag"):
        fast(jnp.float32(1))
    assert float(jax.jit(fast)(jnp.float32(1))) == 2


def test_errors_of_the_function_come_through():
    def fails(x):
        raise ValueError(f"no rows in {x.shape}")

    assert error_of(lambda: fast_jit(fails)(jnp.ones((0, 2)))) == "no rows in (0, 2)"


def test_the_user_s_flag_wins(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", f"--{compilation._YNN_FLAG}=LIBRARY_FUSION_TYPE_DOT")
    assert fast_compiler_options() == {}


def test_other_xla_flags_are_left_alone_and_change_nothing(monkeypatch):
    options = fast_compiler_options()
    fast_compiler_options.cache_clear()
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=/nowhere")
    assert fast_compiler_options() == options


def test_accelerators_get_no_cpu_options(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert fast_compiler_options() == {}


def test_a_flag_that_this_jaxlib_does_not_know_is_not_used(monkeypatch):
    monkeypatch.setattr(compilation, "_YNN_FLAG", "xla_no_such_flag")
    assert fast_compiler_options() == {}
    assert float(fast_jit(lambda x: x + 1)(jnp.float32(1))) == 2


@pytest.mark.parametrize(("rows", "ynnpack"), [(1, "nothing"), (8, "all"), (128, "all"), (129, "nothing")])
def test_products_of_few_rows_and_only_those_are_left_to_ynnpack(rows, ynnpack):
    assert compilation.ynnpack_of_rows(rows) == ynnpack
    assert fast_compiler_options(ynnpack="all") == {}
