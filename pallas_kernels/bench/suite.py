"""All kernels on the device at hand: compared with their references, then timed beside dense weights and the limits.

Needs jax alone. Results are written after every case, so that a run that is cut short keeps what it has; what the
time did not allow is listed.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import json
import os
import pathlib
import platform
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import dequant_matmul, gram, hadamard, tuned, viterbi
from pallas_kernels.bench.cases import LAYER, RATE, describe, packed
from pallas_kernels.bench.checks import checks, gram_kernels, search_operands
from pallas_kernels.bench.rooflines import Rooflines, decode_ops, measure, row_ops
from pallas_kernels.bench.timing import HOW, chained, ring
from pallas_kernels.bench.tuning import tune
from pallas_kernels.dequant_matmul import reference
from pallas_kernels.dequant_matmul import specs as products
from pallas_kernels.dequant_matmul.specs import Spec
from pallas_kernels.dispatch import backend
from pallas_kernels.gram import specs as grams
from pallas_kernels.hadamard import reference as hadamard_reference
from pallas_kernels.hadamard import specs as transforms
from pallas_kernels.viterbi import reference as viterbi_reference
from pallas_kernels.viterbi import specs as searches

__all__ = ["Settings", "lines", "run"]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to run.

    Attributes:
      seconds: after which no new case begins.
      quick: the shapes of the tests in place of the benchmarks'.
      tune: try block sizes first, and write the best ones as `tuned.json` beside `out`.
      ring_bytes: of weights that a timing loop cycles through, more than the caches.
      out: the JSON file, None for none.
    """

    seconds: float = 480.0
    quick: bool = False
    tune: bool = False
    ring_bytes: int = 256 << 20
    out: pathlib.Path | None = None


def _dense(shape: tuple[int, int], key: jax.Array) -> jax.Array:
    return jax.random.normal(key, shape[::-1], jnp.bfloat16)


def _times(programs: dict[str, Any]) -> dict[str, Any]:
    return {name: own.to_dict() for name, own in programs.items()}


def _time_product(spec: Spec, limits: Rooflines, settings: Settings) -> dict[str, Any]:
    rate = RATE[backend()]
    x = jax.random.normal(jax.random.key(1), (spec.batch, spec.inner), jnp.bfloat16)
    first = packed(spec, jax.random.key(0))
    weights = ring(functools.partial(packed, spec), first.nbytes, settings.ring_bytes)
    dense_bytes = 2 * spec.out * spec.inner
    dense = ring(functools.partial(_dense, (spec.out, spec.inner)), dense_bytes, settings.ring_bytes)
    timed = {
        "kernel": chained(dequant_matmul.matmul, x, weights, expected=first.nbytes / rate),
        "unfused": chained(reference.matmul, x, weights, expected=4 * dense_bytes / rate),
        "dense": chained(lambda x, w: jnp.matmul(x, w), x, dense, expected=dense_bytes / rate),
    }
    name, ops = dequant_matmul.chosen(spec.batch, jnp.bfloat16, first), {"kernel": decode_ops(first)}
    for other in dequant_matmul.available(spec.batch, jnp.bfloat16, first):
        if other == "mosaic_gpu":
            ops[other] = row_ops(first)
        if other != name or name == "mosaic_gpu":
            own = [dequant_matmul.to_rows(w) for w in weights] if other == "mosaic_gpu" else weights
            step = functools.partial(dequant_matmul.matmul, implementation=other)
            timed[other] = chained(step, x, own, expected=first.nbytes / rate)
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


def _time_layer(code: str | None, bits: int, settings: Settings) -> dict[str, Any]:
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
    timed = {
        "kernel": chained(functools.partial(layer, dequant_matmul.matmul), x, weights, expected=few),
        "dense": chained(functools.partial(layer, jnp.matmul), x, wide, expected=2 * count / rate),
    }
    return {
        "op": "layer",
        "what": f"all products of a Llama-3-8B layer, {code or 'scalar'} {bits} bits, 1 row",
        **_times(timed),
        "tokens_per_second_of_32_layers": {name: 1 / (32 * own.median) for name, own in timed.items()},
        "speedup_over_dense": timed["dense"].median / timed["kernel"].median,
    }


