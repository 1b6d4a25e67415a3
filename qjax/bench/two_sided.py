"""Two-sided rounding (YAQA) beside LDLQ with the same codebook: time for a size, and the loss it is meant to lower.

The factors are random with eigenvalues `k^-1` in a random basis, so rotating them changes nothing: what incoherence
would do to the weight is done to the problem already.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax import rounding
from qjax.bench.timing import Program, compiled, interleaved
from qjax.codebooks.base import Codebook
from qjax.errors import InputError
from qjax.hessian import Hessian
from qjax.incoherence.families import make as make_incoherence
from qjax.matrix.quantize import quantize_matrix
from qjax.rounding.losses import proxy_loss

__all__ = ["lines", "loss_ratios", "measure", "power_law"]

_DAMPING = 0.01


def power_law(rng: np.random.Generator, n: int, exponent: float = 1.0) -> np.ndarray:
    """A random symmetric [n, n] with eigenvalues `k^-exponent`, float32."""
    basis, _ = np.linalg.qr(rng.standard_normal((n, n)))
    return ((basis * np.arange(1, n + 1) ** -exponent) @ basis.T).astype(np.float32)


def measure(size: tuple[int, int], codebook: Codebook, repeats: int = 3) -> dict[str, Any]:
    """Seconds of LDLQ and of YAQA from factors to codes (factorisations included), in turns, and their ratio."""
    if repeats < 1:
        raise InputError(f"repeats is {repeats}; at least 1 is needed")
    m, n = size
    rng = np.random.default_rng(0)
    weight = jax.device_put(rng.standard_normal((m, n), np.float32) * np.float32(codebook.rms))
    h_in, h_out = (jax.device_put(power_law(rng, k)) for k in (n, m))

    def program(name: str) -> Program:
        algorithm = rounding.make(name)
        return compiled(
            lambda w, a, b: algorithm(w, Hessian(a, b), codebook, damping=_DAMPING).values, weight, h_in, h_out
        )

    programs = {name: program(name) for name in ("ldlq", "yaqa")}
    values = {name: p.call() for name, p in programs.items()}
    hessian = Hessian(h_in, h_out)
    timings = interleaved({name: p.call for name, p in programs.items()}, repeats)
    return {
        "size": f"{m}x{n}",
        "codebook": codebook.spec(),
        "seconds": {name: timing.to_dict() for name, timing in timings.items()},
        "ratio": 1 / timings["yaqa"].relative(timings["ldlq"]),
        "proxy_loss": {name: float(proxy_loss(weight, v, hessian)) for name, v in values.items()},
        "compile_seconds": {name: p.compile_seconds for name, p in programs.items()},
    }


def loss_ratios(n: int, codebook: Codebook, seeds: int = 5) -> dict[str, Any]:
    """Two-sided proxy loss of YAQA over LDLQ's, n × n, incoherence on both sides, for each seed."""
    incoherence = make_incoherence("hadamard")
    ratios, one_sided = [], []
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        weight = rng.standard_normal((n, n), np.float32)
        hessian = Hessian(power_law(rng, n), power_law(rng, n))
        losses = {}
        for name in ("yaqa", "ldlq"):
            matrix, report = quantize_matrix(
                weight,
                hessian,
                codebook=codebook,
                rounding=rounding.make(name),
                incoherence=incoherence,
                key=jax.random.key(seed),
            )
            alone = float(proxy_loss(jnp.asarray(weight), matrix.dequantize(), Hessian(jnp.asarray(hessian.input))))
            losses[name] = report.proxy_loss, alone
        ratios.append(losses["yaqa"][0] / losses["ldlq"][0])
        one_sided.append(losses["yaqa"][1] / losses["ldlq"][1])
    return {"size": f"{n}x{n}", "codebook": codebook.spec(), "loss_ratio": ratios, "one_sided_loss_ratio": one_sided}


def lines(results: list[dict[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """(headers, rows) for printing."""
    headers = ("codebook", "size", "LDLQ s", "YAQA s", "time ratio", "loss ratio", "one-sided loss ratio")
    rows = []
    for result in results:
        span = lambda values: f"{min(values):.3f}–{max(values):.3f}"  # noqa: E731
        if "loss_ratio" in result:
            tail = ("", "", "", span(result["loss_ratio"]), span(result["one_sided_loss_ratio"]))
        else:
            seconds = [f"{result['seconds'][name]['seconds_median']:.3f}" for name in ("ldlq", "yaqa")]
            losses = result["proxy_loss"]
            tail = (*seconds, f"{result['ratio']:.2f}", f"{losses['yaqa'] / losses['ldlq']:.3f}", "")
        rows.append((result["codebook"]["name"], result["size"], *tail))
    return headers, rows
