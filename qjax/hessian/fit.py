"""The fit of Kronecker factors to the Fisher matrices of large layers, which are never formed.

With gradients G of sequences and labels that the factors were not made from, `𝓗 = E[vec(G) vec(G)ᵀ]` has

    ⟨𝓗, H_out ⊗ H_in⟩ = E[tr(H_out G H_in Gᵀ)],    ‖𝓗‖² = E[⟨G, G'⟩²]

for independent G and G'; both are means over a few sequences, without bias.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.gram.triangle import mirrored
from qjax.errors import InputError
from qjax.hessian.labels import label_gradient
from qjax.linalg.kronecker import Hessian
from qjax.models.config import ModelConfig
from qjax.models.structure import structure
from qjax.models.transformer import embed, head
from qjax.streams.forward import batches
from qjax.streams.gradients import there_and_back
from qjax.typing import HostOrDevice

__all__ = ["Fit", "error_bound", "measure_fit", "predicted_cost"]

_precise = jax.lax.Precision.HIGHEST
_LABEL_PASS = 2**31  # no pass of a collection has this number: the labels are new samples


@dataclasses.dataclass(frozen=True)
class Fit:
    """The fit of one linear's factors.

    Attributes:
      cosine: `⟨𝓗, H_out ⊗ H_in⟩ / (‖𝓗‖ ‖H_out‖ ‖H_in‖)`, an estimate, at most 1 but for its error.
      cosine_error: its standard error (jackknife over batches).
      norm: `‖𝓗‖`, per sequence, nats² per squared weight.
      sequences: that it was measured on.
      length: tokens of each.
    """

    cosine: float
    cosine_error: float
    norm: float
    sequences: int
    length: int


@functools.partial(jax.jit, static_argnames="sites")
def _block_terms(
    pull: Any,
    inputs: dict[str, Array],
    gradient: HostOrDevice,
    factors: dict[str, dict[str, HostOrDevice]],
    *,
    sites: tuple[tuple[str, str], ...],
) -> tuple[Array, dict[str, tuple[Array, Array]]]:
    """(∂ℓ/∂x, {linear: (`tr(H_out G H_in Gᵀ)` of every sequence, `⟨G, G'⟩` of every pair)})."""
    back, gradients = pull(gradient)
    found = {}
    for name, site in sites:
        x_t, g_t = inputs[site].astype(jnp.float32), gradients[name].astype(jnp.float32)
        found[name] = gradient_terms(x_t, g_t, factors[name]["input"], factors[name].get("output"))
    return back, found


def gradient_terms(
    x: Float[Array, "batch length n"],
    g: Float[Array, "batch length m"],
    h_in: Float[HostOrDevice, "n n"],
    h_out: Float[HostOrDevice, "m m"] | None,
) -> tuple[Float[Array, " batch"], Float[Array, "batch batch"]]:
    """`tr(H_out G H_in Gᵀ)` and `⟨G, G'⟩` of the sequences' gradients `G = Σ_t g_t x_tᵀ` (H_out None: identity)."""
    weighted_x = jnp.matmul(x, h_in, precision=_precise)
    weighted_g = g if h_out is None else jnp.matmul(g, h_out, precision=_precise)
    gram_x = jnp.einsum("btn,bsn->bts", weighted_x, x, precision=_precise)
    gram_g = jnp.einsum("btm,bsm->bts", weighted_g, g, precision=_precise)
    whole = jnp.einsum("btm,btn->bmn", g, x, precision=_precise).reshape(x.shape[0], -1)
    return jnp.sum(gram_x * gram_g, axis=(1, 2)), mirrored(jnp.matmul(whole, whole.T, precision=_precise))


