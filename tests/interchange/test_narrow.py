"""The smallest form of dense arrays: nothing but what comes back to the bit is taken."""

import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from qjax.interchange.narrow import narrowest, narrowest_bytes, widened

RNG = np.random.default_rng(0)
VALUES = RNG.standard_normal((6, 64)).astype(np.float32)
Q8 = dequantize(quantize(VALUES, GGMLQuantizationType.Q8_0), GGMLQuantizationType.Q8_0)  # llama.cpp's own format
SPARSE = np.where(np.arange(64) >= 32, Q8, np.float32(0))  # with blocks of zeros


def changed(array, value):
    array = array.copy()
    array[3, 5] = value
    return array


@pytest.mark.parametrize(
    ("array", "size"),
    [
        (VALUES.astype(ml_dtypes.bfloat16).astype(np.float32), 2 * 384),
        (VALUES.astype(np.float16).astype(np.float32), 2 * 384),
        (VALUES.astype(np.float16), 2 * 384),
        (Q8, 384 + 2 * 12),
        (SPARSE, 384 + 2 * 12),
        (VALUES, 4 * 384),
        (changed(Q8, 1e-3), 4 * 384),
        (changed(Q8, np.float32(-0.0)), 4 * 384),  # the sign of a zero is a bit too
        (changed(VALUES.astype(ml_dtypes.bfloat16).astype(np.float32), 1e-45), 4 * 384),
        (np.full((2, 3), 65519, np.float32), 4 * 6),  # infinite in float16
        (np.zeros((0, 32), np.float32), 0),
        (VALUES[0], 4 * 64),
        (np.array(0.5, np.float32), 2),
    ],
)
def test_what_is_stored_comes_back_to_the_bit(array, size):
    parts = {f"embed{end}": part for end, part in narrowest(array).items()}
    assert narrowest_bytes(array) == size == sum(part.nbytes for part in parts.values())
    dtypes = {"embed": "float32"} if any(part.dtype != array.dtype for part in parts.values()) else {}
    (again,) = widened(parts, dtypes).values()
    assert again.dtype == array.dtype and again.shape == array.shape and again.tobytes() == array.tobytes()


def test_parts_that_do_not_belong_together_are_refused():
    parts = {f"embed{end}": part for end, part in narrowest(Q8).items()}
    with pytest.raises(ValueError, match="384 codes and 11 scales"):
        widened({**parts, "embed~scales": parts["embed~scales"].reshape(-1)[:11]}, {"embed": "float32"})
    with pytest.raises(KeyError):
        widened({}, {"embed": "float32"})
    with pytest.raises(ValueError, match="narrowed from"):
        widened(parts, {"embed": "float64"})