def _time_transform(spec: transforms.Spec, limits: Rooflines, settings: Settings) -> dict[str, Any]:
    moved = 4 * spec.rows * spec.n
    shape = (spec.rows, spec.n)
    rows = ring(lambda key: jax.random.normal(key, shape, jnp.bfloat16), moved // 2, settings.ring_bytes)
    x = jnp.zeros((1, 1), jnp.bfloat16)
    expected = 2 * moved / RATE[backend()]
    timed = {
        name: chained(lambda x, rows, f=f: f(rows + x, spec.block), x, rows, expected=expected)
        for name, f in (("kernel", hadamard.hadamard), ("xla", hadamard_reference.hadamard))
    }
    chosen = hadamard.chosen(spec.block, jnp.bfloat16)
    for name in hadamard.available(spec.block, jnp.bfloat16):
        if name != chosen:
            f = functools.partial(hadamard.hadamard, block=spec.block, implementation=name)
            timed[name] = chained(lambda x, rows, f=f: f(rows + x), x, rows, expected=expected)
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


def _time_search(spec: searches.Spec, settings: Settings) -> dict[str, Any]:
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
    timed = {"kernel": chained(kernel, x, [lut, lut + 1], expected=states / rate, repeats=3)}
    if name != "xla":
        timed["xla"] = chained(xla, x, [lut, lut + 1], expected=10 * states / rate, repeats=3)
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


def _time_gram(spec: grams.Spec, settings: Settings) -> dict[str, Any]:
    """The lower triangle by every kernel and by XLA, beside XLA's whole product: what decides whether it is used."""
    flops = spec.rows * spec.n * (spec.n + 1)
    make = lambda key: jax.random.normal(key, (spec.rows, spec.n), jnp.bfloat16)  # noqa: E731
    rows = ring(make, 2 * spec.rows * spec.n, settings.ring_bytes)
    expected = flops / (1e11 if backend() == "cpu" else 3e14)
    x, names = jnp.zeros((1, 1), jnp.bfloat16), gram_kernels(jnp.bfloat16)
    steps: dict[str, Callable[[Any], Any]] = {name: functools.partial(gram.gram, implementation=name) for name in names}
    steps["dense"] = lambda x: jnp.matmul(x.T, x, preferred_element_type=jnp.float32)
    timed = {name: chained(lambda x, w, f=f: f(w + x), x, rows, expected=expected) for name, f in steps.items()}
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


def _benches(settings: Settings, limits: Rooflines) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
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
    for search in searches.TESTS[:1] if quick else searches.BENCHES[:2]:
        yield f"viterbi {search}", functools.partial(_time_search, search, settings)
    if not quick:
        for code, bits in ((None, 2), ("mul1", 2), (None, 4)):
            yield f"layer {code or 'scalar'} {bits} bits", functools.partial(_time_layer, code, bits, settings)
    for triangle in grams.TESTS[:1] if quick else grams.BENCHES:
        yield f"gram {triangle}", functools.partial(_time_gram, triangle, settings)
    for transform in transforms.TESTS[:1] if quick else transforms.BENCHES:
        yield f"hadamard {transform}", functools.partial(_time_transform, transform, limits, settings)
    yield from (product(spec) for spec in own if spec not in square)
    if not quick:
        for search in searches.BENCHES[2:]:
            yield f"viterbi {search}", functools.partial(_time_search, search, settings)


def _surroundings() -> dict[str, Any]:
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
        "python": platform.python_version(),
        "host": platform.machine(),
        "how": HOW,
    }