def measure_fit(
    config: ModelConfig,
    params: Any,
    tokens: Int[np.ndarray, "sequences length"],
    hessians: Callable[[int], Mapping[str, Hessian]],
    *,
    batch: int = 4,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Fit]:
    """The fit of every linear, on sequences that the factors were not collected from, with labels of the true Fisher.

    All factors are held in memory. Raises InputError for fewer than two whole batches of at least two sequences.
    """
    count, length = tokens.shape
    if batch < 2 or count < 2 * batch:
        raise InputError(
            f"hessian.fit_sequences is {count} and hessian.batch {batch}; the fit needs pairs of sequences inside a "
            "batch, and at least two batches"
        )
    blocks, top = params["blocks"], head(params)
    factors = [{name: _factors(h) for name, h in hessians(index).items()} for index in range(len(blocks))]
    root, sites = np.array([_LABEL_PASS, seed], np.uint32), tuple(structure(config).sites.items())
    inner: dict[str, list[float]] = {}
    square: dict[str, list[float]] = {}
    whole = count // batch * batch  # the last, padded batch would pair a sequence with itself
    for number, (part, _) in enumerate(batches(tokens[:whole], batch)):
        x, way = there_and_back(blocks, embed(params["embed"], part, config), config, keep=False)
        numbers = np.arange(number * batch, (number + 1) * batch, dtype=np.uint32)
        gradient = label_gradient(top, x, part, root, numbers, config, labels="sampled")
        for index, pull, inputs in way:
            gradient, found = _block_terms(pull, inputs, gradient, factors[index], sites=sites)
            for name, (own, pairs) in jax.device_get(found).items():
                pairs = np.asarray(pairs, np.float64)
                others = np.sum(pairs**2) - np.sum(np.diagonal(pairs) ** 2)
                inner.setdefault(f"layers.{index}.{name}", []).append(float(np.mean(own, dtype=np.float64)))
                square.setdefault(f"layers.{index}.{name}", []).append(float(others / (batch * (batch - 1))))
        if progress is not None:
            progress((number + 1) * batch, whole)
    result = {}
    for index, block_factors in enumerate(factors):
        for linear, (m, _) in structure(config).shapes.items():
            name, known = f"layers.{index}.{linear}", block_factors[linear]
            scale = np.linalg.norm(known["input"]) * (np.linalg.norm(known["output"]) if "output" in known else m**0.5)
            cosine, error = _ratio(np.array(inner[name]) / scale, np.array(square[name]))
            result[name] = Fit(cosine, error, float(np.sqrt(np.mean(square[name]))), whole, length)
    return result


def _factors(hessian: Hessian) -> dict[str, np.ndarray]:
    known = {"input": np.asarray(hessian.input, np.float32)}
    return known if hessian.output is None else known | {"output": np.asarray(hessian.output, np.float32)}


def _ratio(inner: Float[np.ndarray, " batches"], square: Float[np.ndarray, " batches"]) -> tuple[float, float]:
    """`mean(inner) / √mean(square)` and its standard error by the jackknife."""
    count = len(inner)
    safe = lambda a, b: a / np.sqrt(np.where(b > 0, b, 1))  # noqa: E731  (no gradient at all: 0)
    left = safe((inner.sum() - inner) / (count - 1), (square.sum() - square) / (count - 1))
    error = np.sqrt((count - 1) / count * np.sum(np.square(left - left.mean())))
    return float(safe(inner.mean(), square.mean())), float(error)


def error_bound(fit: Fit, squared_error: float, kronecker_loss: float) -> float:
    """Most that a matrix' error E may cost, to second order, in nats per token: half of `vec(E)ᵀ 𝓗 vec(E) / length`.

        vec(E)ᵀ 𝓗 vec(E) ≤ ‖𝓗‖ (‖E‖² √(2 − 2c) + tr(H_out E H_in Eᵀ) / (‖H_out‖ ‖H_in‖))

    c is the cosine; `kronecker_loss` is the last fraction, measured: its expectation for white rounding errors of
    variance σ² is at most `σ² tr(D_out) tr(D_in) / (‖H_out‖ ‖H_in‖)` (YAQA, 2505.22988, section 5).
    """
    gap = np.sqrt(max(2 - 2 * fit.cosine, 0.0))
    return float(0.5 * fit.norm * (squared_error * gap + kronecker_loss) / fit.length)


def predicted_cost(fit: Fit, kronecker_loss: float) -> float:
    """The cost of a matrix' error in nats per token, 𝓗 replaced by its projection on the factors.

    That is `½ ‖𝓗‖ c tr(H_out E H_in Eᵀ) / (‖H_out‖ ‖H_in‖ length)`, 𝓗 and its norm of sequences of `length` tokens.
    The bound above is far larger: it takes E to lie where the factors fit worst.
    """
    return float(0.5 * fit.norm * fit.cosine * kronecker_loss / fit.length)
