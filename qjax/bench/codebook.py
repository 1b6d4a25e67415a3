"""Every codebook on a Gaussian matrix: encode and decode speed, memory, and distortion beside the Shannon bound."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax import codebooks
from qjax.bench.timing import compiled, interleaved
from qjax.codebooks.base import CODEBOOKS, Codebook
from qjax.codebooks.scaling import fit
from qjax.codebooks.tail_biting import forward
from qjax.codebooks.trellis import WEIGHTS, Trellis
from qjax.errors import InputError
from qjax.matrix.quantize import default_scale_rule

__all__ = ["available", "measure", "shannon"]

_WIDTHS = tuple(range(1, 9))
_SEED = 20  # not one that tables are drawn with: its stream would be their own training samples
_STATES = 2**32  # evaluations of one pass of a trellis search that a measurement may take


def shannon(bits: float) -> float:
    """The least mean squared error of any code of a unit-variance Gaussian source: `2^(−2 bits)`."""
    return 2.0 ** (-2 * bits)


def available(names: Sequence[str] | None = None, bits: Sequence[int] | None = None) -> list[Codebook]:
    """Registered codebooks at every whole width from 1 to 8 bits that they have; trellises up to 4, at L = 12 and 16.

    Raises InputError for an unknown name, or when nothing is left.
    """
    found = []
    for name in sorted(CODEBOOKS) if names is None else names:
        if name not in CODEBOOKS:
            raise InputError(f"names: unknown codebook {name!r}; there is: {', '.join(sorted(CODEBOOKS))}")
        for width in _WIDTHS if bits is None else bits:
            for options in variants(name, width):
                try:
                    book = codebooks.make(name, width, **options)
                except InputError:  # the codebook has no such width
                    continue
                if not any(book.spec() == other.spec() for other in found):  # a name may stand for a family of others
                    found.append(book)
    if not found:
        raise InputError(f"no codebook of {names} has {bits} bits per weight")
    return found


def variants(name: str, bits: int) -> list[dict[str, Any]]:
    """Options of a codebook that are worth a line each."""
    if name != "trellis":
        return [{}]
    if bits > 4:
        return []
    codes = ("1mad", "3inst", "mul1", "hyb") if bits == 2 else ("1mad",)
    found: list[dict[str, Any]] = [{"L": L, "code": code} for L in (12, 16) for code in codes]
    if bits == 2:
        cheaper = {"code": "1mad", "search": "one_pass"}
        found += [{"L": L, "overlap": overlap, **cheaper} for L in (12, 16) for overlap in (64, 32)]
    return found


def sized(codebook: Codebook, shape: tuple[int, int]) -> tuple[int, int]:
    """The shape to measure on: smaller for a trellis, whose search visits `2^L / V` states for every weight twice."""
    if not isinstance(codebook, Trellis):
        return shape
    side = int(np.sqrt(_STATES * codebook.V / 2**codebook.L)) // 16 * 16
    return min(shape[0], side), min(shape[1], side)


def search_rates(codebook: Trellis, weights: int, seconds: float, repeats: int) -> dict[str, Any]:
    """State evaluations per second of the search, and their ratio to min-plus steps alone on a batch of that size.

    The limit's step is `cost' = min_d cost + (value − x)²` over the same arrays, without a choice that is kept.
    """
    batch, steps = codebook.batch, codebook.steps
    sides = 1 if codebook.search == "one_pass" else 2  # of the seam; without the rare tails that are searched again
    read = steps if codebook.overlap is None else min(sides * codebook.overlap, steps)
    states = weights / WEIGHTS * (steps + read) * 2**codebook.L
    x = np.random.default_rng(1).standard_normal((steps, codebook.V, batch), np.float32)
    lut = np.asarray(codebook.values())
    cost = np.zeros((2 ** (codebook.L - codebook.step_bits), batch), np.float32)
    limit = compiled(lambda x, lut, cost: forward(x, lut, codebook.step_bits, cost, False)[0], x, lut, cost)
    timing = interleaved({"limit": limit.call}, repeats, least_seconds=0.5)["limit"]
    alone = steps * batch * 2**codebook.L / timing.median
    return {
        "states_per_second": states / seconds,
        "min_plus_states_per_second": alone,
        "ratio_to_min_plus": states / seconds / alone,
    }


def measure(codebook: Codebook, shape: tuple[int, int] = (4096, 1024), repeats: int = 3) -> dict[str, Any]:
    """Speed in weights per second and the mean squared error on N(0, 1), under the codebook's default scale.

    Raises InputError when tiles do not divide the shape, or for fewer than one repeat.
    """
    rows, columns = shape = sized(codebook, shape)
    if columns % codebook.tile[1] or rows % codebook.tile[0]:
        tile = "×".join(map(str, codebook.tile))
        raise InputError(f"shape: {rows}×{columns} is not made of whole {tile} tiles; choose multiples of 16")
    weight = jax.device_put(np.random.default_rng(_SEED).standard_normal(shape, np.float32))
    scaling = fit(weight, codebook, default_scale_rule(codebook, None))
    normal = jax.block_until_ready(jax.jit(scaling.to_codebook_units)(weight))
    encode = compiled(codebook.quantize, normal)
    codes = encode.call()
    decode = compiled(codebook.dequantize, codes)
    timings = interleaved({"encode": encode.call, "decode": decode.call}, repeats)
    error = jax.jit(lambda values: jnp.mean(jnp.square(scaling.from_codebook_units(values) - weight)))(decode.call())
    count = rows * columns
    bound = shannon(codebook.bits)
    search = {}
    if isinstance(codebook, Trellis):
        search = {"search": search_rates(codebook, count, timings["encode"].median, repeats)}
    return {
        **search,
        "codebook": codebook.spec(),
        "tile": list(codebook.tile),
        "bits": codebook.bits,
        "shape": list(shape),
        "mse": float(error),
        "mse_shannon": bound,
        "excess_db": float(10 * np.log10(float(error) / bound)),
        **{
            name: {
                **timings[name].to_dict(),
                "weights_per_second": count / timings[name].median,
                "compile_seconds": program.compile_seconds,
                "temporary_bytes": program.temporary_bytes,
            }
            for name, program in (("encode", encode), ("decode", decode))
        },
    }


def lines(results: Sequence[dict[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """(headers, rows) of the measured codebooks for printing."""
    headers = (
        *("codebook", "bits", "tile", "encode M/s", "decode M/s", "encode temporary MiB", "compile s"),
        *("MSE", "2^(-2 bits)", "excess dB", "G states/s", "of min-plus"),
    )
    rows = []
    for result in results:
        temporary, spec, search = result["encode"]["temporary_bytes"], result["codebook"], result.get("search")
        name = f"{spec['name']} {spec['code']} L{spec['L']}" if "L" in spec else str(spec["name"])
        name += f" {spec['search']} {spec['overlap']}" if spec.get("search", "two_pass") != "two_pass" else ""
        rows.append(
            (
                name,
                f"{result['bits']:g}",
                "x".join(map(str, result["tile"])),
                f"{result['encode']['weights_per_second'] / 1e6:.3g}",
                f"{result['decode']['weights_per_second'] / 1e6:.1f}",
                "–" if temporary is None else f"{temporary / 2**20:.1f}",
                f"{result['encode']['compile_seconds']:.2f}",
                f"{result['mse']:.5f}",
                f"{result['mse_shannon']:.5f}",
                f"{result['excess_db']:.2f}",
                "–" if search is None else f"{search['states_per_second'] / 1e9:.1f}",
                "–" if search is None else f"{search['ratio_to_min_plus']:.2f}",
            )
        )
    return headers, rows
