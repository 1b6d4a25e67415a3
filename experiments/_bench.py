"""The work behind `experiments.bench`, apart from it: it imports JAX, which a typing error need not wait for."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from omegaconf import DictConfig

import pallas_kernels.bench as kernels
from qjax import codebooks
from qjax.bench import codebook, decode, finetune, matrix, two_sided
from qjax.bench.timing import load_average, surroundings
from qjax.errors import InputError
from qjax.report import Table, aligned
from qjax.runtime.atomic import write_json

from ._entry import plain

__all__ = ["start"]

# Issue 2's target for LDLQ of 4096 x 4096, as a fraction of the machine's own matmul rate.
TARGET = 0.25


def _as_list(value: Any) -> list[Any] | None:
    return value if value is None or isinstance(value, list) else [value]


def _matrix(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    sizes = [matrix.parse_size(text) for text in _as_list(settings["sizes"]) or []]
    cases = [matrix.Case(out, columns, settings["tokens"], settings["bits"]) for out, columns in sizes]
    results = []
    for case in cases:
        print(f"measuring {case}", file=sys.stderr, flush=True)
        results.append(matrix.measure(case, settings["repeats"], settings["least_seconds"]))
    return results


def _codebook(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    results = []
    for book in codebook.available(_as_list(settings["names"]), _as_list(settings["bits"])):
        print(f"measuring {book.spec()['name']} {book.bits:g} bits", file=sys.stderr, flush=True)
        results.append(codebook.measure(book, tuple(settings["shape"]), settings["repeats"]))
    return results


def _two_sided(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    results = []
    if settings["loss_size"] is not None:
        print(f"losses of {settings['seeds']} problems", file=sys.stderr, flush=True)
        book = codebooks.make("trellis", settings["bits"])
        results.append(two_sided.loss_ratios(settings["loss_size"], book, settings["seeds"]))
    for text in _as_list(settings["sizes"]) or []:
        for name in _as_list(settings["names"]) or []:
            print(f"measuring {name} {text}", file=sys.stderr, flush=True)
            book = codebooks.make(name, settings["bits"])
            results.append(two_sided.measure(matrix.parse_size(text), book, settings["repeats"]))
    return results


def _finetune(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    options = {name: settings[name] for name in ("bits", "batch", "length", "repeats", "rank")}
    results = []
    for source in _as_list(settings["models"]) or []:
        print(f"measuring {source}", file=sys.stderr, flush=True)
        results.append(finetune.measure(source, codebook=settings["book"], **options))
    return results


def _decode(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    results = []
    for text in _as_list(settings["sizes"]) or []:
        kinds = [(bits, None) for bits in _as_list(settings["bits"]) or []]
        for bits, code in [*kinds, *((2, code) for code in _as_list(settings["codes"]) or [])]:
            print(f"measuring {text} {code or 'scalar'} {bits} bits", file=sys.stderr, flush=True)
            results.append(decode.matvec(matrix.parse_size(text), bits, code, settings["repeats"]))
    artifacts = settings["artifacts"]
    if not isinstance(artifacts, Mapping):
        artifacts = {str(folder): settings["original"] for folder in _as_list(artifacts) or []}
    for folder, reference in artifacts.items():
        print(f"measuring {folder}", file=sys.stderr, flush=True)
        results.append(decode.model(folder, reference, settings["tokens"], settings["repeats"]))
    return results


def _kernels(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    ring_bytes = settings["ring_mib"] << 20
    record = kernels.run(kernels.Settings(settings["seconds"], settings["quick"], settings["tune"], ring_bytes))
    if record["failed"]:
        reasons = "; ".join(f"{one['what']}: {one['reason']}" for one in record["failed"])
        raise InputError(f"{len(record['failed'])} kernel cases failed: {reasons}")
    return [record]


def _verdict(results: Sequence[Mapping[str, Any]]) -> list[str]:
    steps = {result["size"]: result["steps"] for result in results}
    if "4096x4096" not in steps:
        return []
    whole, alone = (steps["4096x4096"][name]["ratio_to_matmul"] for name in ("ldlq", "ldlq_sweep"))
    return [f"LDLQ 4096x4096 runs at {whole:.2f} of the matmul rate, its sweep alone at {alone:.2f} (target {TARGET})"]


def start(config: DictConfig) -> None:
    """Measure, print a table, and write JSON with `out`."""
    settings = plain(config)
    load = load_average()
    kinds: dict[str, tuple[Callable[..., Any], Any, Callable[..., list[str]], int]] = {
        "matrix": (_matrix, matrix.lines, _verdict, 2),
        "codebook": (_codebook, codebook.lines, lambda _: [], 1),
        "two_sided": (_two_sided, two_sided.lines, lambda _: [], 2),
        "decode": (_decode, decode.lines, decode.verdict, 1),
        "finetune": (_finetune, finetune.lines, lambda _: [], 2),
        "kernels": (_kernels, lambda results: kernels.lines(results[0]), lambda _: [], 2),
    }
    run, lines, verdict, words = kinds[settings["bench"]]
    results = run(settings)
    headers, rows = lines(results)
    print(aligned(Table(headers, tuple(rows), tuple(index >= words for index in range(len(headers))))))
    for line in verdict(results):
        print(line)
    record = {"bench": settings["bench"], "results": results, **surroundings(load)}
    print(f"load average {load[0]:.1f} before, {record['load_average_after'][0]:.1f} after")
    if settings["out"] is not None:
        write_json(settings["out"], record)
        print(f"written: {settings['out']}")
