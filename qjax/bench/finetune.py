"""One tuning step of a quantised model beside the same step of the dense model.

    dense        the original weights frozen, norms tuned: what a step costs without codes
    dense_all    the same with every weight of the blocks trained
    e2e          gains and norms over matrices that were decoded once
    dense_lora   adapters over the original weights
    lora         adapters over codes that are decoded in the forward and again in the backward pass

`ratio_to_same` is the ratio to the same step on the dense model: of `e2e` to `dense`, of `lora` to `dense_lora`.
All steps have the same loss (next token), batch, rematerialisation and optimiser.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from qjax import codebooks, finetune, incoherence, models, rounding
from qjax.bench.timing import compiled, interleaved
from qjax.codebooks.base import Codebook
from qjax.finetune import lora
from qjax.finetune.loop import train_step
from qjax.linalg.kronecker import Hessian
from qjax.matrix.quantize import quantize_matrix
from qjax.models.linear import linears_of, replace_linears

__all__ = ["lines", "measure"]

_NORMS = (finetune.RateRule("norm$", 1e-3), finetune.RateRule(".", None))
_RULES = {
    "dense": _NORMS,
    "dense_all": (finetune.RateRule("norm$|weight$", 1e-3), finetune.RateRule(".", None)),
    "e2e": (finetune.RateRule("norm$|_gain$", 1e-3), finetune.RateRule(".", None)),
    "dense_lora": (finetune.RateRule("lora_[ab]$", 1e-3), finetune.RateRule(".", None)),
    "lora": (finetune.RateRule("lora_[ab]$", 1e-3), finetune.RateRule(".", None)),
}
_SAME = {"dense": "dense", "dense_all": "dense_all", "e2e": "dense", "dense_lora": "dense_lora", "lora": "dense_lora"}


def _rounded(params: Any, codebook: Codebook) -> Any:
    """Every linear rounded to the nearest codewords; the time of a step does not depend on how good they are."""
    blocks = []
    for index, block in enumerate(params["blocks"]):
        found = {}
        for linear, weight in linears_of(block).items():
            found[linear] = quantize_matrix(
                weight,
                Hessian(np.eye(weight.shape[1], dtype=np.float32)),
                codebook=codebook,
                rounding=rounding.make("nearest"),
                incoherence=incoherence.make("hadamard"),
                key=jax.random.key(0),
                name=f"layers.{index}.{linear}",
            )[0]
        blocks.append(replace_linears(block, found))
    return {**params, "blocks": blocks}


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def measure(
    source: str, *, codebook: str, bits: float, batch: int, length: int, repeats: int, rank: int = 8
) -> dict[str, Any]:
    """Seconds, temporary memory and argument memory of every step; `ratio_to_dense` is the median over rounds."""
    model = models.load(source)
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (1, batch, length)).astype(np.int32)
    rounded = _rounded(model.params, codebooks.make(codebook, bits))
    variants = {
        "dense": model.params,
        "dense_all": model.params,
        "e2e": rounded,
        "dense_lora": lora.adapted(model.params, jax.random.key(1), rank, dense=True),
        "lora": lora.adapted(rounded, jax.random.key(1), rank),
    }
    programs, held = {}, {}
    for name, params in variants.items():
        view = finetune.view(params, finetune.assign(_RULES[name], finetune.tunable(params)))
        optimizer = finetune.Optimizer(steps=100)
        state = {"tuned": view.tuned, "optimizer": optimizer.init(view.tuned)}
        step = functools.partial(
            train_step,
            layout=view.layout,
            config=model.config,
            options=finetune.Options(loss="next_token"),
            optimizer=optimizer,
        )

        def call(state: Any, frozen: Any, rates: Any, tokens: Any, step: Any = step) -> Any:
            return step(state, frozen, rates, tokens, {}, None)

        programs[name] = compiled(call, state, view.frozen, view.rates, tokens)
        held[name] = _bytes((state, view.frozen))
    timings = interleaved({name: program.call for name, program in programs.items()}, repeats)
    steps = {
        name: {
            **timings[name].to_dict(),
            "ratio_to_dense": 1 / timings[name].relative(timings["dense"]),
            "ratio_to_same": 1 / timings[name].relative(timings[_SAME[name]]),
            "temporary_bytes": program.temporary_bytes,
            "argument_bytes": held[name],
            "compile_seconds": program.compile_seconds,
        }
        for name, program in programs.items()
    }
    case = {"model": model.name, "codebook": codebook, "bits": bits, "batch": batch, "length": length, "rank": rank}
    return {**case, "steps": steps}


def lines(results: Sequence[dict[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """(headers, rows) for printing."""
    headers = ("model", "step", "seconds", "min–max", "of dense", "of same", "held MiB", "temporary MiB")
    rows = []
    for result in results:
        for name, step in result["steps"].items():
            temporary = step["temporary_bytes"]
            rows.append(
                (
                    result["model"],
                    name,
                    f"{step['seconds_median']:.3f}",
                    f"{step['seconds_min']:.3f}–{step['seconds_max']:.3f}",
                    f"{step['ratio_to_dense']:.2f}",
                    f"{step['ratio_to_same']:.2f}",
                    f"{step['argument_bytes'] / 2**20:.0f}",
                    "?" if temporary is None else f"{temporary / 2**20:.0f}",
                )
            )
    return headers, rows