def run(settings: Settings) -> dict[str, Any]:
    """All checks and as many benchmarks as the time allows.

    `record["failed"]` names checks beyond their limit and cases that raised; `record["left_out"]` what time forbade.
    """
    begun = time.monotonic()
    until = begun + settings.seconds
    record: dict[str, Any] = {**_surroundings(), "checks": [], "benches": [], "failed": [], "left_out": []}

    def save() -> None:
        record["seconds"] = time.monotonic() - begun
        if settings.out is not None:
            new = settings.out.with_name(f".{settings.out.name}.{os.getpid()}")
            new.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
            new.replace(settings.out)

    for what, check in checks():
        if time.monotonic() > until:
            record["left_out"].append(what)
            continue
        try:
            name, error, limit = check()
        except Exception as raised:
            record["failed"].append({"what": what, "reason": f"{type(raised).__name__}: {raised}"[:500]})
            print(f"FAILED {what}: {type(raised).__name__}", flush=True)
            continue
        known = {"what": what, "implementation": name, "error": min(error, 1e300), "limit": limit}
        record["checks"].append(known)
        if not error <= limit:
            record["failed"].append({"what": what, "reason": f"error {error:.2e}, at most {limit:.0e}"})
            print(f"FAILED {what}: {name}, error {error:.2e}, at most {limit:.0e}", flush=True)
    passed = len(record["checks"]), len(record["failed"]), time.monotonic() - begun
    print("{} checks, {} failed, {:.0f} s".format(*passed), flush=True)
    save()
    if settings.tune:
        record["tuned"] = tune(settings.ring_bytes, begun, begun + 0.6 * settings.seconds)
        for operation, best in record["tuned"].items():
            tuned.adopt(operation, best)
            if settings.out is not None:
                tuned.store(operation, best, tuned.device_kind(), settings.out.with_name("tuned.json"))
        save()
    big = backend() != "cpu" and not settings.quick
    limits = measure(1 << 30 if big else 1 << 22, 1 << 26 if big else 1 << 16)
    record["rooflines"] = dataclasses.asdict(limits)
    for what, bench in _benches(settings, limits):
        if time.monotonic() > until:
            record["left_out"].append(what)
            continue
        try:
            result = bench()
        except Exception as raised:
            record["failed"].append({"what": what, "reason": f"{type(raised).__name__}: {raised}"[:500]})
            print(f"FAILED {what}: {type(raised).__name__}", flush=True)
            continue
        result["measured_on"] = f"{record['device']}, jax {record['jax']}"
        record["benches"].append(result)
        print(f"{result['what']}: {result['kernel']['microseconds_median']:.1f} µs", flush=True)
        save()
    save()
    return record


def lines(record: dict[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """(headers, rows) of the benchmarks, for printing."""
    headers = ("what", "runs on", "µs", "dense µs", "unfused µs", "limit µs", "of limit", "note", "measured on")
    rows = []
    for result in record["benches"]:
        micro = lambda name, result=result: (  # noqa: E731
            f"{result[name]['microseconds_median']:.1f}" if name in result else ""
        )
        limit = result.get("roofline_microseconds")
        rates = result.get("state_evaluations_per_second")
        notes = [] if rates is None else [f"{rates['kernel']:.2e} states/s"]
        if "integer_ops_per_weight" in result:
            allowed = result["instructions"]["budget_per_weight"]
            notes = [
                f"{result['integer_ops_per_weight']:.1f} integer operations a weight, {allowed:.2f} in the bytes' time"
            ]
        others = [name for name in ("pallas_gpu", "mosaic_gpu") if name in result and name != result["implementation"]]
        notes += [f"{name} {micro(name)} µs" for name in others]
        rows.append(
            (
                result["what"],
                result.get("implementation", ""),
                micro("kernel"),
                micro("dense"),
                micro("unfused") or micro("xla"),
                "" if limit is None else f"{max(limit.values()):.1f}",
                f"{result['of_roofline']:.2f}" if "of_roofline" in result else "",
                "; ".join(notes),
                result.get("measured_on", ""),
            )
        )
    return headers, rows
