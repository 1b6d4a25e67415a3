"""Random programs of products, attention, scans and experts: every linear is found, its Hessian is numpy's."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

import qjax
from qjax.matrix import Dense
from qjax.matrix.stacked import stack

WIDTH, BATCH, LENGTH = 8, 2, 3


class Recorder:
    """A program being made: its parameters, its steps for JAX, and the same in float64 with the inputs recorded."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        self.params, self.steps, self.hessians = {}, [], {}

    def kernel(self, *shape, dtype=jnp.float32):
        value = self.rng.standard_normal(shape).astype(np.float32) / np.sqrt(WIDTH)
        self.params[name] = jnp.asarray(value, dtype) if (name := f"p{len(self.params)}") else None
        return name, np.asarray(self.params[name], np.float64)

    def record(self, name, *rows):
        flat = [x.reshape(-1, x.shape[-1]) for x in rows]
        joined = np.concatenate(flat)
        self.hessians[name] = joined.T @ joined / len(joined)


def plain(program, x):
    name, w = program.kernel(WIDTH, WIDTH)
    program.record(name, x)
    return (lambda p, x: jnp.tanh(x @ p[name])), np.tanh(x @ w)


def transposed_and_cast(program, x):
    name, w = program.kernel(WIDTH, WIDTH, dtype=jnp.bfloat16)
    program.record(name, x)
    return (lambda p, x: jnp.sin(x @ p[name].astype(x.dtype).T)), np.sin(x @ w.T)


def several_axes(program, x):
    first, a = program.kernel(WIDTH, 2, 3)
    second, b = program.kernel(2, 3, WIDTH)
    program.record(first, x)
    h = np.tanh(np.einsum("btd,dhk->bthk", x, a))
    program.record(second, h.reshape(BATCH, LENGTH, 6))

    def run(p, x):
        h = jax.jit(lambda x, w: jnp.tanh(jnp.einsum("btd,dhk->bthk", x, w)))(x, p[first])
        return jnp.einsum("bthk,hkd->btd", h, p[second])

    return run, np.einsum("bthk,hkd->btd", h, b)


def reshaped(program, x):
    name, w = program.kernel(2, WIDTH * WIDTH // 2)
    program.record(name, x)
    return (lambda p, x: jnp.tanh(x @ p[name].reshape(WIDTH, WIDTH))), np.tanh(x @ w.reshape(WIDTH, WIDTH))


def slices(program, x):
    name, w = program.kernel(WIDTH, 3 * WIDTH)
    parts = [slice(0, WIDTH), slice(WIDTH, 3 * WIDTH)]
    program.record(f"{name}[:,0:{WIDTH}]", x)
    h = np.tanh(x @ w[:, parts[0]])
    program.record(f"{name}[:,{WIDTH}:{3 * WIDTH}]", h)

    def run(p, x):
        h = jax.checkpoint(lambda x: jnp.tanh(x @ p[name][:, parts[0]]))(x)
        return jnp.tanh((h @ p[name][:, parts[1]])[..., :WIDTH])

    return run, np.tanh((h @ w[:, parts[1]])[..., :WIDTH])


def scanned(program, x):
    name, w = program.kernel(3, WIDTH, WIDTH)
    hessians = []
    for layer in w:
        program.record(name, x)
        hessians.append(program.hessians[name])
        x = x + np.tanh(x @ layer)
    program.hessians[name] = np.stack(hessians)
    return (lambda p, x: jax.lax.scan(lambda x, w: (x + jnp.tanh(x @ w), None), x, p[name])[0]), x


def tied_steps(program, x):
    """One kernel in every step of a scan: a Hessian over all of them."""
    name, w = program.kernel(WIDTH, WIDTH)
    seen = []
    for _ in range(3):
        seen.append(x)
        x = np.tanh(x @ w)
    program.record(name, *seen)
    return (lambda p, x: jax.lax.scan(lambda x, _: (jnp.tanh(x @ p[name]), None), x, None, length=3)[0]), x


def experts(program, x):
    name, w = program.kernel(4, WIDTH, WIDTH)
    each = np.stack([np.sin(x * (i + 1)) for i in range(4)])
    program.record(name, x)
    program.hessians[name] = np.einsum("ebti,ebtj->eij", each, each) / (BATCH * LENGTH)

    def run(p, x):
        each = jnp.stack([jnp.sin(x * (i + 1.0)) for i in range(4)])
        return jnp.mean(jax.vmap(lambda w, x: x @ w)(p[name], each), axis=0)

    return run, np.mean(np.einsum("ebti,eio->ebto", each, w), axis=0)


def attention(program, x):
    name, w = program.kernel(3, WIDTH, WIDTH)
    for i in range(3):
        program.record(f"{name}[{i}]", x)
    q, k, v = (x @ part for part in w)
    scores = q @ k.transpose(0, 2, 1)
    weights = np.exp(scores - scores.max(-1, keepdims=True))

    def run(p, x):
        q, k, v = (x @ p[name][i] for i in range(3))
        return jax.nn.softmax(q @ k.transpose(0, 2, 1), axis=-1) @ v

    return run, weights / weights.sum(-1, keepdims=True) @ v


def branches(program, x):
    taken, a = program.kernel(WIDTH, WIDTH)
    other, _ = program.kernel(WIDTH, WIDTH)
    program.record(taken, x)
    program.hessians[other] = np.zeros((WIDTH, WIDTH))
    run = lambda p, x: jax.lax.cond(  # noqa: E731
        jnp.sum(x * x) > 0, lambda: jnp.tanh(x @ p[taken]), lambda: jnp.tanh(x @ p[other])
    )
    return run, np.tanh(x @ a)


STEPS = [plain, transposed_and_cast, several_axes, reshaped, slices, scanned, tied_steps, experts, attention, branches]


@settings(max_examples=8)
@given(steps=st.lists(st.sampled_from(STEPS), min_size=2, max_size=4), seed=st.integers(0, 1000))
def test_random_programs(steps, seed):
    program = Recorder(seed)
    x = x0 = program.rng.standard_normal((BATCH, LENGTH, WIDTH))
    functions = []
    for step in steps:
        function, x = step(program, x)
        functions.append(function)

    def function(params, x):
        for own in functions:
            x = own(params, x)
        return x

    inputs = jnp.asarray(x0, jnp.float32)
    traced = qjax.trace(function, program.params, inputs)
    assert set(traced.linears) == set(program.hessians) and not traced.left
    found = traced.hessians([inputs, (inputs,)])
    for name, exact in program.hessians.items():
        np.testing.assert_allclose(found[name].input, exact, rtol=1e-4, atol=1e-5)
    # The same matrices as operators, and as arrays of those.
    operators = {}
    for name, site in traced.linears.items():
        matrices = site.matrix(traced.params[name.split("[")[0]]).astype(jnp.float32)
        own = [Dense(m) for m in matrices.reshape(-1, *site.shape)]
        operators[name] = stack(own, site.stack) if site.stack else own[0]
    replaced = traced.with_operators(operators)
    dense = traced.dense(replaced)
    jax.tree.map(np.testing.assert_array_equal, dense, program.params)
    y = traced(replaced, inputs)
    np.testing.assert_allclose(y, traced(dense, inputs), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(y, x, rtol=1e-3, atol=1e-4)


def test_all_steps_in_one_program():
    """None of the kinds is left to chance."""
    test_random_programs.hypothesis.inner_test(STEPS, 7)
