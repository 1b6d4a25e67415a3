"""The benchmarks: every operation beside dense weights, XLA and the limits of the device."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Generator, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import dequant_matmul, gram, hadamard, viterbi
from pallas_kernels.bench.cases import LAYER, RATE, describe, packed
from pallas_kernels.bench.checks import gram_kernels, search_operands
from pallas_kernels.bench.rooflines import Rooflines, decode_ops, kernel_ops, row_ops
from pallas_kernels.bench.settings import Settings
from pallas_kernels.bench.timing import Measured, busy_seconds, prepared, ring
from pallas_kernels.dequant_matmul import reference
from pallas_kernels.dequant_matmul import specs as products
from pallas_kernels.dequant_matmul.specs import Spec
from pallas_kernels.dispatch import backend
from pallas_kernels.gram import specs as grams
from pallas_kernels.hadamard import reference as hadamard_reference
from pallas_kernels.hadamard import specs as transforms
from pallas_kernels.viterbi import reference as viterbi_reference
from pallas_kernels.viterbi import specs as searches

__all__ = ["Case", "benches"]


def _dense(shape: tuple[int, int], key: jax.Array) -> jax.Array:
    return jax.random.normal(key, shape[::-1], jnp.bfloat16)


def _times(programs: dict[str, Measured]) -> dict[str, Any]:
    found = {name: own.to_dict() for name, own in programs.items()}
    if backend() == "gpu":
        for name, seconds in busy_seconds(programs).items():
            found[name]["busy_microseconds"] = seconds * 1e6
    return found


Case = Generator[None, None, dict[str, Any]]
"""A benchmark: up to its only `yield` it compiles, side by side with others, then it measures alone and returns.

