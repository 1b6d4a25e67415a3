# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
# ---
# %% [markdown]
# # Your own rounding and codebook
#
# A codebook and a rounding algorithm, about thirty lines of code each: written here, registered as the library's
# own are, used by `quantize_matrix`, and put through the same laws that all others are held to.

# %%
import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

import qjax
from qjax.codebooks import CODEBOOKS
from qjax.codebooks.scalar import ScalarCodebook
from qjax.linalg import damped_factor
from qjax.rounding.base import ROUNDINGS, Coded, RoundingAlgorithm
from qjax.rounding.sweep import merge_codes

# %% [markdown]
# ## A codebook: signed powers of two
# `±1, ±2, ±4, …`: products become shifts. A scalar codebook inherits packing and its 1×1 tile; what is left is
# `quantize` (nearest level) and `dequantize`. `rms` is the input RMS that it is made for.


# %%
@struct.dataclass
class PowersOfTwo(ScalarCodebook):
    @property
    def levels(self):
        powers = 2.0 ** np.arange(2 ** (self.bits - 1))
        return np.concatenate([-powers[::-1], powers]).astype(np.float32)

    def quantize(self, x):
        edges = jnp.asarray((self.levels[1:] + self.levels[:-1]) / 2, x.dtype)
        return jnp.searchsorted(edges, x, side="right").astype(jnp.uint8)

    def dequantize(self, codes):
        return jnp.take(jnp.asarray(self.levels), codes.astype(jnp.int32), mode="clip")


def powers_of_two(bits, rms=None):
    return PowersOfTwo("powers_of_two", int(bits), rms or {1: 1.25, 2: 1.35, 3: 4.0}[bits])


if "powers_of_two" not in CODEBOOKS:  # a notebook's cell may run twice
    CODEBOOKS.register("powers_of_two")(powers_of_two)

# %% [markdown]
# ## A rounding: LDLQ that listens to half of its feedback
# A frozen dataclass with one method, `round`: from a problem (weight, hessian, codebook, scaling, damping, key) to
# codes. The base class checks shapes before it, and decodes the codes after it, so that the values are exactly what
# a decoder will see. `strength` 0 is plain rounding, 1 is LDLQ; between them one sees what feedback is worth.


# %%
@dataclasses.dataclass(frozen=True)
class PartialFeedback(RoundingAlgorithm):
    name: ClassVar[str] = "partial_feedback"
    strength: float = 0.5

    def round(self, problem):
        weight, codebook, scaling = problem.weight, problem.codebook, problem.scaling
        (_, width), columns = codebook.tile, weight.shape[1]
        factor = damped_factor(problem.input_hessian, problem.damping, width)
        feedback = (factor.lower - jnp.eye(columns, dtype=weight.dtype)) * self.strength

        def step(error, start):  # one tile's columns; a scan, because a Python loop would compile every column anew
            own = jax.lax.dynamic_slice_in_dim(weight, start, width, axis=1)
            column = jax.lax.dynamic_slice_in_dim(feedback, start, width, axis=1)
            listened = jnp.matmul(error, column, precision="highest")
            scale, zero = scaling.at(start + jnp.arange(width), weight.dtype)
            codes = codebook.quantize((own + listened) / scale + zero)
            values = (codebook.dequantize(codes).astype(weight.dtype) - zero) * scale
            return jax.lax.dynamic_update_slice_in_dim(error, own - values, start, axis=1), codes

        _, codes = jax.lax.scan(step, jnp.zeros_like(weight), jnp.arange(0, columns, width), reverse=True)
        return Coded(merge_codes(codes), factor.damping, factor.ok)


if "partial_feedback" not in ROUNDINGS:
    ROUNDINGS.register("partial_feedback")(PartialFeedback)

# %% [markdown]
# ## In use
# `make` finds both by name, checks their options, and they compose with everything else.

# %%
model = qjax.models.load("tiny")
tokens = qjax.data.load("pydoc", model.tokenizer, calibration_sequences=16, evaluation_sequences=4, length=128)
hessians = qjax.hessian.collect(model, tokens.calibration.tokens)
name = "layers.1.self_attn.k_proj"
weight = model.params["blocks"][1]["self_attn"]["k_proj"]["weight"]


def quantized(rounding, codebook):
    return qjax.quantize_matrix(
        weight,
        hessians[name],
        codebook=codebook,
        rounding=rounding,
        incoherence=qjax.incoherence.make("hadamard"),
        key=jax.random.key(0),
        name=name,
    )


loss = {}
for label in ("half_integer", "e8p", "powers_of_two"):
    for strength in (0.0, 0.5, 1.0):
        matrix, report = quantized(
            qjax.rounding.make("partial_feedback", strength=strength), qjax.codebooks.make(label, 2)
        )
        loss[label, strength] = report.proxy_loss
    print(f"{label:14s}" + "".join(f"  strength {s}: {loss[label, s]:.4f}" for s in (0.0, 0.5, 1.0)))
_, library = quantized(qjax.rounding.make("ldlq"), qjax.codebooks.make("half_integer", 2))
print(f"the library's LDLQ, half-integer: {library.proxy_loss:.4f}")

# %% [markdown]
# ## The laws
# All that is registered obeys the same laws: the values are the decoded codes, the scale of the Hessian has no
# meaning, feedback beats plain rounding. `qjax.testing.check` holds them against one's own; from a package of one's own
# (`plugins=[my_package]`) the two classes are then options of the command line like all others.

# %%
import qjax.testing

laws = set()
for kind, name, partners in (
    ("codebook", "powers_of_two", ["ldlq", "partial_feedback"]),
    ("rounding", "partial_feedback", ["half_integer", "powers_of_two"]),
):
    for outcome in qjax.testing.check(kind, name, partners):
        laws.add(outcome.law)
        held = "holds" if outcome.refused is None else f"refused ({outcome.refused})"
        print(f"{held}: {outcome.law.replace('_', ' ')} {outcome.partner and f'[{name}, {outcome.partner}]'}")
