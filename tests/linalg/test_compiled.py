"""Functions that compile sooner on a CPU: the plain ones inside others, on other platforms and with newer versions."""

import jax
import numpy as np

from qjax.linalg import compiled
from qjax.linalg.compiled import lean_jit


def test_a_lean_function_inside_another_is_the_plain_one():
    """Compiler options are of whole programs: JAX refuses them within one."""
    function = lean_jit(static_argnames="k")(lambda x, k: x * k)
    x = np.arange(3, dtype=np.float32)
    np.testing.assert_array_equal(function(x, k=2), [0, 2, 4])
    np.testing.assert_array_equal(jax.jit(lambda x: function(x, k=2) + 1)(x), [1, 3, 5])
    np.testing.assert_array_equal(jax.grad(lambda x: function(x, k=3).sum())(x), [3, 3, 3])
    assert function.eval_shape(x, k=2).shape == (3,)
    assert "multiply" in function.lower(x, k=2).as_text()


def test_options_that_this_jax_does_not_have_are_not_given(monkeypatch):
    """JAX refuses an option that it does not know, so what is not known to have it runs the plain function."""
    monkeypatch.setattr(compiled, "_OPTIONS", {"xla_cpu_no_such_option": True})
    x = np.arange(3, dtype=np.float32)
    for known_before, platform in (((0, 0), "cpu"), ((99,), "cuda")):
        monkeypatch.setattr(compiled, "_KNOWN_BEFORE", known_before)
        monkeypatch.setattr(jax, "default_backend", lambda platform=platform: platform)
        np.testing.assert_array_equal(lean_jit()(lambda x: x + 1)(x), [1, 2, 3])
