"""Rows of a quantised matrix, looked up one by one, against those of the decoded matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.codebooks.scaling import ScaleRule
from qjax.errors import InputError
from qjax.interchange.serialize import from_arrays, to_arrays
from qjax.matrix import Lookup, LowRank
from qjax.matrix.quantized import row_obstacle
from qjax.models.linear import rows

OUT, IN = 40, 64
INPUT = {"name": "hadamard", "side": "input"}
GROUPS = ScaleRule("minmax", "group", 32)


def matrix(codebook, incoherence=None, scale=None, rounding="nearest", width=IN):
    weight = np.random.default_rng(0).standard_normal((OUT, width)).astype(np.float32)
    hessian = np.diag(np.linspace(1, 3, width)).astype(np.float32)
    options = {"codebook": codebook, "incoherence": incoherence, "scale": scale, "rounding": rounding}
    return qjax.quantize_matrix(weight, hessian, key=0, **options)[0]


@pytest.mark.parametrize(
    "made",
    [
        {"codebook": ("grid", 4), "scale": GROUPS},
        {"codebook": ("grid", 3), "scale": GROUPS, "rounding": {"name": "gptq", "order": "descending"}},
        {"codebook": ("grid", 3), "width": 45},  # rows that end inside of a word
        {"codebook": ("half_integer", 2), "incoherence": INPUT},
        {"codebook": ("half_integer", 2), "incoherence": INPUT | {"rescale": True}, "width": 44},  # padded
        {"codebook": "e8p", "incoherence": INPUT},
        {"codebook": ("e8p_rvq", 3)},
    ],
    ids=str,
)
def test_rows_are_those_of_the_decoded_matrix(made):
    own = matrix(**made)
    index = np.array([[3, 0, OUT - 1], [7, 3, 99]])  # clipped as a dense lookup is
    dense = np.asarray(own.dequantize())
    expected = dense[np.minimum(index, OUT - 1)]
    np.testing.assert_allclose(own.rows(index), expected, atol=1e-6)
    np.testing.assert_allclose(jax.jit(lambda m, i: m.rows(i))(own, jnp.asarray(index)), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("made", "why"),
    [
        ({"codebook": ("grid", 4), "incoherence": "hadamard"}, "rotation of the outputs; use incoherence: none"),
        ({"codebook": ("trellis", 2), "incoherence": INPUT}, "codes 16 rows together; use codebook: grid"),
    ],
)
def test_rows_that_are_not_stored_apart_are_refused(made, why):
    own = matrix(**made)
    assert row_obstacle(own) is not None
    with pytest.raises(InputError, match=why):
        own.rows(np.array([0]))


def test_an_operator_without_rows_is_refused_as_an_embedding():
    low_rank = LowRank(jnp.ones((OUT, 2)), jnp.ones((2, IN)))
    with pytest.raises(InputError, match="LowRank cannot; use an array"):
        rows(low_rank, np.array([0]))
    np.testing.assert_array_equal(rows(jnp.eye(4), np.array([2, 9])), np.eye(4)[[2, 3]])


def test_a_lookup_gives_its_dtype_and_is_stored():
    table = Lookup(matrix(("grid", 4), scale=GROUPS), "bfloat16")
    index = np.array([5, 1])
    assert table.rows(index).dtype == jnp.bfloat16 and table.shape == (OUT, IN)
    again = from_arrays(*to_arrays(table), "here")
    assert isinstance(again, Lookup) and again.dtype == "bfloat16"
    np.testing.assert_array_equal(again.dequantize(), table.dequantize())
    arrays, description = to_arrays(table)
    description["operator"]["dtype"] = "float64"
    with pytest.raises(qjax.errors.ArtifactError, match="rows of a lookup"):
        from_arrays(arrays, description, "here")
