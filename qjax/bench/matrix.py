"""The steps for one weight matrix: Hessian update, factorisation, LDLQ and GPTQ beside the machine's own matmul.

Floating-point operations that rates are stated in, for W [m, n] and T tokens:

    matmul          2 n³             [n, n] × [n, n] in float32, the machine's own rate
    gram            2 T n²           H += xᵀ x with compensated summation
    factor          n³ / 3           damped Cholesky factorisation and L
    ldlq_sweep      m n²             the feedback of LDLQ with L given
    ldlq            n³ / 3 + m n²    from H to codes and values
    gptq            2 n³ / 3 + m n²  as ldlq, with the inverse of the factor
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from qjax import codebooks, rounding
from qjax.bench.timing import Program, Timing, compiled, interleaved
from qjax.codebooks.base import Codebook
from qjax.codebooks.scaling import identity
from qjax.errors import InputError
from qjax.hessian import Hessian
from qjax.linalg.damping import damped_factor
from qjax.rounding.ldlq import feedback_codes
from qjax.rounding.sweep import merge_codes

__all__ = ["Case", "flops", "gram_update", "ldlq_sweep", "measure", "parse_size"]

_DAMPING = 0.01
_PRECISE = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class Case:
    """One size: W [out, columns] at `bits` per weight, its Hessian [columns, columns], `tokens` per Hessian update."""

    out: int
    columns: int
    tokens: int = 4096
    bits: int = 2

    def __str__(self) -> str:
        return f"{self.out}x{self.columns}"


def parse_size(text: str) -> tuple[int, int]:
    """(out, in) of `576x1536`. Raises InputError for anything else."""
    match = re.fullmatch(r"([1-9]\d*)[x×]([1-9]\d*)", str(text).strip())
    if match is None:
        raise InputError(f"sizes: {text!r} is not a size; write rows x columns of the weight, such as 576x1536")
    return int(match[1]), int(match[2])


def flops(case: Case) -> dict[str, float]:
    """Floating-point operations by step (formulas: see the module)."""
    m, n, tokens = float(case.out), float(case.columns), float(case.tokens)
    return {
        "matmul": 2 * n**3,
        "gram": 2 * tokens * n**2,
        "factor": n**3 / 3,
        "ldlq_sweep": m * n**2,
        "ldlq": n**3 / 3 + m * n**2,
        "gptq": 2 * n**3 / 3 + m * n**2,
    }


def gram_update(
    total: Float[Array, "n n"], carry: Float[Array, "n n"], x: Float[Array, "tokens n"]
) -> tuple[Float[Array, "n n"], Float[Array, "n n"]]:
    """`total + xᵀ x` and what the float32 addition dropped (Kahan), as `qjax.hessian.moments` does for a site."""
    addend = jnp.matmul(x.T, x, precision=_PRECISE) - carry
    new = total + addend
    return new, (new - total) - addend


def ldlq_sweep(weight: Float[Array, "m n"], lower: Float[Array, "n n"], codebook: Codebook) -> Array:
    """Codes of LDLQ with the unit lower factor given and one scale of 1: the sweep alone."""
    columns, block = weight.shape[1], codebook.tile[1]
    return merge_codes(feedback_codes(weight, lower, codebook, identity(), block=block, index=jnp.arange(columns)))


def _round(name: str, codebook: Codebook) -> Callable[[Array, Array], Any]:
    algorithm = rounding.make(name)
    return lambda weight, h: algorithm(weight, Hessian(h), codebook, damping=_DAMPING)


def _programs(case: Case, codebook: Codebook) -> tuple[dict[str, Program], bool]:
    """The compiled steps on Gaussian data, and whether the factorisation succeeded with the damping asked for."""
    rng = np.random.default_rng(0)
    m, n = case.out, case.columns
    weight = jax.device_put(rng.standard_normal((m, n), np.float32) * np.float32(codebook.rms))
    mixing = (1 + np.arange(n, dtype=np.float32)) ** np.float32(-0.5)  # channels of unequal power, as in a model
    x = jax.device_put(rng.standard_normal((case.tokens, n), np.float32) * mixing)
    zeros = jax.device_put(np.zeros((n, n), np.float32))
    programs = {"gram": compiled(gram_update, zeros, zeros, x)}
    h, _ = programs["gram"].call()
    programs["factor"] = compiled(lambda h: damped_factor(h, _DAMPING, 1), h)
    factor = programs["factor"].call()
    sound = bool(factor.ok) and abs(float(factor.damping) - _DAMPING) < 1e-6
    programs["ldlq_sweep"] = compiled(lambda w, lower: ldlq_sweep(w, lower, codebook), weight, factor.lower)
    programs["ldlq"] = compiled(_round("ldlq", codebook), weight, h)
    programs["gptq"] = compiled(_round("gptq", codebook), weight, h)
    programs["matmul"] = compiled(lambda a, b: jnp.matmul(a, b, precision=_PRECISE), h, factor.lower)
    return {name: programs[name] for name in flops(case)}, sound


def measure(case: Case, repeats: int = 5, least_seconds: float = 2.0) -> dict[str, Any]:
    """Seconds, rates, memory and compile time of every step for one size.

    All steps run in every round, so `ratio_to_matmul` compares rates of the same moment: it is the median over rounds
    of (GFLOP/s of the step) / (GFLOP/s of the matmul). Raises InputError for fewer than one repeat.
    """
    programs, sound = _programs(case, codebooks.make("half_integer", case.bits))
    timings = interleaved({name: p.call for name, p in programs.items()}, repeats, least_seconds=least_seconds)
    work = flops(case)
    steps = {name: _record(programs[name], timings[name], work[name]) for name in programs}
    for name, step in steps.items():
        step["ratio_to_matmul"] = timings[name].relative(timings["matmul"]) * work[name] / work["matmul"]
    return {
        "size": str(case),
        **dataclasses.asdict(case),
        "damping": _DAMPING,
        "damping_sufficed": sound,
        "steps": steps,
    }


def _record(program: Program, timing: Timing, work: float) -> dict[str, Any]:
    return {
        "flops": work,
        **timing.to_dict(),
        "gflops_per_second": work / timing.median / 1e9,
        "trace_seconds": program.trace_seconds,
        "compile_seconds": program.compile_seconds,
        "temporary_bytes": program.temporary_bytes,
    }


def lines(results: Sequence[dict[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """(headers, rows) of the measured sizes for printing."""
    headers = ("size", "step", "seconds", "min–max", "GFLOP/s", "of matmul", "compile s", "temporary MiB")
    rows = []
    for result in results:
        for name, step in result["steps"].items():
            temporary = step["temporary_bytes"]
            rows.append(
                (
                    result["size"],
                    name,
                    f"{step['seconds_median']:.4f}",
                    f"{step['seconds_min']:.4f}–{step['seconds_max']:.4f}",
                    f"{step['gflops_per_second']:.1f}",
                    f"{step['ratio_to_matmul']:.2f}",
                    f"{step['trace_seconds'] + step['compile_seconds']:.2f}",
                    "–" if temporary is None else f"{temporary / 2**20:.0f}",
                )
            )
    return headers, rows
