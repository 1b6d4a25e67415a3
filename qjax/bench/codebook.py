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
from qjax.errors import InputError
from qjax.quantize import default_scale_rule

__all__ = ["available", "measure", "shannon"]

_WIDTHS = tuple(range(1, 9))


def shannon(bits: float) -> float:
    """The least mean squared error of any code of a unit-variance Gaussian source: `2^(−2 bits)`."""
    return 2.0 ** (-2 * bits)


def available(names: Sequence[str] | None = None, bits: Sequence[int] | None = None) -> list[Codebook]:
    """Registered codebooks whose tiles are one row high, at every whole bit width from 1 to 8 that they have.

    Raises InputError for an unknown name, or when nothing is left.
    """
    found = []
    for name in sorted(CODEBOOKS) if names is None else names:
        if name not in CODEBOOKS:
            raise InputError(f"names: unknown codebook {name!r}; there is: {', '.join(sorted(CODEBOOKS))}")
        for width in _WIDTHS if bits is None else bits:
            try:
                book = codebooks.make(name, width)
            except InputError:  # the codebook has no such width
                continue
            known = any(book.spec() == other.spec() for other in found)  # a name may stand for a family of others
            if book.tile[0] == 1 and not known:
                found.append(book)
    if not found:
        raise InputError(f"no codebook of {names} has tiles one row high and {bits} bits per weight")
    return found


def measure(codebook: Codebook, shape: tuple[int, int] = (4096, 1024), repeats: int = 3) -> dict[str, Any]:
    """Speed in weights per second and the mean squared error on N(0, 1), under the codebook's default scale.

    Raises InputError when tiles do not divide the shape, or for fewer than one repeat.
    """
    rows, columns = shape
    if columns % codebook.tile[1]:
        raise InputError(f"shape: {columns} columns are not whole tiles of {codebook.tile[1]}; choose a multiple of 8")
    weight = jax.device_put(np.random.default_rng(0).standard_normal(shape, np.float32))
    scaling = fit(weight, codebook, default_scale_rule(codebook, None))
    normal = jax.block_until_ready(jax.jit(scaling.normalize)(weight))
    encode = compiled(codebook.quantize, normal)
    codes = encode.call()
    decode = compiled(codebook.dequantize, codes)
    timings = interleaved({"encode": encode.call, "decode": decode.call}, repeats)
    error = jax.jit(lambda values: jnp.mean(jnp.square(scaling.denormalize(values) - weight)))(decode.call())
    count = rows * columns
    bound = shannon(codebook.bits)
    return {
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
        *("MSE", "2^(-2 bits)", "excess dB"),
    )
    rows = []
    for result in results:
        temporary = result["encode"]["temporary_bytes"]
        rows.append(
            (
                str(result["codebook"]["name"]),
                f"{result['bits']:g}",
                "x".join(map(str, result["tile"])),
                f"{result['encode']['weights_per_second'] / 1e6:.1f}",
                f"{result['decode']['weights_per_second'] / 1e6:.1f}",
                "–" if temporary is None else f"{temporary / 2**20:.1f}",
                f"{result['encode']['compile_seconds']:.2f}",
                f"{result['mse']:.5f}",
                f"{result['mse_shannon']:.5f}",
                f"{result['excess_db']:.2f}",
            )
        )
    return headers, rows
