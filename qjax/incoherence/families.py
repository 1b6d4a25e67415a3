"""Incoherence processing: families of random transforms that leave no entry of a weight or Hessian standing out."""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float16, Key

from qjax.errors import InputError
from qjax.incoherence.rotations import Rotation, SignedHadamard, TwoStageOrthogonal
from qjax.incoherence.transform import Transform, widened
from qjax.linalg.hadamard import MAX_BASE, hadamard_factor, next_hadamard_order
from qjax.linalg.orthogonal import balanced_factors
from qjax.registry import Count, OneOf, Registry, check_options

__all__ = [
    "INCOHERENCE",
    "BlockHadamard",
    "Folded",
    "Hadamard",
    "Incoherence",
    "Kronecker",
    "NoIncoherence",
    "Transform",
    "diagonal_rescale",
    "hessian_incoherence",
    "make",
    "weight_incoherence",
]

_FLOOR = 1e-8  # QuIP's clamp of both diagonals, relative to their largest value


def diagonal_rescale(weight: Float[Array, "m n"], hessian: Float[Array, "inputs inputs"]) -> Float16[Array, " n"]:
    """`s_j ∝ (H_jj / Σ_i W_ij²)^¼`, which minimises `tr(D⁻¹ H D⁻¹) ‖W D‖_F²` over diagonal D = diag(s).

    Both diagonals are clamped at 1e-8 of their largest value, so s spans at most 1e4, and s has geometric mean 1 (its
    scale cancels), which float16 holds. Raises InputError when the shapes disagree. Source: QuIP (2307.13304), section
    4 and appendix.
    """
    n = weight.shape[1]
    if hessian.shape != (n, n):
        raise InputError(
            f"the Hessian has shape {list(hessian.shape)}; rescaling a weight {list(weight.shape)} needs [{n}, {n}]"
        )

    def log_clamped(diagonal: Array) -> Array:
        top = jnp.max(diagonal)
        return jnp.log(jnp.maximum(diagonal / jnp.where(top > 0, top, 1), _FLOOR))

    log_scale = (
        log_clamped(jnp.diagonal(widened(hessian))) - log_clamped(jnp.sum(jnp.square(widened(weight)), axis=0))
    ) / 4
    return jnp.exp(log_scale - jnp.mean(log_scale)).astype(jnp.float16)


