"""A program evaluated with operators in the place of its kernels, and with its products observed."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qjax.function.walk import CALLS, Use, inner, scan_parts

__all__ = ["Held", "Observer", "evaluate"]


class Held:
    """A kernel whose matrices are an operator, or operators by the number of their site: what moves it is left out."""

    def __init__(self, operators: Mapping[int, Any]):
        self.operators = operators

    def leading(self) -> tuple[Any, Any]:
        """(arrays with a leading axis, the kernel of one entry of them), for a scan that takes the kernel apart."""
        parts = {number: stacked.taken_apart() for number, stacked in self.operators.items()}
        arrays = {number: part[0] for number, part in parts.items()}
        return arrays, lambda own: Held({number: parts[number][1](own[number]) for number in parts})


class Observer:
    """Someone who sees the inputs of products; this one lets them pass.

    Attributes:
      added: whether what a use that a scan repeats gives is added up, instead of stacked.
    """

    added = False

    def wants(self, use: Use) -> bool:
        """Whether anything is seen of a use."""
        return False

    def see(self, use: Use, rows: Any, slot: Any) -> tuple[Any, Any]:
        """(what is kept of the inputs `[*experts, rows, in]`, what is added to the outputs `[*experts, rows, out]`)."""
        raise NotImplementedError


class _Evaluation:
    def __init__(self, uses: Sequence[Use], sites: Mapping[int, int], observer: Observer):
        self.uses = {use.path: use for use in uses}
        self.sites, self.observer = sites, observer
        self.inside = {use.path[:end] for use in uses for end in range(1, len(use.path))}

    def below(self, path: tuple[int, ...]) -> list[Use]:
        """Uses inside an equation that are observed."""
        found = [use for own, use in self.uses.items() if own[: len(path)] == path]
        return [use for use in found if self.observer.wants(use)]

    def program(self, jaxpr: Any, consts: Sequence[Any], inputs: Sequence[Any], path: tuple[int, ...], slots: Any):
        """(outputs, what was kept by use) of a `Jaxpr`."""
        known: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
        known.update(zip(jaxpr.invars, inputs, strict=True))
        last = _last_uses(jaxpr)
        kept: dict[int, Any] = {}
        read = lambda atom: atom.val if hasattr(atom, "val") else known[atom]  # noqa: E731
        for number, equation in enumerate(jaxpr.eqns):
            here = (*path, number)
            values = [read(atom) for atom in equation.invars]
            outputs, own = self.equation(equation, values, here, slots)
            kept |= own
            known.update(zip(equation.outvars, outputs, strict=True))
            for atom in last[number]:
                known.pop(atom, None)
        return [read(atom) for atom in jaxpr.outvars], kept

    def equation(self, equation: Any, values: list[Any], here: tuple[int, ...], slots: Any) -> tuple[list[Any], Any]:
        name, params = equation.primitive.name, equation.params
        held = any(isinstance(value, Held) for value in values)
        if here in self.uses:
            return self.product(equation, values, self.uses[here], slots)
        if here not in self.inside and not held:
            return _bound(equation, values), {}
        if name == "scan":
            return self.scan(equation, values, here, slots)
        if name == "cond":
            return self.cond(params, values, here, slots)
        program, consts = inner(params)
        if name in CALLS and program is not None:
            run = functools.partial(self.program, program, consts, path=(*here, 0))
            if name in ("remat", "remat2", "checkpoint") and not self.below(here):
                return _rematerialised(run, values, params), {}
            return run(inputs=values, slots=slots)
        return values, {}  # a view of a kernel: the layout of its product knows it

    def product(self, equation: Any, values: list[Any], use: Use, slots: Any) -> tuple[list[Any], dict[int, Any]]:
        layout, (result,) = use.layout, equation.outvars
        kernel, x = values[layout.side], values[1 - layout.side]
        observed = self.observer.wants(use)
        rows = layout.flat(x) if observed or isinstance(kernel, Held) else None
        if isinstance(kernel, Held):
            operator = kernel.operators[self.sites[use.index]]
            y = layout.whole(operator.matmul(rows)).astype(result.aval.dtype)
        else:
            (y,) = _bound(equation, values)
        if not observed:
            return [y], {}
        kept, change = self.observer.see(use, rows, slots.get(use.index))
        y = y if change is None else y + layout.whole(change).astype(y.dtype)
        return [y], {use.index: kept}

    def scan(self, equation: Any, values: list[Any], here: tuple[int, ...], slots: Any) -> tuple[list[Any], Any]:
        params = equation.params
        program, (first, carried) = params["jaxpr"], scan_parts(equation)
        end = first + carried
        consts, carry, over = values[:first], values[first:end], values[end:]
        apart = {i: value.leading() for i, value in enumerate(over) if isinstance(value, Held)}
        arrays = [apart[i][0] if i in apart else value for i, value in enumerate(over)]
        uses = self.below(here)
        # What a use keeps is added up where its kernel is the same in every step.
        summed = {use.index for use in uses if self.observer.added and not _stacked(use, here)}
        given = {use.index: slots[use.index] for use in uses if use.index in slots}

        def step(carry: Any, own: Any) -> tuple[Any, Any]:
            state, sums = carry
            entries, given = own
            entries = [apart[i][1](entry) if i in apart else entry for i, entry in enumerate(entries)]
            outputs, kept = self.program(program.jaxpr, program.consts, [*consts, *state, *entries], (*here, 0), given)
            if sums is not None:
                sums = {index: jax.tree.map(jnp.add, sums[index], kept[index]) for index in summed}
            rest = {index: value for index, value in kept.items() if index not in summed}
            return (outputs[: len(state)], sums), (outputs[len(state) :], rest, kept if sums is None else None)

        zeros: Any = {}
        if summed:
            one = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), (arrays, given))
            abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(jnp.shape(a), jnp.result_type(a)), carry)
            _, (_, _, kept) = jax.eval_shape(step, (abstract, None), one)
            zeros = {index: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), kept[index]) for index in summed}
        (state, sums), (outputs, rest, _) = jax.lax.scan(
            step,
            (carry, zeros),
            (arrays, given),
            length=params["length"],
            reverse=params["reverse"],
            unroll=params["unroll"],
        )
        return [*state, *outputs], {**rest, **sums}

    def cond(self, params: Any, values: list[Any], here: tuple[int, ...], slots: Any) -> tuple[list[Any], Any]:
        chosen, operands = values[0], values[1:]

        def branch(number: int) -> tuple[list[Any], Any]:
            program = params["branches"][number]
            return self.program(program.jaxpr, program.consts, operands, (*here, number), slots)

        count = len(params["branches"])
        shapes: dict[int, Any] = {}
        if self.below(here):
            for number in range(count):
                shapes |= jax.eval_shape(functools.partial(branch, number))[1]

        def whole(number: int) -> tuple[list[Any], Any]:
            outputs, kept = branch(number)
            zeros = {i: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), s) for i, s in shapes.items()}
            return outputs, {**zeros, **kept}

        chosen = chosen.astype(jnp.int32) if hasattr(chosen, "astype") else int(chosen)
        return jax.lax.switch(chosen, [functools.partial(whole, number) for number in range(count)])


def _stacked(use: Use, path: tuple[int, ...]) -> bool:
    return any(scan.stacked for scan in use.scans if scan.path == path)


def _last_uses(jaxpr: Any) -> list[list[Any]]:
    """The variables that no equation after each one needs, so that nothing is held longer than in the program."""
    result: list[list[Any]] = [[] for _ in jaxpr.eqns]
    later = {atom for atom in jaxpr.outvars if not hasattr(atom, "val")}
    for number in reversed(range(len(jaxpr.eqns))):
        equation = jaxpr.eqns[number]
        for atom in (*equation.invars, *equation.outvars):
            if not hasattr(atom, "val") and atom not in later:
                later.add(atom)
                result[number].append(atom)
    return result


def _bound(equation: Any, values: list[Any]) -> list[Any]:
    """The outputs of an equation as it stands."""
    params = equation.primitive.get_bind_params(equation.params)
    functions, params = params if isinstance(params, tuple) else ((), params)  # a pair before JAX 0.10
    found = equation.primitive.bind(*functions, *values, **params)
    return list(found) if equation.primitive.multiple_results else [found]


def _rematerialised(run: Any, values: list[Any], params: Any) -> list[Any]:
    """A program whose intermediate values are computed again on the way back, as the function asked for."""
    arrays = [value for value in values if not isinstance(value, Held)]

    def body(arrays: list[Any]) -> list[Any]:
        own = iter(arrays)
        return run(inputs=[value if isinstance(value, Held) else next(own) for value in values], slots={})[0]

    return jax.checkpoint(body, prevent_cse=params["prevent_cse"], policy=params["policy"])(arrays)


def evaluate(
    closed: Any,
    inputs: Sequence[Any],
    uses: Sequence[Use],
    sites: Mapping[int, int],
    observer: Observer | None = None,
    slots: Mapping[int, Any] | None = None,
) -> tuple[list[Any], dict[int, Any]]:
    """(outputs, what the observer kept by the number of the use) of a program (a `ClosedJaxpr`).

    `inputs` may be `Held`: every use of such a kernel is one of `uses`, whose operator has the number `sites[use]`.
    `slots` is handed to the observer by the number of the use, without the axes of the scans around it.
    """
    run = _Evaluation(uses, sites, observer or Observer())
    return run.program(closed.jaxpr, closed.consts, inputs, (), slots or {})
