"""Decoding: one row times a packed matrix, and tokens per second of a whole model, beside the dense ones in turns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.bench.cases import packed as random_matrix
from pallas_kernels.dequant_matmul import matmul
from pallas_kernels.dequant_matmul.specs import Spec
from qjax import models
from qjax.bench.timing import compiled, interleaved
from qjax.errors import InputError
from qjax.interchange import artifact
from qjax.matrix.kernel_layout import PackedLinear, pack_model
from qjax.models.kv_cache import empty_cache, step
from qjax.models.linear import linears_of
from qjax.models.sampling import Sampling, next_token
from qjax.models.transformer import embed, head

__all__ = ["lines", "matvec", "model", "verdict"]

_COPIES = 8  # of every matrix, multiplied one after the other: a model's weights are not in the caches either


def matvec(size: tuple[int, int], bits: int, code: str | None, repeats: int = 5) -> dict[str, Any]:
    """Seconds of `x Wᵀ` for one row of float32 x: a scalar grid, or a `code` (e8p, a trellis with L = 16), and dense.

    Raises InputError for fewer than one repeat.
    """
    if repeats < 1:
        raise InputError(f"repeats is {repeats}; at least 1 is needed")
    out, inner = size
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, inner), np.float32)

    def packed() -> Any:
        spec = Spec(bits, 1, out, inner, None, code)
        return random_matrix(spec, jax.random.key(int(rng.integers(2**31))))

    def dense() -> Any:
        return jax.device_put(rng.standard_normal((out, inner), np.float32))

    kinds = {
        "packed": ([packed() for _ in range(_COPIES)], matmul),
        "dense": ([dense() for _ in range(_COPIES)], lambda x, w: jnp.einsum("bi,oi->bo", x, w)),
    }
    programs = {}
    for name, (weights, product) in kinds.items():

        def chain(x: Any, weights: Any, product: Any = product) -> Any:
            return [product(x, weight) for weight in weights]

        programs[name] = compiled(chain, x, weights)
    timings = interleaved({name: program.call for name, program in programs.items()}, repeats, least_seconds=0.2)
    return {
        "what": f"{'scalar' if code is None else code} {bits} bits {out}x{inner}",
        "copies": _COPIES,
        "seconds": {name: timing.to_dict() for name, timing in timings.items()},
        "seconds_per_product": {name: timing.median / _COPIES for name, timing in timings.items()},
        "bytes": {"packed": kinds["packed"][0][0].nbytes, "dense": 4 * out * inner},
        "speedup": timings["packed"].relative(timings["dense"]),
        "asked": {"speedup": 1.5} if (bits, code, size) == (4, None, (4096, 4096)) else None,
    }


def model(folder: str, reference: str, tokens: int = 32, repeats: int = 3) -> dict[str, Any]:
    """Seconds per token of an artifact with packed weights and of its dense float32 original, both with a full cache.

    Raises InputError for fewer than one token or repeat, and when no matrix of the artifact has a packed layout.
    """
    if min(tokens, repeats) < 1:
        raise InputError(f"tokens is {tokens} and repeats {repeats}; at least 1 is needed")
    quantized, original = artifact.load(folder), models.load(reference)
    kinds = {"packed": jax.device_put(pack_model(quantized.params)), "dense": jax.device_put(original.params)}
    sizes = {name: _linear_bytes(params) for name, params in kinds.items()}
    count = sum(isinstance(leaf, PackedLinear) for leaf in _linears(kinds["packed"]))
    if not count:
        raise InputError(f"{folder}: none of its matrices has a layout for the kernels; nothing to measure")
    calls = {name: _decoder(params, original.config, tokens) for name, params in kinds.items()}
    timings = interleaved(calls, repeats, least_seconds=0.0)
    return {
        "what": f"{original.name}, {tokens} tokens",
        "artifact": quantized.fingerprint,
        "packed_matrices": count,
        "seconds": {name: timing.to_dict() for name, timing in timings.items()},
        "tokens_per_second": {name: tokens / timing.median for name, timing in timings.items()},
        "bytes": sizes,
        "speedup": timings["packed"].relative(timings["dense"]),
        "asked": {"speedup": 1.0, "memory": 0.25},
    }


def verdict(results: Sequence[dict[str, Any]]) -> list[str]:
    """Targets of decoding on a CPU, one line each: a speed-up, and for a model a share of the weights' bytes."""
    found = []
    for result in results:
        asked = result["asked"]
        if asked is None:
            continue
        share = result["bytes"]["packed"] / result["bytes"]["dense"]
        met = result["speedup"] >= asked["speedup"] and share <= asked.get("memory", 1.0)
        memory = f", {share:.3f} of its weights' bytes (asked: at most {asked['memory']})" if "memory" in asked else ""
        found.append(
            f"{result['what']}: {result['speedup']:.2f} times the speed of dense float32 "
            f"(asked: at least {asked['speedup']}){memory}: {'reached' if met else 'NOT reached'}"
        )
    return found


def _linears(params: Any) -> list[Any]:
    return [weight for parameters in params["blocks"] for weight in linears_of(parameters).values()]


def _linear_bytes(params: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(_linears(params)))


def _decoder(params: Any, config: models.ModelConfig, tokens: int) -> Any:
    """A function that decodes `tokens` tokens greedily, after one step that compiles everything."""
    top = head(params)
    sampling = Sampling()

    def run(count: int = tokens) -> Any:
        cache, token = empty_cache(config, 1, min(64, config.max_positions)), np.zeros(1, np.int32)
        for position in range(count):
            at = np.full(1, position % min(64, config.max_positions), np.int32)
            x, cache = step(params["blocks"], embed(params["embed"], token[:, None], config, at), cache, at, config)
            token = np.asarray(next_token(top, x, np.zeros(1, np.int32), np.int32(position), config, sampling))
        return token

    run(1)
    return run


def lines(results: Sequence[dict[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """(headers, rows) for printing."""
    headers = ("what", "packed ms", "dense ms", "speedup", "packed MiB", "dense MiB")
    rows = []
    for result in results:
        each = result.get("seconds_per_product")
        if each is None:
            each = {name: 1 / rate for name, rate in result["tokens_per_second"].items()}
        sizes = {name: size / 2**20 for name, size in result["bytes"].items()}
        rows.append(
            (
                result["what"],
                f"{1e3 * each['packed']:.3f}",
                f"{1e3 * each['dense']:.3f}",
                f"{result['speedup']:.2f}",
                f"{sizes['packed']:.1f}",
                f"{sizes['dense']:.1f}",
            )
        )
    return headers, rows