XLA chooses its own matrix products by timing them: those are compiled after the `yield`.
"""


def _measured(programs: dict[str, Callable[[], Measured]]) -> dict[str, Measured]:
    return {name: measure() for name, measure in programs.items()}


def _time_product(spec: Spec, limits: Rooflines, settings: Settings) -> Case:
    rate = RATE[backend()]
    x = jax.random.normal(jax.random.key(1), (spec.batch, spec.inner), jnp.bfloat16)
    first = packed(spec, jax.random.key(0))
    weights = ring(functools.partial(packed, spec), first.nbytes, settings.ring_bytes)
    dense_bytes = 2 * spec.out * spec.inner
    dense = ring(functools.partial(_dense, (spec.out, spec.inner)), dense_bytes, settings.ring_bytes)
    programs = {
        "kernel": prepared(dequant_matmul.matmul, x, weights, expected=first.nbytes / rate),
        "unfused": prepared(reference.matmul, x, weights, expected=4 * dense_bytes / rate),
    }
    name = dequant_matmul.chosen(spec.batch, jnp.bfloat16, first)
    ops = {"kernel": kernel_ops(x, first) if name == "pallas_gpu" else decode_ops(first)}
    for other in dequant_matmul.available(spec.batch, jnp.bfloat16, first):
        if other == "mosaic_gpu":
            ops[other] = row_ops(first)
            if name != other and spec not in products.MOSAIC_BENCHES:
                continue  # it takes long to compile
        if other != name or name == "mosaic_gpu":
            own = [dequant_matmul.to_rows(w) for w in weights] if other == "mosaic_gpu" else weights
            step = functools.partial(dequant_matmul.matmul, implementation=other)
            programs[other] = prepared(step, x, own, expected=first.nbytes / rate)
    yield
    programs["dense"] = prepared(lambda x, w: jnp.matmul(x, w), x, dense, expected=dense_bytes / rate)
    timed = _measured(programs)
    if name == "mosaic_gpu":  # as it runs on a matrix that was prepared
        timed["kernel"], ops["kernel"] = timed["mosaic_gpu"], ops["mosaic_gpu"]
    activations = 2 * spec.batch * (spec.out + spec.inner)
    moved = first.nbytes + activations
    of_bytes = moved / limits.bytes_per_second
    of_ops = ops["kernel"]["integer_ops_per_weight"] * spec.out * spec.inner / limits.integer_ops_per_second
    seconds = timed["kernel"].median
    return {
        "op": "dequant_matmul",
        "what": describe(spec),
        "spec": dataclasses.asdict(spec),
        "implementation": name,
        **_times(timed),
        "bytes": moved,
        **ops["kernel"],
        "instructions": {
            "per_weight": ops,
            "counted": "in the traced program, before any compiler",
            "budget_per_weight": limits.integer_ops_per_second * spec.bits / 8 / limits.bytes_per_second,
        },
        "roofline_microseconds": {"bytes": of_bytes * 1e6, "integer_ops": of_ops * 1e6},
        "of_roofline": max(of_bytes, of_ops) / seconds,
        "speedup_over_dense": timed["dense"].median / seconds,
        "speedup_over_unfused": timed["unfused"].median / seconds,
    }


def _time_layer(code: str | None, bits: int, settings: Settings) -> Case:
    """The seven products of a Llama-3-8B layer one after the other, the feed-forward's product between them."""
    shapes = {name: Spec(bits, 1, out, inner, None, code) for name, (out, inner) in LAYER.items()}
    count = sum(out * inner for out, inner in LAYER.values())
    x = jax.random.normal(jax.random.key(1), (1, 4096), jnp.bfloat16)

    def layer(product: Any, x: Any, w: Any) -> Any:
        q, k, v = (product(x, w[name]) for name in "qkv")
        x = product(q + jnp.tile(k + v, 4), w["o"])
        return product(jax.nn.silu(product(x, w["gate"])) * product(x, w["up"]), w["down"])

    def quantised(key: jax.Array) -> Any:
        return {name: packed(spec, key) for name, spec in shapes.items()}

    def dense(key: jax.Array) -> Any:
        return {name: _dense(shape, key) / np.float32(shape[1]).astype(jnp.bfloat16) for name, shape in LAYER.items()}

    rate = RATE[backend()]
    weights = ring(quantised, count * bits // 8, settings.ring_bytes)
    wide = ring(dense, 2 * count, settings.ring_bytes)
    few = count * bits / 8 / rate
    programs = {
        "kernel": prepared(functools.partial(layer, dequant_matmul.matmul), x, weights, expected=few),
    }
    yield
    programs["dense"] = prepared(functools.partial(layer, jnp.matmul), x, wide, expected=2 * count / rate)
    timed = _measured(programs)
    return {
        "op": "layer",
        "what": f"all products of a Llama-3-8B layer, {code or 'scalar'} {bits} bits, 1 row",
        **_times(timed),
        "tokens_per_second_of_32_layers": {name: 1 / (32 * own.median) for name, own in timed.items()},
        "speedup_over_dense": timed["dense"].median / timed["kernel"].median,
    }


def _time_transform(spec: transforms.Spec, limits: Rooflines, settings: Settings) -> Case:
    moved = 4 * spec.rows * spec.n
    shape = (spec.rows, spec.n)
    rows = ring(lambda key: jax.random.normal(key, shape, jnp.bfloat16), moved // 2, settings.ring_bytes)
    x = jnp.zeros((1, 1), jnp.bfloat16)
    expected = 2 * moved / RATE[backend()]
    programs = {
        name: prepared(lambda x, rows, f=f: f(rows + x, spec.block), x, rows, expected=expected)
        for name, f in (("kernel", hadamard.hadamard), ("xla", hadamard_reference.hadamard))
    }
    chosen = hadamard.chosen(spec.block, jnp.bfloat16)
    for name in hadamard.available(spec.block, jnp.bfloat16):
        if name != chosen:
            f = functools.partial(hadamard.hadamard, block=spec.block, implementation=name)
            programs[name] = prepared(lambda x, rows, f=f: f(rows + x), x, rows, expected=expected)
    yield
    timed = _measured(programs)
    limit = moved / limits.bytes_per_second
    return {
        "op": "hadamard",
        "what": f"hadamard of {spec.block}, {spec.rows}x{spec.n}",
        "spec": dataclasses.asdict(spec),
        "implementation": chosen,
        **_times(timed),
        "bytes": moved,
        "instructions": {
            "multiply_adds_per_value": sum(hadamard.factors(spec.block)),
            "counted": "by formula: the orders of the two factors",
        },
        "roofline_microseconds": {"bytes": limit * 1e6},
        "of_roofline": limit / timed["kernel"].median,
        "speedup_over_xla": timed["xla"].median / timed["kernel"].median,
    }


def _time_search(spec: searches.Spec, settings: Settings) -> Case:
    x, lut, cost = search_operands(spec)
    states = spec.steps * spec.batch * 2**spec.L
    name = viterbi.chosen(2**spec.L, spec.b)

    def kernel(x: Any, lut: Any) -> Any:
        least, _, path = viterbi.search(x, lut, spec.b, cost)
        return least + path[0].astype(jnp.float32) * 1e-30

    def xla(x: Any, lut: Any) -> Any:
        least, _, path = viterbi_reference.search(x, lut, spec.b, cost, None)
        return least + path[0].astype(jnp.float32) * 1e-30

    rate = 5e11 if backend() == "gpu" else 2e8
    programs = {"kernel": prepared(kernel, x, [lut, lut + 1], expected=states / rate, repeats=3)}
    if name != "xla":
        programs["xla"] = prepared(xla, x, [lut, lut + 1], expected=10 * states / rate, repeats=3)
    yield
    timed = _measured(programs)
    return {
        "op": "viterbi",
        "what": f"trellis encode L={spec.L} {spec.b} bits a step V={spec.V}, {spec.batch} x {spec.steps} steps",
        "spec": dataclasses.asdict(spec),
        "implementation": name,
        **_times(timed),
        "instructions": {
            "ops_per_state": 3 * spec.V + 2,
            "counted": "by formula: V differences, V products, V sums, a minimum and a choice",
        },
        "state_evaluations_per_second": {key: states / own.median for key, own in timed.items()},
        "weights_per_second": {key: spec.steps * spec.V * spec.batch / own.median for key, own in timed.items()},
    }


def _time_gram(spec: grams.Spec, settings: Settings) -> Case:
    """The lower triangle by every kernel and by XLA, beside XLA's whole product; decides whether it is used."""
    flops = spec.rows * spec.n * (spec.n + 1)
    make = lambda key: jax.random.normal(key, (spec.rows, spec.n), jnp.bfloat16)  # noqa: E731
    rows = ring(make, 2 * spec.rows * spec.n, settings.ring_bytes)
    expected = flops / (1e11 if backend() == "cpu" else 3e14)
    x, names = jnp.zeros((1, 1), jnp.bfloat16), gram_kernels(jnp.bfloat16)
    steps: dict[str, Callable[[Any], Any]] = {name: functools.partial(gram.gram, implementation=name) for name in names}
    programs = {name: prepared(lambda x, w, f=f: f(w + x), x, rows, expected=expected) for name, f in steps.items()}
    yield
    whole = lambda x: jnp.matmul(x.T, x, preferred_element_type=jnp.float32)  # noqa: E731
    programs["dense"] = prepared(lambda x, w: whole(w + x), x, rows, expected=expected)
    timed = _measured(programs)
    timed["kernel"] = timed[names[0]]
    return {
        "op": "gram",
        "what": f"lower triangle of {spec.n}x{spec.n} from {spec.rows} rows",
        "spec": dataclasses.asdict(spec),
        "implementation": names[0],
        **_times(timed),
        "instructions": {"multiply_adds": flops // 2, "counted": "by formula: rows n (n + 1) / 2"},
        "speedup_over_dense": timed["dense"].median / timed["kernel"].median,
    }


def benches(settings: Settings, limits: Rooflines) -> Iterator[tuple[str, Callable[[], Case]]]:
    """The numbers that are asked for first, then the rest."""
    quick = settings.quick
    own = (
        [*products.TESTS[:2], products.TRELLIS_TESTS[1], products.TABLE_TESTS[0], products.TABLE_TESTS[3]]
        if quick
        else [*products.BENCHES, *products.TRELLIS_BENCHES, *products.TABLE_BENCHES]
    )
    square = [s for s in own if (s.out, s.inner, s.batch, s.group) == (8192, 8192, 1, None)]
    product = lambda spec: (describe(spec), functools.partial(_time_product, spec, limits, settings))  # noqa: E731
    yield from map(product, square)
    if not quick:
        for code, bits in ((None, 2), ("mul1", 2), (None, 4)):
            yield f"layer {code or 'scalar'} {bits} bits", functools.partial(_time_layer, code, bits, settings)
    several = [s for s in own if (s.out, s.inner, s.batch) == (8192, 8192, 16)]
    yield from map(product, several)
    for search in searches.TESTS[:1] if quick else searches.BENCHES[:2]:
        yield f"viterbi {search}", functools.partial(_time_search, search, settings)
    for transform in transforms.TESTS[:1] if quick else transforms.BENCHES:
        yield f"hadamard {transform}", functools.partial(_time_transform, transform, limits, settings)
    for triangle in grams.TESTS[:1] if quick else grams.BENCHES:
        yield f"gram {triangle}", functools.partial(_time_gram, triangle, settings)
    yield from (product(spec) for spec in own if spec not in (*square, *several))
    if not quick:
        for search in searches.BENCHES[2:]:
            yield f"viterbi {search}", functools.partial(_time_search, search, settings)
