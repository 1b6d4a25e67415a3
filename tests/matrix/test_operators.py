"""What can stand in a linear's place: the same laws for every kind, and the refusal of what cannot be built."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

import qjax
from qjax import codebooks, incoherence, rounding
from qjax.codebooks.scaling import ScaleRule
from qjax.errors import ArtifactError
from qjax.interchange.serialize import from_arrays, to_arrays
from qjax.matrix import OPERATORS, Dense, LinearOperator, LowRank, Sum
from qjax.matrix.kernel_layout import PackedLinear, pack, pack_model
from qjax.matrix.operator import is_operator, operators

OUT, INNER, RANK = 24, 40, 3


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def quantized(book="half_integer", rotation="hadamard", scale=None, seed=0, **options):
    return qjax.quantize_matrix(
        random(OUT, INNER, seed=seed),
        qjax.Hessian(np.eye(INNER, dtype=np.float32)),
        codebook=codebooks.make(book, 2),
        rounding=rounding.make("nearest"),
        incoherence=incoherence.make(rotation, **options),
        scale=scale,
        key=jax.random.key(0),
    )[0]


def low_rank():
    return LowRank(jnp.asarray(random(OUT, RANK, seed=1)), jnp.asarray(random(RANK, INNER, seed=2)), 0.5)


KINDS = {
    "quantized": quantized,
    "one side": lambda: quantized(rotation="hadamard", side="output"),
    "blocks, groups": lambda: quantized(rotation="block_hadamard", block=8, scale=ScaleRule("rms", "group", 16)),
    "kronecker, rescaled": lambda: quantized(rotation="kronecker", rescale=True, mode="single"),
    "bare": lambda: quantized("e8p", "none"),
    "dense": lambda: Dense(jnp.asarray(random(OUT, INNER), jnp.bfloat16)),
    "low rank": low_rank,
    "sum": lambda: Sum((quantized(), low_rank())),
    "sum of sums": lambda: Sum((Sum((quantized(seed=3), low_rank())), Dense(jnp.asarray(random(OUT, INNER))))),
}


@pytest.fixture(scope="module")
def made():
    return {name: make() for name, make in KINDS.items()}


@pytest.mark.parametrize("name", KINDS)
def test_products_are_those_of_the_dense_matrix(made, name):
    operator = made[name]
    assert isinstance(operator, LinearOperator) and is_operator(operator) and tuple(operator.shape) == (OUT, INNER)
    dense = operator.dequantize()
    assert dense.dtype == jnp.float32
    x = random(2, 5, INNER, seed=7)
    expected = x.astype(np.float64) @ np.asarray(dense, np.float64).T
    found = operator.matmul(jnp.asarray(x))
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())
    assert operator.matmul(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize("name", KINDS)
def test_spec_and_arrays_are_all_of_it(made, name):
    operator = made[name]
    arrays, description = to_arrays(operator)
    assert 8 * sum(array.nbytes for array in arrays.values()) == operator.stored_bits
    assert operator.bits_per_weight == pytest.approx(operator.stored_bits / (OUT * INNER))
    again = from_arrays(arrays, json.loads(json.dumps(description)), "here")
    assert jax.tree.structure(again) == jax.tree.structure(operator) and again.spec() == operator.spec()
    for one, other in zip(jax.tree.leaves(again), jax.tree.leaves(operator), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def test_the_low_rank_product_and_sums_against_numpy():
    thin = low_rank()
    b, a = np.asarray(thin.b, np.float64), np.asarray(thin.a, np.float64)
    np.testing.assert_allclose(thin.dequantize(), 0.5 * b @ a, atol=1e-5)
    base = quantized()
    whole = Sum((base, thin))
    np.testing.assert_allclose(whole.dequantize(), np.asarray(base.dequantize()) + 0.5 * b @ a, atol=1e-5)
    assert whole.stored_bits == base.stored_bits + 32 * RANK * (OUT + INNER)
    assert whole.bits_per_weight == base.bits_per_weight + thin.bits_per_weight


def test_a_sum_is_packed_term_by_term():
    whole = Sum((quantized(), low_rank()))
    packed = pack(whole)
    assert isinstance(packed.terms[0], PackedLinear) and packed.terms[1] is whole.terms[1]
    x = jnp.asarray(random(3, INNER, seed=7))
    np.testing.assert_allclose(packed.matmul(x), whole.matmul(x), atol=1e-4)
    params = {"a": {"weight": whole}, "b": np.zeros(3)}
    assert list(operators(params)) == ["a.weight"]
    assert isinstance(pack_model(params)["a"]["weight"].terms[0], PackedLinear)


@struct.dataclass
class Diagonal:
    """A user's own operator, `diag(d)`."""

    d: Any

    shape = property(lambda self: (self.d.shape[0], self.d.shape[0]))
    stored_bits = property(lambda self: 8 * self.d.size * self.d.dtype.itemsize)
    bits_per_weight = property(lambda self: self.stored_bits / self.d.size**2)

    def matmul(self, x):
        return x * self.d.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))

    def dequantize(self):
        return jnp.diag(self.d.astype(jnp.float32))

    def spec(self):
        return {"kind": "diagonal", "format": 1}