@dataclasses.dataclass(frozen=True)
class Incoherence(abc.ABC):
    """A family of random transforms; `sample` draws the one of a matrix. Hashable, so it can be static under `jit`.

    Attributes:
      rescale: QuIP's diagonal rescaling of the inputs before the rotation.
      side: which sides are rotated: "both", "input" or "output".
    """

    name: ClassVar[str]
    rescale: bool = False
    side: Annotated[str, OneOf("both", "input", "output")] = "both"

    def __post_init__(self) -> None:
        """Check the options. Raises InputError for a value of another kind or out of its range."""
        check_options(self, "incoherence")

    @abc.abstractmethod
    def _padded(self, size: int, multiple: int) -> int:
        """The size of a rotated axis: the least that is possible, at least `size` and divisible by `multiple`."""

    @abc.abstractmethod
    def _rotation(self, key: Key[Array, ""], size: int) -> Rotation | None:
        """The rotation of an axis of padded size."""

    def sample(
        self,
        key: Key[Array, ""],
        out_features: int,
        in_features: int,
        weight: Float[Array, "rows columns"] | None = None,
        hessian: Float[Array, "inputs inputs"] | None = None,
        multiple: tuple[int, int] = (1, 1),
    ) -> Transform:
        """The transform of a matrix [out_features, in_features]; works inside `jit` with a traced key.

        `multiple` is what the padded rows and columns must be divisible by (a codebook's tile). With `rescale` the
        weight and the input Hessian are needed. Raises InputError for sizes that are not positive or when one of these
        is missing or misshaped.
        """
        shape = (out_features, in_features)
        if min(*shape, *multiple) < 1:
            raise InputError(
                f"incoherence of a {list(shape)} matrix with multiple {list(multiple)}; all four must be positive"
            )
        scale = None
        if self.rescale:
            if weight is None or hessian is None:
                raise InputError(
                    f"incoherence {self.name!r} with rescale=True needs the weight and its input Hessian; "
                    "pass both to sample, or use rescale=False"
                )
            if weight.shape != shape:
                raise InputError(f"the weight has shape {list(weight.shape)}; this transform is for {list(shape)}")
            scale = diagonal_rescale(weight, hessian)
        rotated = (self.side != "input", self.side != "output")
        padded = [
            self._padded(size, k) if turn else -(-size // k) * k
            for size, k, turn in zip(shape, multiple, rotated, strict=True)
        ]
        rotations = [
            self._rotation(jax.random.fold_in(key, axis), padded[axis]) if turn else None
            for axis, turn in enumerate(rotated)
        ]
        return Transform(*rotations, rescale=scale, shape=shape, padded=(padded[0], padded[1]))

    def abstract(self, out_features: int, in_features: int, multiple: tuple[int, int] = (1, 1)) -> Transform:
        """The structure of a sample with `jax.ShapeDtypeStruct` leaves, for reading one back; computes nothing."""
        return _abstract(self, out_features, in_features, multiple)

    def spec(self) -> dict[str, Any]:
        """Arguments of `make` that build this family again (JSON values only)."""
        return {"name": self.name, **dataclasses.asdict(self)}


@functools.lru_cache(maxsize=256)
def _abstract(family: Incoherence, out_features: int, in_features: int, multiple: tuple[int, int]) -> Transform:
    """The structure of a sample, traced once: a model has few shapes and many matrices, a trace takes milliseconds."""

    def draw() -> Transform:
        weight = jnp.zeros((out_features, in_features), jnp.float32) if family.rescale else None
        hessian = jnp.zeros((in_features, in_features), jnp.float32) if family.rescale else None
        return family.sample(jax.random.key(0), out_features, in_features, weight, hessian, multiple)

    return jax.eval_shape(draw)


INCOHERENCE: Registry[Incoherence] = Registry("incoherence", "qjax.incoherence.INCOHERENCE")


@INCOHERENCE.register("none")
@dataclasses.dataclass(frozen=True)
class NoIncoherence(Incoherence):
    """No rotation; pads to the tile, and rescales when asked to."""

    name: ClassVar[str] = "none"

    def _padded(self, size: int, multiple: int) -> int:
        return -(-size // multiple) * multiple

    def _rotation(self, key: Key[Array, ""], size: int) -> None:
        return None


@INCOHERENCE.register("folded")
@dataclasses.dataclass(frozen=True)
class Folded(NoIncoherence):
    """Rotations of the whole model that its weights take up, so that every server runs it (`qjax.pipeline.folding`).

    The residual stream is rotated once (R1), and the values of every head (R2); a matrix by itself is not. Source:
    QuaRot (2404.00456), sections 3 and 4, and SpinQuant (2405.16406), section 3.

    Attributes:
      heads: whether the values of heads are rotated (R2).
    """

    name: ClassVar[str] = "folded"
    heads: bool = True

    def __post_init__(self) -> None:
        """Check the options. Raises InputError for those of single matrices, too."""
        super().__post_init__()
        if self.rescale or self.side != "both":
            raise InputError(
                "incoherence=folded rotates the model and no single matrix, which rescale and side are about; leave "
                "them out, or use incoherence=hadamard"
            )


@INCOHERENCE.register("hadamard")
@dataclasses.dataclass(frozen=True)
class Hadamard(Incoherence):
    """The randomised Hadamard transform of the whole axis. Source: QuIP# (2402.04396), section 3."""

    name: ClassVar[str] = "hadamard"

    def _padded(self, size: int, multiple: int) -> int:
        return next_hadamard_order(size, multiple)

    def _rotation(self, key: Key[Array, ""], size: int) -> Rotation:
        return SignedHadamard.sample(key, size)


@INCOHERENCE.register("block_hadamard")
@dataclasses.dataclass(frozen=True)
class BlockHadamard(Incoherence):
    """Randomised Hadamard transforms of `block` consecutive values: cheaper, and local to a shard (as EXL3).

    Attributes:
      block: values of an axis that are transformed together.
    """

    name: ClassVar[str] = "block_hadamard"
    block: Count = 128

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        hadamard_factor(self.block)

    def _padded(self, size: int, multiple: int) -> int:
        step = math.lcm(self.block, multiple)
        return -(-size // step) * step

    def _rotation(self, key: Key[Array, ""], size: int) -> Rotation:
        return SignedHadamard.sample(key, size, self.block)


@INCOHERENCE.register("kronecker")
@dataclasses.dataclass(frozen=True)
class Kronecker(Incoherence):
    """QuIP's two-stage random orthogonal transform. Source: QuIP (2307.13304), section 4.

    Attributes:
      mode: "butterfly" for independent factors per block, "single" for one factor per stage (a Kronecker product).
    """

    name: ClassVar[str] = "kronecker"
    mode: Annotated[str, OneOf("butterfly", "single")] = "butterfly"

    def _padded(self, size: int, multiple: int) -> int:
        padded = -(-size // multiple) * multiple
        while max(balanced_factors(padded)) > MAX_BASE:  # a large prime factor would make a dense factor of its size
            padded += multiple
        return padded

    def _rotation(self, key: Key[Array, ""], size: int) -> Rotation:
        return TwoStageOrthogonal.sample(key, size, self.mode == "single")


def make(name: str, **options: Any) -> Incoherence:
    """The incoherence processing called `name`: "none", "folded", "hadamard", "block_hadamard", "kronecker".

    Raises InputError for an unknown name or option.
    """
    return INCOHERENCE.make(name, **options)


def weight_incoherence(weight: Float[Array, "m n"]) -> Float[Array, ""]:
    """`μ_W = max|W_ij| √(mn) / ‖W‖_F`; 1 when all magnitudes are equal. Source: QuIP (2307.13304), definition 1."""
    return jnp.max(jnp.abs(weight)) * math.sqrt(weight.size) / jnp.linalg.norm(weight)


def hessian_incoherence(hessian: Float[Array, "n n"]) -> Float[Array, ""]:
    """`μ_H = max|Q_ij| √n` over the eigenvectors Q of H. Source: QuIP (2307.13304), definition 1."""
    _, vectors = jnp.linalg.eigh(hessian)
    return jnp.max(jnp.abs(vectors)) * math.sqrt(hessian.shape[0])
