"""What a program does with its parameters: the products that they enter, and every other use, by abstract evaluation.

The program is walked once, without values. A variable is a parameter seen through a view (`qjax.function.views`), or a
token that says which array it is: equal tokens are equal arrays.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from qjax.function import layouts, views
from qjax.function.layouts import Layout
from qjax.function.views import PEEL, View

__all__ = ["CALLS", "Scan", "Seen", "Use", "Walk", "inner", "needed", "scan_parts", "walk"]

# Primitives that evaluate a program on their operands as they are.
CALLS = frozenset(
    ("jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint", "custom_jvp_call", "custom_vjp_call")
)
_REFUSED = {
    "while": "it is used inside while, whose steps are not known beforehand; use scan, or fori_loop with fixed bounds",
    "shard_map": "it is used inside shard_map; trace the function that is mapped",
}


@dataclasses.dataclass(frozen=True)
class Scan:
    """A scan around a use: where it stands, its steps, and whether it takes the use's kernel apart."""

    path: tuple[int, ...]
    length: int
    stacked: bool


@dataclasses.dataclass(frozen=True)
class Use:
    """A product of a parameter with something that is none.

    Attributes:
      index: its number.
      path: its place: the equation's number in the program, the branch or 0, the equation's number inside, …
      leaf: the parameter's number.
      view: from the leaf to its matrices, the layout of the product included.
      layout: of the equation.
      scans: around it, outermost first.
      source: equal for uses whose inputs are the same.
      branch: whether it stands in a branch, which need not be taken.
    """

    index: int
    path: tuple[int, ...]
    leaf: int
    view: View
    layout: Layout
    scans: tuple[Scan, ...]
    source: Any
    branch: bool

    @property
    def tokens(self) -> int:
        """Rows that every matrix sees in a pass."""
        times = 1
        for scan in self.scans:
            times *= 1 if scan.stacked else scan.length
        return times * self.layout.tokens


@dataclasses.dataclass(frozen=True)
class Seen:
    """A parameter as a program sees it.

    Attributes:
      leaf: its number.
      view: what was done to it.
      shape: of an array of it.
      peeled: the paths of the scans that took it apart.
    """

    leaf: int
    view: View
    shape: tuple[int, ...]
    peeled: tuple[tuple[int, ...], ...] = ()


@dataclasses.dataclass
class Walk:
    """What a walk has found.

    Attributes:
      uses: products, in the program's order.
      others: why a parameter cannot be replaced, by its number: its other uses.
      stacks: numbers of the parameters that a scan takes apart, by the scan's path.
    """

    uses: list[Use] = dataclasses.field(default_factory=list)
    others: dict[int, list[str]] = dataclasses.field(default_factory=dict)
    stacks: dict[tuple[int, ...], list[int]] = dataclasses.field(default_factory=dict)
    fresh: Iterator[int] = dataclasses.field(default_factory=itertools.count)

    def other(self, seen: Any, reason: str) -> None:
        """A parameter (or anything else, of which nothing is noted) is used in another way."""
        if isinstance(seen, Seen):
            reasons = self.others.setdefault(seen.leaf, [])
            if reason not in reasons:
                reasons.append(reason)


@dataclasses.dataclass(frozen=True)
class _Around:
    path: tuple[int, ...] = ()
    scans: tuple[tuple[tuple[int, ...], int], ...] = ()
    branch: bool = False


