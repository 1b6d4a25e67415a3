"""Laws of codebooks, incoherence, Hessian estimators and data sources: each takes a registered name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from qjax import codebooks, data, incoherence, models
from qjax.hessian.collect import collect
from qjax.hessian.estimators import ESTIMATORS
from qjax.testing.problems import IN, OUT, LawBroken, book, finite, problem, the_same

__all__ = ["CODEBOOK", "HESSIAN", "INCOHERENCE", "SOURCE"]

Laws = Mapping[str, Callable[[str], None]]


def _sample(name: str) -> jax.Array:
    weight, _ = problem()
    return jnp.asarray(weight * np.float32(book(name).rms))


def codewords_are_their_own_nearest(name: str) -> None:
    """A decoded matrix is coded as what it is."""
    found = book(name)
    values = found.dequantize(found.quantize(_sample(name)))
    finite("a decoded matrix", values)
    the_same("a decoded matrix, coded and decoded again", found.dequantize(found.quantize(values)), values)


def codes_survive_packing(name: str) -> None:
    """`unpack(pack(codes)) = codes`, in as many words as `bits` says."""
    found = book(name)
    codes = found.quantize(_sample(name))
    packed = found.pack(codes)
    words = -(-int(found.bits * OUT * IN) // 32)
    if packed.shape != (words,):
        raise LawBroken(f"packed codes are {packed.shape}; {found.bits} bits per weight are {words} words")
    the_same("codes after packing", found.unpack(packed, (OUT, IN)), codes)


def the_spec_makes_the_same_codebook(name: str) -> None:
    """`make(**spec())` is the codebook again, which is how artifacts know it."""
    found = book(name)
    again = codebooks.make(**found.spec())
    if again.spec() != found.spec():
        raise LawBroken(f"spec {found.spec()} makes a codebook of spec {again.spec()}")
    the_same("codes of both", again.quantize(_sample(name)), found.quantize(_sample(name)))


def it_is_better_than_zeros(name: str) -> None:
    """The mean squared error on a Gaussian of the codebook's RMS is below its variance."""
    found, x = book(name), _sample(name)
    error = float(jnp.mean(jnp.square(found.dequantize(found.quantize(x)) - x)) / jnp.mean(jnp.square(x)))
    if not error < 1:
        raise LawBroken(f"the relative error on a Gaussian is {error:.3f}; zeros alone have 1")


CODEBOOK: Laws = {
    law.__name__: law
    for law in (
        codewords_are_their_own_nearest,
        codes_survive_packing,
        the_spec_makes_the_same_codebook,
        it_is_better_than_zeros,
    )
}


def the_transform_is_undone(name: str) -> None:
    """A transformed weight, transformed back, is the weight."""
    weight, hessian = (jnp.asarray(one) for one in problem())
    transform = incoherence.make(name).sample(jax.random.key(3), OUT, IN, weight, hessian)
    back = transform.weight_inverse(transform.weight(weight))
    if not np.allclose(back, weight, atol=1e-4):
        raise LawBroken(f"a weight comes back with an error of {float(jnp.max(jnp.abs(back - weight))):.2g}")


INCOHERENCE: Laws = {the_transform_is_undone.__name__: the_transform_is_undone}


def _pydoc(model: models.Model) -> np.ndarray:
    """Two calibration windows of 16 tokens."""
    split = data.load("pydoc", model, calibration_sequences=2, evaluation_sequences=1, length=16)
    return split.calibration.tokens


def factors_are_symmetric_and_positive(name: str) -> None:
    """On `tiny`: finite factors of the right size, symmetric to the bit, no eigenvalue below −1e-4 of the largest."""
    model = models.load("tiny")
    tokens = _pydoc(model)
    estimator = ESTIMATORS.make(name)
    if estimator.collects:
        found = estimator.collect(model, tokens, progress=lambda done, total: None)
    else:
        found = collect(model, tokens, name, batch=2)
    for layer in models.layer_names(model.config):
        if layer not in found:
            raise LawBroken(f"layer {layer} has no Hessian")
        for factor in filter(lambda one: one is not None, (found[layer].input, found[layer].output)):
            matrix = np.asarray(factor, np.float64)
            finite(f"the Hessian of {layer}", matrix)
            the_same(f"the Hessian of {layer} and its transpose", matrix, matrix.T)
            values = np.linalg.eigvalsh(matrix)
            if values[0] < -1e-4 * values[-1]:
                raise LawBroken(
                    f"the Hessian of {layer} has the eigenvalue {values[0]:.3g}, the largest {values[-1]:.3g}"
                )


HESSIAN: Laws = {factors_are_symmetric_and_positive.__name__: factors_are_symmetric_and_positive}


def windows_are_the_same_twice_and_apart(name: str) -> None:
    """The same windows on every call, ids in the vocabulary, and no window in both halves."""
    model = models.load("tiny")
    one, other = (data.load(name, model, calibration_sequences=2, evaluation_sequences=2, length=16) for _ in range(2))
    the_same("calibration windows of two calls", one.calibration.tokens, other.calibration.tokens)
    the_same("evaluation windows of two calls", one.evaluation.tokens, other.evaluation.tokens)
    if one.calibration.sha256 == one.evaluation.sha256:
        raise LawBroken("calibration and evaluation windows are the same")


SOURCE: Laws = {windows_are_the_same_twice_and_apart.__name__: windows_are_the_same_twice_and_apart}
