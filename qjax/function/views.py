"""The way from a parameter leaf to the matrix of a linear, as operations that can be undone.

A *view* is a tuple of operations, each a tuple of plain values: what a program does to a kernel before it multiplies
with it, and then the layout of the product. Casts are left out: they change no place.

("peel",)                       a scan takes the leading axis; it stays in front, as an axis of the stack
("reshape", before, after)      also squeeze, and broadcasting that adds axes of size 1
("transpose", permutation)
("slice", before, starts, limits, strides)
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

__all__ = ["PEEL", "View", "apply", "places", "sliced", "step", "undo"]

View = tuple[tuple[Any, ...], ...]
PEEL = ("peel",)


def step(name: str, params: dict[str, Any], shape: tuple[int, ...]) -> tuple[tuple[Any, ...] | None, tuple[int, ...]]:
    """(the operation of an equation on an array of `shape`, None for one that moves nothing; the shape after it).

    Raises KeyError for a primitive that is no view, ValueError with the reason for one that is none here.
    """
    if name in ("convert_element_type", "copy", "copy_p", "optimization_barrier", "sharding_constraint", "name"):
        return None, shape
    if name == "reshape":
        if params.get("dimensions") is not None:
            raise ValueError("it is reshaped with its axes permuted")
        after = tuple(params["new_sizes"])
    elif name == "squeeze":
        dropped = {axis % len(shape) for axis in params["dimensions"]}
        after = tuple(size for axis, size in enumerate(shape) if axis not in dropped)
    elif name == "expand_dims":
        after = shape
        for axis in sorted(params["dimensions"]):
            after = (*after[:axis], 1, *after[axis:])
    elif name == "broadcast_in_dim":
        after = tuple(params["shape"])
        if math.prod(after) != math.prod(shape):
            raise ValueError("it is broadcast to a larger array")
        kept = tuple(after[axis] for axis in params["broadcast_dimensions"])
        if kept != shape:
            raise ValueError("it is broadcast to a larger array")
    elif name == "transpose":
        order = tuple(params["permutation"])
        return ("transpose", order), tuple(shape[axis] for axis in order)
    elif name == "slice":
        starts, limits = tuple(params["start_indices"]), tuple(params["limit_indices"])
        strides = tuple(params["strides"] or (1,) * len(shape))
        after = tuple(len(range(start, limit, by)) for start, limit, by in zip(starts, limits, strides, strict=True))
        return (None if after == shape else ("slice", shape, starts, limits, strides)), after
    else:
        raise KeyError(name)
    return (None if after == shape else ("reshape", shape, after)), after


def apply(view: View, leaf: Any) -> Any:
    """The stack of matrices `[*stack, …]` of a leaf."""
    lead = 0
    for kind, *options in view:
        front = tuple(leaf.shape[:lead])
        if kind == "peel":
            lead += 1
        elif kind == "reshape":
            leaf = leaf.reshape(*front, *options[1])
        elif kind == "transpose":
            leaf = leaf.transpose(*range(lead), *(lead + axis for axis in options[0]))
        else:
            _, starts, limits, strides = options
            index = tuple(map(slice, starts, limits, strides))
            leaf = leaf[(slice(None),) * lead + index]
    return leaf


def undo(view: View, matrices: Any) -> Any:
    """The leaf of its stack of matrices; `view` has no slices."""
    lead = view.count(PEEL)
    for kind, *options in reversed(view):
        front = tuple(matrices.shape[:lead])
        if kind == "peel":
            lead -= 1
        elif kind == "reshape":
            matrices = matrices.reshape(*front, *options[0])
        elif kind == "transpose":
            inverse = np.argsort(options[0])
            matrices = matrices.transpose(*range(lead), *(lead + int(axis) for axis in inverse))
        else:
            raise ValueError("a slice does not give the whole leaf")
    return matrices


def places(view: View, shape: tuple[int, ...]) -> np.ndarray:
    """The place in the flattened leaf of every entry of its matrices."""
    return apply(view, np.arange(math.prod(shape)).reshape(shape))


def sliced(view: View) -> bool:
    """Whether a view holds a part of its leaf only."""
    return any(operation[0] == "slice" for operation in view)