def inner(params: dict[str, Any]) -> Any:
    """The program that a call evaluates, without its constants (a `Jaxpr`), and those."""
    found = next((params[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in params), None)
    if found is None:
        return None, ()
    return (found.jaxpr, found.consts) if hasattr(found, "consts") else (found, ())


def walk(jaxpr: Any, leaves: int) -> Walk:
    """The walk through a `Jaxpr` whose first `leaves` inputs are the parameters."""
    found = Walk()
    inputs: list[Any] = [Seen(i, (), tuple(v.aval.shape)) for i, v in enumerate(jaxpr.invars[:leaves])]
    inputs += [("input", i) for i in range(len(jaxpr.invars) - leaves)]
    for output in _program(found, jaxpr, inputs, _Around()):
        found.other(output, "the function returns it")
    return found


def _program(found: Walk, jaxpr: Any, inputs: Sequence[Any], around: _Around) -> list[Any]:
    known: dict[Any, Any] = dict(zip(jaxpr.invars, inputs, strict=True))

    def read(atom: Any) -> Any:
        if hasattr(atom, "val"):  # a literal
            return ("literal", str(atom.val))
        if atom not in known:
            known[atom] = next(found.fresh)
        return known[atom]

    for number, equation in enumerate(jaxpr.eqns):
        here = dataclasses.replace(around, path=(*around.path, number))
        outputs = _equation(found, equation, [read(atom) for atom in equation.invars], here)
        known.update(zip(equation.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _equation(found: Walk, equation: Any, inputs: list[Any], here: _Around) -> list[Any]:
    name, params = equation.primitive.name, equation.params
    new = [next(found.fresh) for _ in equation.outvars]
    seen = [x for x in inputs if isinstance(x, Seen)]
    if not seen:
        if len(inputs) == 1 and _moves(name):
            return [(name, str(params), inputs[0])]
        return new
    if name in ("dot_general", "conv_general_dilated"):
        _product(found, equation, inputs, here)
        return new
    if name == "scan":
        return _scan(found, equation, inputs, here)
    if name == "cond":
        return _cond(found, params, inputs, here)
    program, _ = inner(params)
    if name in CALLS and program is not None and len(program.invars) == len(inputs):
        return _program(found, program, inputs, dataclasses.replace(here, path=(*here.path, 0)))
    if len(inputs) == 1:
        try:
            operation, shape = views.step(name, params, seen[0].shape)
        except ValueError as error:
            found.other(seen[0], str(error))
            return new
        except KeyError:
            pass
        else:
            view = seen[0].view if operation is None else (*seen[0].view, operation)
            return [dataclasses.replace(seen[0], view=view, shape=shape)]
    for own in seen:
        found.other(own, _REFUSED.get(name, f"it enters {name}"))
    return new


def _moves(name: str) -> bool:
    """Whether a primitive only moves or rounds what is there, so that equal inputs stay equal."""
    return name in ("reshape", "transpose", "squeeze", "broadcast_in_dim", "convert_element_type", "copy", "slice")


def _product(found: Walk, equation: Any, inputs: list[Any], here: _Around) -> None:
    params, is_product = equation.params, equation.primitive.name == "dot_general"
    kernels = [side for side, x in enumerate(inputs) if isinstance(x, Seen)]
    if len(kernels) != 1:
        for side in kernels:
            found.other(inputs[side], f"it is multiplied with another parameter in {equation.primitive.name}")
        return
    (side,) = kernels
    seen, other = inputs[side], tuple(equation.invars[1 - side].aval.shape)
    try:
        layout = (
            layouts.product(params, side, seen.shape, other)
            if is_product
            else layouts.convolution(params, seen.shape, other, side)
        )
    except ValueError as error:
        found.other(seen, str(error))
        return
    if min(layout.matrix[-2:]) == 1:
        found.other(seen, f"it is a vector where it is multiplied (a matrix [out, in] of {list(layout.matrix[-2:])})")
        return
    scans = tuple(Scan(path, length, path in seen.peeled) for path, length in here.scans)
    source = (inputs[1 - side], layout.inputs, layout.windows, layout.source, layout.rows, layout.matrix[-1], scans)
    found.uses.append(
        Use(
            len(found.uses),
            here.path,
            seen.leaf,
            _simplified((*seen.view, *layout.view)),
            layout,
            scans,
            source,
            here.branch,
        )
    )


def _simplified(view: View) -> View:
    """The view without what moves nothing."""
    return tuple(
        operation
        for operation in view
        if not (operation[0] == "transpose" and operation[1] == tuple(range(len(operation[1]))))
        and not (operation[0] == "reshape" and operation[1] == operation[2])
    )


def scan_parts(equation: Any) -> tuple[int, int]:
    """(constants, carried values) of a scan, first among its inputs; JAX keeps their numbers in other places over time.

    What a scan takes apart has an axis more outside than inside, and so has what it stacks.
    """
    program = equation.params["jaxpr"].jaxpr
    rank = lambda atom: len(atom.aval.shape)  # noqa: E731
    apart = sum(rank(a) != rank(b) for a, b in zip(equation.invars, program.invars, strict=True))
    carry = sum(rank(a) == rank(b) for a, b in zip(equation.outvars, program.outvars, strict=True))
    return len(equation.invars) - apart - carry, carry


def _scan(found: Walk, equation: Any, inputs: list[Any], here: _Around) -> list[Any]:
    params = equation.params
    program, (consts, carry) = params["jaxpr"].jaxpr, scan_parts(equation)
    own: list[Any] = []
    for position, value in enumerate(inputs):
        if position < consts:
            own.append(value)
        elif position < consts + carry:
            found.other(value, "a scan carries it from step to step")
            own.append(next(found.fresh))
        elif isinstance(value, Seen):
            found.stacks.setdefault(here.path, []).append(value.leaf)
            peeled = (*value.peeled, here.path)
            own.append(Seen(value.leaf, (*value.view, PEEL), value.shape[1:], peeled))
        else:
            own.append(("step", here.path, value))
    inside = _Around((*here.path, 0), (*here.scans, (here.path, params["length"])), here.branch)
    for output in _program(found, program, own, inside):
        found.other(output, "a scan hands it on")
    return [next(found.fresh) for _ in range(len(program.outvars))]


def _cond(found: Walk, params: dict[str, Any], inputs: list[Any], here: _Around) -> list[Any]:
    found.other(inputs[0], "it chooses the branch of cond")
    outputs: list[Any] = []
    for number, branch in enumerate(params["branches"]):
        inside = dataclasses.replace(here, path=(*here.path, number), branch=True)
        outputs = _program(found, branch.jaxpr, inputs[1:], inside)
        for output in outputs:
            found.other(output, "a branch of cond hands it on")
    return [next(found.fresh) for _ in outputs]


def needed(jaxpr: Any) -> list[bool]:
    """Whether the outputs need each input of a `Jaxpr`; a call's inputs are all needed where one of its outputs is."""
    wanted = {v for v in jaxpr.outvars if not hasattr(v, "val")}
    for equation in reversed(jaxpr.eqns):
        if equation.effects or any(v in wanted for v in equation.outvars):
            wanted |= {v for v in equation.invars if not hasattr(v, "val")}
    return [v in wanted for v in jaxpr.invars]