def test_an_operator_needs_one_register_line_and_without_it_is_named_with_its_writer(monkeypatch):
    monkeypatch.setattr(qjax, "__version__", "7.8.9")
    arrays, description = to_arrays(Sum((Diagonal(jnp.arange(4, dtype=jnp.float32)),)))
    monkeypatch.undo()
    message = r"layer x: was written by qjax 7\.8\.9, and .*unknown operator 'diagonal'; there is: dense, lookup"
    with pytest.raises(ArtifactError, match=message):
        from_arrays(arrays, description, "layer x")
    monkeypatch.setattr(OPERATORS, "_table", {**OPERATORS._table})
    OPERATORS.register("diagonal")(lambda spec, arrays: Diagonal(arrays["d"]))
    again = from_arrays(arrays, description, "layer x")
    np.testing.assert_array_equal(again.dequantize(), np.diag(np.arange(4.0)))


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("quantized", {"format": 2}, "operator 'quantized' has format version 2; 1 can be read"),
        ("quantized", {"shape": [OUT, 2**62]}, "padded from"),
        ("quantized", {"padded": [2**40, 2**40]}, r"packed is uint32\[60\]; it is unsignedinteger\["),
        ("quantized", {"padded": [OUT, INNER + 0.5]}, "two positive whole numbers"),
        ("quantized", {"rescale": True}, "rescale is True"),
        ("quantized", {"scale_group": 16}, None),
        ("quantized", {"input_rotation": None}, "missing or surplus"),
        ("quantized", {"input_rotation": {"name": "twist", "size": INNER}}, "unknown rotation 'twist'"),
        ("quantized", {"output_rotation": {"name": "signed_hadamard", "size": 8, "block": 8}}, "the signs of|8 values"),
        ("quantized", {"output_rotation": {"name": "signed_hadamard", "size": OUT, "block": 7}}, "whole blocks"),
        ("low rank", {"rank": RANK + 1}, r"b is float32\[24, 3\]; it is floating\[24, 4\]"),
        ("low rank", {"scale": "much"}, "a finite number"),
        ("sum", {"terms": []}, "a sum of shape"),
        ("sum", {"shape": [1, 1]}, "a sum of shape"),
        ("dense", {"shape": [INNER, OUT]}, "weight is bfloat16"),
    ],
)
def test_descriptions_that_do_not_fit_are_refused(made, kind, change, message):
    arrays, description = to_arrays(made[kind])
    changed = {**description, "operator": {**description["operator"], **change}}
    if message is None:  # one scale for the matrix, whatever the groups
        assert from_arrays(arrays, changed, "layer x").scaling.group == 16
        return
    with pytest.raises(ArtifactError, match=f"layer x: .*({message})"):
        from_arrays(arrays, changed, "layer x")


def test_surplus_and_missing_arrays_are_refused(made):
    arrays, description = to_arrays(made["sum"])
    surplus = {**arrays, "terms.1.c": np.zeros(3, np.float32)}
    listed = {**description, "leaves": {name: [str(a.dtype), list(a.shape)] for name, a in surplus.items()}}
    with pytest.raises(ArtifactError, match=r"terms\.1\.c.* are missing or surplus"):
        from_arrays(surplus, listed, "here")
    del arrays["terms.1.a"]
    listed = {**description, "leaves": {name: entry for name, entry in description["leaves"].items() if name in arrays}}
    with pytest.raises(ArtifactError, match="without both its factors"):
        from_arrays(arrays, listed, "here")


def test_changing_fields_changes_the_spec(made):
    """Nothing static is left out: matrices whose static parts differ have different specs."""
    matrix = made["quantized"]
    assert dataclasses.replace(made["low rank"], scale=2.0).spec() != made["low rank"].spec()
    names = [("none", {}), ("hadamard", {"rescale": True}), ("hadamard", {"side": "input"}), ("kronecker", {})]
    names += [("block_hadamard", {"block": 8}), ("kronecker", {"mode": "single"}), ("block_hadamard", {"block": 4})]
    transforms = [incoherence.make(name, **options).abstract(OUT, INNER) for name, options in names]
    others = [dataclasses.replace(matrix, transform=transform) for transform in transforms]
    others += [dataclasses.replace(matrix, codebook=codebooks.make("half_integer", 3))]
    specs = [json.dumps(other.spec(), sort_keys=True) for other in (matrix, *others)]
    assert len(set(specs)) == len(specs)
