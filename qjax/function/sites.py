"""The linears of a traced function: which parameters they are, what they are called, and what was not taken."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qjax.errors import InputError
from qjax.function import views
from qjax.function.views import View
from qjax.function.walk import Use, Walk

__all__ = ["LinearSite", "Sites", "found_sites", "leaf_names"]

_KERNELS = ("kernel", "weight", "embedding")


@dataclasses.dataclass(frozen=True)
class LinearSite:
    """A linear `y = x Wᵀ` of a traced function.

    Attributes:
      name: the parameter's key path, without the collection "params" and a last "kernel" or "weight"; of a slice of a
        parameter with its bounds.
      leaf: the parameter's number among the leaves.
      stack: axes of a stack of layers (scan) or of experts (batched products); () for one matrix.
      shape: (out, in).
      uses: how many products of the program read it; tied ones are one linear, whose Hessian sums over all.
      matrices: the name of every matrix of the stack, in order: seeds and rules go by them.
      view: from the leaf to `[*stack, out, in]`.
      dtype: of the leaf.
    """

    name: str
    leaf: int
    stack: tuple[int, ...]
    shape: tuple[int, int]
    uses: int
    matrices: tuple[str, ...]
    view: View
    dtype: Any

    def matrix(self, leaf: Any) -> Any:
        """`[*stack, out, in]` of the leaf."""
        return views.apply(self.view, leaf)


@dataclasses.dataclass(frozen=True)
class Sites:
    """All linears of a function.

    Attributes:
      linears: by name, in the order of the program.
      left: why a parameter was not taken, by name.
      of_use: the number of the site that a use belongs to.
      sources: the least use that has the same inputs, by use.
    """

    linears: dict[str, LinearSite]
    left: dict[str, str]
    of_use: dict[int, int]
    sources: dict[int, int]


def leaf_names(paths: Sequence[Sequence[Any]]) -> list[list[str]]:
    """The key path of every leaf, without a collection "params" that all share."""
    names = [[str(getattr(k, "name", getattr(k, "key", getattr(k, "idx", k)))) for k in path] for path in paths]
    names = [own[:-1] if own[-1:] == ["value"] and len(own) > 1 else own for own in names]  # a variable of flax.nnx
    names = [own or ["weight"] for own in names]  # of parameters that are one array
    if names and all(own[:1] == ["params"] and len(own) > 1 for own in names):
        names = [own[1:] for own in names]
    return names


def found_sites(walk: Walk, names: list[list[str]], leaves: Sequence[Any]) -> Sites:
    """The sites of a walk. A parameter is taken where linears are all that it is for, and cover it."""
    by_leaf: dict[int, list[Use]] = {}
    for use in walk.uses:
        by_leaf.setdefault(use.leaf, []).append(use)
    left: dict[int, str] = {leaf: "; ".join(reasons) for leaf, reasons in walk.others.items()}
    groups: list[tuple[int, list[Use]]] = []
    for leaf, uses in by_leaf.items():
        if leaf in left:
            left[leaf] = f"{_times(len(uses))} in products, but {left[leaf]}"
            continue
        if not np.issubdtype(leaves[leaf].dtype, np.floating) and leaves[leaf].dtype.name != "bfloat16":
            left[leaf] = f"its dtype is {leaves[leaf].dtype}"
            continue
        parts, reason = _parts(uses, tuple(leaves[leaf].shape))
        if reason:
            left[leaf] = reason
        else:
            groups += [(leaf, part) for part in parts]
    groups.sort(key=lambda group: group[1][0].index)
    plain = _short([leaf for leaf, _ in groups], names)
    linears: dict[str, LinearSite] = {}
    of_use: dict[int, int] = {}
    for number, (leaf, uses) in enumerate(groups):
        site = _site(leaf, uses, plain[leaf], names, walk, leaves[leaf])
        if site.name in linears:
            raise InputError(f"two linears are called {site.name}; give the parameters' tree other keys")
        linears[site.name] = site
        of_use |= {use.index: number for use in uses}
    return Sites(linears, {".".join(names[leaf]): reason for leaf, reason in left.items()}, of_use, _sources(walk.uses))


def _times(count: int) -> str:
    return "it is used once" if count == 1 else f"it is used {count} times"


def _parts(uses: list[Use], shape: tuple[int, ...]) -> tuple[list[list[Use]], str]:
    """(uses by the matrices that they read, the reason why the leaf cannot be replaced or "")."""
    by_view: dict[Any, list[Use]] = {}
    for use in uses:
        by_view.setdefault((use.view, use.layout.matrix), []).append(use)
    if len(by_view) == 1 and not views.sliced(uses[0].view):
        return [uses], ""
    whole: list[tuple[np.ndarray, list[Use]]] = []
    for own in by_view.values():
        here = views.places(own[0].view, shape)
        same = next(
            (group for known, group in whole if known.shape == here.shape and np.array_equal(known, here)), None
        )
        if same is not None:
            same += own
            continue
        if any(np.intersect1d(known, here).size for known, _ in whole):
            return [], f"{_times(len(uses))} in products, as different matrices (such as W and its transpose)"
        whole.append((here, own))
    covered = sum(known.size for known, _ in whole)
    if covered < math.prod(shape):
        return [], f"products read {covered} of its {math.prod(shape)} entries"
    return [sorted(group, key=lambda use: use.index) for _, group in whole], ""


def _short(leaves: Sequence[int], names: list[list[str]]) -> dict[int, list[str]]:
    """The names of linears without a last "kernel" or "weight", where they stay apart."""
    short = {
        leaf: names[leaf][:-1] if names[leaf][-1] in _KERNELS and names[leaf][:-1] else names[leaf] for leaf in leaves
    }
    counts: dict[tuple[str, ...], int] = {}
    for own in short.values():
        counts[tuple(own)] = counts.get(tuple(own), 0) + 1
    return {leaf: own if counts[tuple(own)] == 1 else names[leaf] for leaf, own in short.items()}


def _site(leaf: int, uses: list[Use], short: list[str], names: list[list[str]], walk: Walk, array: Any) -> LinearSite:
    first = uses[0]
    layers = [scan for scan in first.scans if scan.stacked]
    experts = first.layout.matrix[:-2]
    stack = (*(scan.length for scan in layers), *experts)
    name = ".".join(short) + _bounds(first.view)
    # A scan's index stands after what the keys of all parameters that it takes apart begin with, of those that begin
    # alike; experts' at the end.
    stacks = [[names[own] for own in walk.stacks[scan.path]] for scan in layers]
    at = [_common([own for own in stack if own[0] == short[0]], len(short)) for stack in stacks]
    matrices = []
    for index in itertools.product(*map(range, stack)):
        parts = list(short)
        for place, number in sorted(zip(at, index[: len(layers)], strict=True), key=lambda p: p[0], reverse=True):
            parts.insert(place, str(number))
        parts += map(str, index[len(layers) :])
        matrices.append(".".join(parts) + _bounds(first.view))
    shape = first.layout.matrix[-2], first.layout.matrix[-1]
    return LinearSite(name, leaf, stack, shape, len(uses), tuple(matrices), first.view, array.dtype)


def _common(names: Sequence[Sequence[str]], most: int) -> int:
    """How many keys all names begin with, fewer than the whole of any; all for one name alone."""
    if len({tuple(own) for own in names}) == 1:
        return most
    count = 0
    while all(len(own) > count + 1 for own in names) and len({own[count] for own in names}) == 1:
        count += 1
    return min(count, most)


def _bounds(view: View) -> str:
    """`[0:64, 3]` of the slices in a view, "" without."""
    text = ""
    for kind, *options in view:
        if kind != "slice":
            continue
        shape, starts, limits, strides = options
        parts = []
        for size, start, limit, stride in zip(shape, starts, limits, strides, strict=True):
            by = f":{stride}" if stride != 1 else ""
            parts.append(":" if (start, limit, stride) == (0, size, 1) else f"{start}:{limit}{by}")
        while parts[-1] == ":":
            parts.pop()
        text += f"[{','.join(str(int(p.split(':')[0])) if _one(p) else p for p in parts)}]"
    return text


def _one(part: str) -> bool:
    bounds = part.split(":")
    return len(bounds) == 2 and all(bounds) and int(bounds[1]) - int(bounds[0]) == 1


def _sources(uses: Sequence[Use]) -> dict[int, int]:
    first: dict[Any, int] = {}
    return {use.index: first.setdefault((use.source, use.branch and use.path[:-1]), use.index) for use in uses}


def checked_names(given: Mapping[str, Any], sites: Mapping[str, LinearSite], what: str) -> None:
    """Raises InputError for names that no linear has, or linears without an entry."""
    if other := [name for name in given if name not in sites]:
        raise InputError(f"{what}: there is no linear {other[0]!r}; names look like {', '.join(list(sites)[:3])}")
