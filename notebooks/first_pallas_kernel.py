# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
# ---
# %% [markdown]
# # A first Pallas kernel
#
# Generating text multiplies one vector with every weight matrix, so its speed is that of reading the weights. At 2
# bits there are 16 times fewer bytes than in float32, if the codes are decoded where they are used. This notebook
# writes such a product, `y = W x` with W packed, as a Pallas kernel; it is interpreted here, so that it runs
# without an accelerator (and says nothing about speed).

# %%
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

import qjax
from pallas_kernels.dequant_matmul import pallas_tpu, reference
from pallas_kernels.dequant_matmul.layout import from_codes

model = qjax.models.load("tiny")
weight = model.params["blocks"][0]["mlp"]["down_proj"]["weight"]
out, inner = weight.shape

# %% [markdown]
# ## Codes, packed
# 2-bit codes of the half-integer grid, with one scale for every row; 16 codes to a 32-bit word. The layout is our
# choice: word j of a row holds inputs j, j + in/16, j + 2 in/16, …, so that one shift and one mask of a whole row
# of words give in/16 *consecutive* inputs.

# %%
book = qjax.codebooks.make("half_integer", 2)
scale = jnp.sqrt(jnp.mean(jnp.square(weight), axis=1, keepdims=True)) / jnp.float32(book.rms)
codes = book.quantize(weight / scale)  # 0 … 3, the levels −3/2 … 3/2
words = jnp.zeros((out, inner // 16), jnp.uint32)
for i, part in enumerate(jnp.split(codes.astype(jnp.uint32), 16, axis=1)):
    words = words | (part << np.uint32(2 * i))
dense = book.dequantize(codes) * scale
print(f"{weight.shape}: {dense.nbytes} bytes as float32, {words.nbytes} packed")

# %% [markdown]
# ## The kernel
# A program of the grid owns 64 rows of W: it reads their words, decodes sixteen slices one after the other,
# multiplies each with its slice of x, and writes 64 results. `BlockSpec` says which block of every array a program
# sees.

# %%
ROWS = 64


def kernel(x_ref, words_ref, scale_ref, y_ref):
    words, total = words_ref[...], jnp.zeros((ROWS, 1), jnp.float32)
    width = words.shape[1]
    for i in range(16):
        code = (words >> np.uint32(2 * i)) & np.uint32(3)
        values = code.astype(jnp.int32).astype(jnp.float32) - np.float32(1.5)
        total += jnp.sum(values * x_ref[:, i * width : (i + 1) * width], axis=1, keepdims=True)
    y_ref[...] = total * scale_ref[...]


@jax.jit
def matvec(x, words, scale):
    rows, width = words.shape
    y = pl.pallas_call(
        kernel,
        grid=(rows // ROWS,),
        in_specs=[
            pl.BlockSpec((ROWS, 16 * width), lambda i: (0, 0)),  # all of x, for every program
            pl.BlockSpec((ROWS, width), lambda i: (i, 0)),
            pl.BlockSpec((ROWS, 1), lambda i: (i, 0)),
        ],
        out_specs=pl.BlockSpec((ROWS, 1), lambda i: (i, 0)),
        out_shape=jax.ShapeDtypeStruct((rows, 1), jnp.float32),
        interpret=True,
    )(jnp.broadcast_to(x, (ROWS, x.shape[0])), words, scale)
    return y[:, 0]


x = jax.random.normal(jax.random.key(0), (inner,))
ours = matvec(x, words, scale)
expected = jnp.matmul(dense, x, precision="highest")
error = float(jnp.max(jnp.abs(ours - expected)) / jnp.max(jnp.abs(expected)))
print(f"the kernel beside decode-then-multiply on XLA: relative error {error:.1e}")

# %% [markdown]
# ## The kernel that ships
# `pallas_kernels.dequant_matmul` solves what was left out above: any width from 1 to 8 bits without a code that
# straddles a word, scales per group, up to 16 rows of x through the matrix unit, padding, and blocks that TPU and
# GPU accept (`interpret=True` does not check that; the tests lower and compile). All its versions decode with the
# same function, and the XLA one is the oracle of the tests.

# %%
packed = from_codes(codes, 2, scale, np.float32(-1.5) * scale)
rows = jnp.stack([x, -x, 2 * x])
results = {
    "XLA reference": reference.matmul(rows, packed),
    "TPU kernel, interpreted": pallas_tpu.matmul(rows, packed, interpret=True),
}
differences = {}
for label, y in results.items():
    differences[label] = float(jnp.max(jnp.abs(y[0] - ours)) / jnp.max(jnp.abs(expected)))
    print(f"{label:24s} {y.shape}, differs from ours by {differences[label]:.1e}")
print(f"packed with padding: {packed.nbytes} bytes for {packed.shape}, padded to {packed.padded}")
