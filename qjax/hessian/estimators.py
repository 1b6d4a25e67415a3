"""Hessian estimators: frozen dataclasses whose fields are the options of `hessian=`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar

import numpy as np
from jax.sharding import Mesh

from qjax.linalg.kronecker import Hessian
from qjax.registry import Count, Natural, OneOf, Positive, Registry, Share, check_options

__all__ = ["ESTIMATORS", "Estimator", "Moments", "SketchA", "SketchB"]


@dataclasses.dataclass(frozen=True)
class Estimator:
    """What all estimators have in common.

    Attributes:
      stream: whose activations calibrate a block: "original", the original model's, whose Hessians are kept in the
        cache and shared by every run on the same model and tokens (QuIP#, QTIP); "quantized", what the quantised blocks
        before it produce (GPTQ, QuIP); "corrected", as quantized, and every block's targets make up for the errors of
        the blocks before it (QEP, GPTAQ): V = W + s W (C − H) H⁻¹, at twice the calibration time.
      batch: sequences per step.
      correction: the share s of the least-squares correction; 1 fits the calibration text fully. Of stream=corrected.
      sequences: of the calibration, from the first on; None is all of them. Of stream=original.
      routing: what an expert's input factor is made of: the tokens "routed" to it, "all", or a "blend" of both (see
        `qjax.hessian.experts`). Of mixtures of experts.
      expert_tokens: an expert that saw fewer shrinks towards the factor of all tokens; None is twice as many as its
        matrix has inputs. Of mixtures of experts.
      fit_sequences: evaluation sequences on which the cosine with the true Fisher and an error bound are measured. Of
        stream=original.
    """

    name: ClassVar[str]
    stream: Annotated[str, OneOf("original", "quantized", "corrected")] = "original"
    batch: Count = 8
    correction: Share = 0.5
    sequences: Count | None = None
    fit_sequences: Natural = 0
    routing: Annotated[str, OneOf("routed", "all", "blend")] = "routed"
    expert_tokens: Natural | None = None

    def __post_init__(self) -> None:
        """Check the options. Raises InputError for a value of another kind or out of its range."""
        check_options(self, "hessian")

    def collect(
        self, model: Any, tokens: np.ndarray, *, progress: Callable[[int, int], None], mesh: Mesh | None = None
    ) -> Mapping[str, Hessian]:
        """The Hessian of every linear of `model` (config, params) by name, "layers.0.self_attn.q_proj".

        An estimator of a user's own defines it; those of this room are collected block by block into the store.
        `tokens` [sequences, length]; `progress(done, total)`. Layers that share an array are stored once.
        """
        raise NotImplementedError(f"{self.name} is collected by qjax.hessian.collect")

    @property
    def collects(self) -> bool:
        """Whether the estimator brings its own `collect`."""
        return type(self).collect is not Estimator.collect

    def text(self) -> str:
        """All that identifies what an own `collect` gives, for the store's key: the name and its own options."""
        common = {field.name for field in dataclasses.fields(Estimator)} - {"batch"}
        own = {key: value for key, value in dataclasses.asdict(self).items() if key not in common}
        return f"{self.name}:" + ":".join(f"{key}={value}" for key, value in sorted(own.items()))


ESTIMATORS: Registry[Estimator] = Registry("Hessian estimator", "qjax.hessian.ESTIMATORS")


@ESTIMATORS.register("input")
@dataclasses.dataclass(frozen=True)
class Moments(Estimator):
    """The second moment of the inputs, `H_in = E[x xᵀ]`, uncentred. Source: GPTQ (2210.17323)."""

    name: ClassVar[str] = "input"


@dataclasses.dataclass(frozen=True)
class _Sketched(Estimator):
    """What both sketches have in common.

    Attributes:
      batch: sequences per step; sampling labels needs 12 bytes × batch × length × vocabulary.
      labels: "sampled" from the model's own softmax (the true Fisher), "data" (the empirical Fisher).
      seed: of the labels.
      compute: dtype of activations, gradients and operands of products (sums stay float32); bfloat16 for devices that
        multiply it faster.
      input: "sketch", or "moment": E[x xᵀ] as input factor, of the stream; the sketch then gives H_out only.
      budget_gb: sums held at once; a pass is repeated for every range of blocks that this makes necessary.
      checkpoint_s: seconds between checkpoints of a collection.
    """

    batch: Count = 4
    labels: Annotated[str, OneOf("sampled", "data")] = "sampled"
    seed: Natural = 0
    compute: Annotated[str, OneOf("float32", "bfloat16")] = "float32"
    input: Annotated[str, OneOf("sketch", "moment")] = "sketch"
    budget_gb: Positive = 8.0
    checkpoint_s: Positive = 600.0


@ESTIMATORS.register("sketch_a")
@dataclasses.dataclass(frozen=True)
class SketchA(_Sketched):
    """YAQA's sketch A (2505.22988): both factors of `H ≈ H_out ⊗ H_in`, tokens taken as independent.

    Attributes:
      rounds: half-steps of the power iteration, E[x xᵀ] being the first: 2 adds H_out, 3 renews H_in, ...
    """

    name: ClassVar[str] = "sketch_a"
    rounds: Count = 2


@ESTIMATORS.register("sketch_b")
@dataclasses.dataclass(frozen=True)
class SketchB(_Sketched):
    """YAQA's sketch B (2505.22988): both factors of `H ≈ H_out ⊗ H_in` from gradients of whole sequences.

    Attributes:
      rounds: passes over the data, from the identity.
      prefixes: sizes such as [192, 384]: the same pass also stores their sketches, for runs with that many `sequences`.
    """

    name: ClassVar[str] = "sketch_b"
    rounds: Count = 1
    prefixes: tuple[Count, ...] = ()
