"""How an equation multiplies inputs with a kernel: the equation as `y = x Wᵀ`, for products and convolutions."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp

from qjax.function.views import View

__all__ = ["Layout", "convolution", "product"]


@dataclasses.dataclass(frozen=True)
class Layout:
    """An equation as `y = x Wᵀ` over a stack of experts.

    Attributes:
      side: which operand is the kernel, 0 or 1.
      view: from the kernel to `[*experts, out, in]`.
      matrix: that shape.
      windows: of a convolution by spatial axis, None of a product.
      inputs: axes of the inputs (of a convolution [batch, *spatial, *windows, features]) in the order
        experts, rows, in.
      experts: how many of them are experts' axes.
      rows: sizes of the rows' axes.
      results: permutation from [*experts, *rows, *kernel's own axes] to the equation's result.
      own: sizes of the kernel's own axes, the outputs.
      source: permutation of a convolution's inputs to [batch, *spatial, features].
    """

    side: int
    view: View
    matrix: tuple[int, ...]
    inputs: tuple[int, ...]
    experts: int
    rows: tuple[int, ...]
    results: tuple[int, ...]
    own: tuple[int, ...]
    source: tuple[int, ...] | None = None
    windows: tuple[tuple[int, int], ...] = ()

    @property
    def tokens(self) -> int:
        """Rows that every matrix sees."""
        return math.prod(self.rows)

    def flat(self, x: Any) -> Any:
        """`[*experts, rows, in]` of the inputs."""
        if self.source is not None:
            x = x.transpose(self.source)
            for axis, (window, stride) in enumerate(self.windows, 1):
                x = x[(slice(None),) * axis + (slice(None, None, stride),)] if window == 1 else x
            shape: tuple[int, ...] = x.shape[:1]
            x = x[(slice(None), *(slice(x.shape[a] // k * k) for a, (k, _) in enumerate(self.windows, 1)))]
            for axis, (window, _) in enumerate(self.windows, 1):
                shape = (*shape, x.shape[axis] // window, window)
            x = x.reshape(*shape, x.shape[-1])
        x = x.transpose(self.inputs)
        return x.reshape(*self.matrix[:-2], self.tokens, self.matrix[-1])

    def whole(self, y: Any) -> Any:
        """The equation's result of `[*experts, rows, out]`."""
        return y.reshape(*self.matrix[:-2], *self.rows, *self.own).transpose(self.results)


def product(params: dict[str, Any], side: int, kernel: tuple[int, ...], other: tuple[int, ...]) -> Layout:
    """The layout of a `dot_general` whose operand `side` is the kernel.

    Inputs are the kernel's contracted axes, outputs its free ones, both in the kernel's own order.
    """
    contract, batch = params["dimension_numbers"]
    pairs = sorted(zip(contract[side], contract[1 - side], strict=True))
    mine, theirs = tuple(a for a, _ in pairs), tuple(b for _, b in pairs)
    experts, theirs_experts = tuple(batch[side]), tuple(batch[1 - side])
    free = tuple(a for a in range(len(kernel)) if a not in (*mine, *experts))
    rows = tuple(a for a in range(len(other)) if a not in (*theirs, *theirs_experts))
    order = (*experts, *free, *mine)
    moved = tuple(kernel[a] for a in order)
    stack = tuple(kernel[a] for a in experts)
    matrix = (*stack, math.prod(kernel[a] for a in free), math.prod(kernel[a] for a in mine))
    count = len(experts)
    by_rows, by_own = range(count, count + len(rows)), range(count + len(rows), count + len(rows) + len(free))
    results = (*range(count), *((*by_own, *by_rows) if side == 0 else (*by_rows, *by_own)))
    return Layout(
        side,
        (("transpose", order), ("reshape", moved, matrix)),
        matrix,
        (*theirs_experts, *rows, *theirs),
        count,
        tuple(other[a] for a in rows),
        results,
        tuple(kernel[a] for a in free),
    )


def convolution(params: dict[str, Any], kernel: tuple[int, ...], other: tuple[int, ...], side: int) -> Layout:
    """The layout of a convolution that is a linear: stride = window without padding, or a window of one place.

    Inputs are the kernel's features and window, in the kernel's own order. Raises ValueError with the reason for any
    other convolution.
    """
    numbers = params["dimension_numbers"]
    lhs, rhs, out = numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec
    sizes, strides = tuple(kernel[a] for a in rhs[2:]), tuple(params["window_strides"])
    if side != 1:
        raise ValueError("it is the convolution's input")
    if params["feature_group_count"] != 1 or params["batch_group_count"] != 1:
        raise ValueError("the convolution has groups")
    if any(low or high for low, high in params["padding"]) or any(d != 1 for d in params["lhs_dilation"]):
        raise ValueError("the convolution pads its input")
    dilated = any(d != 1 and k != 1 for d, k in zip(params["rhs_dilation"], sizes, strict=True))
    if dilated or any(k not in (1, s) for k, s in zip(sizes, strides, strict=True)):
        raise ValueError(f"the convolution's windows {list(sizes)} overlap or miss places (strides {list(strides)})")
    count = len(sizes)
    places = tuple(
        -(-other[a] // s) if k == 1 else other[a] // k for a, k, s in zip(lhs[2:], sizes, strides, strict=True)
    )
    # [batch, place₁, window₁, place₂, window₂, …, features]
    feature, windows = 2 * count + 1, [2 * i + 2 for i in range(count)]
    by_axis = {rhs[1]: feature, **dict(zip(rhs[2:], windows, strict=True))}
    inputs = [by_axis[axis] for axis in sorted(by_axis)]
    order = (rhs[0], *sorted(by_axis))
    moved = tuple(kernel[a] for a in order)
    matrix = (kernel[rhs[0]], math.prod(moved[1:]))
    results = [0] * (count + 2)  # of [batch, *places, out]
    for axis, source in zip((out[0], out[1], *out[2:]), (0, count + 1, *range(1, count + 1)), strict=True):
        results[axis] = source
    return Layout(
        1,
        (("transpose", order), ("reshape", moved, matrix)),
        matrix,
        (0, *(2 * i + 1 for i in range(count)), *inputs),
        0,
        (other[lhs[0]], *places),
        tuple(results),
        (kernel[rhs[0]],),
        source=(lhs[0], *lhs[2:], lhs[1]),
        windows=tuple(zip(sizes, strides, strict=True)),
    )


def gram(x: Any) -> Any:
    """`Σ x xᵀ` over the rows of `[*experts, rows, in]`, float32."""
    x = x.astype(jnp.float32)
    return jnp.einsum("...ti,...tj->...ij", x, x, precision="highest")
