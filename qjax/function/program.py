"""The program of a function for inputs of given shapes, and what must not be in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from qjax.errors import InputError
from qjax.function.sites import Sites, found_sites
from qjax.function.walk import Use, needed, walk

__all__ = ["Program", "leaf_name", "program"]


@dataclasses.dataclass(frozen=True)
class Program:
    """A function's program for one set of shapes.

    Attributes:
      closed: the `ClosedJaxpr`; its first inputs are the parameters' leaves.
      output: structure of the output.
      shapes: of the output's leaves.
      uses: of parameters in products.
      sites: what those are.
      unused: numbers of the leaves that no output needs.
    """

    closed: Any
    output: Any
    shapes: tuple[Any, ...]
    uses: tuple[Use, ...]
    sites: Sites
    unused: tuple[int, ...]


def leaf_name(path: Sequence[Any]) -> str:
    """A leaf's key path for a message."""
    return jax.tree_util.keystr(tuple(path)) or "the only leaf"


def abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    """A leaf's shape and dtype, as a program sees it."""
    if isinstance(leaf, bool | int | float | complex):  # of no dtype of its own
        return jax.ShapeDtypeStruct((), jnp.result_type(leaf), weak_type=True)
    dtype = leaf.dtype
    if not jnp.issubdtype(dtype, jax.dtypes.extended):
        dtype = jax.dtypes.canonicalize_dtype(dtype)
    return jax.ShapeDtypeStruct(np.shape(leaf), dtype)


def program(
    function: Callable[..., Any], structure: Any, leaves: Sequence[Any], names: list[list[str]], inputs: Sequence[Any]
) -> Program:
    """The program of `function(params, *inputs)`; leaves and inputs may be shapes.

    Raises InputError for what no program can say: values that decide its structure, Python-side randomness, changes of
    what lies outside.
    """
    flat, tree = jax.tree.flatten(tuple(inputs))
    shapes = [abstract(leaf) for leaf in (*leaves, *flat)]
    before = len(leaves)
    outputs: list[Any] = []

    def run(*arrays: Any) -> list[Any]:
        params = jax.tree.unflatten(structure, arrays[:before])
        output = function(params, *jax.tree.unflatten(tree, arrays[before:]))
        if jax.tree.structure(params) != structure:
            raise InputError(
                "the function adds or removes parameters while it runs; a traced function returns what it makes and "
                "leaves its parameters as they are"
            )
        changed = [i for i, (a, b) in enumerate(zip(jax.tree.leaves(params), arrays, strict=False)) if a is not b]
        if changed:
            raise InputError(
                f"the function writes to parameter {'.'.join(names[changed[0]])} while it runs; return new values "
                "instead of changing what was given"
            )
        found, own = jax.tree.flatten(output)
        outputs[:] = [own]
        return found

    closed = _traced(run, shapes)
    if _described(_traced(run, shapes)) != _described(closed):
        raise InputError(
            "the function gives another program every time that it is traced (randomness, a counter or the time of "
            "Python); take random keys as inputs (jax.random.key) and leave state out"
        )
    found = walk(closed.jaxpr, before)
    sites = found_sites(found, names, shapes[:before])
    used = needed(closed.jaxpr)
    taken = tuple(use for use in found.uses if use.index in sites.of_use)
    return Program(
        closed,
        outputs[0],
        tuple(v.aval for v in closed.jaxpr.outvars),
        taken,
        sites,
        tuple(i for i in range(before) if not used[i]),
    )


def _traced(run: Callable[..., Any], shapes: Sequence[Any]) -> Any:
    try:
        closed = jax.make_jaxpr(lambda *arrays: run(*arrays))(*shapes)  # one of its own, which nothing remembers
    except jax.errors.UnexpectedTracerError as error:
        raise InputError(
            f"the function keeps arrays of an earlier call outside itself ({_line(error)}); return them instead"
        ) from error
    except (
        jax.errors.ConcretizationTypeError,
        jax.errors.TracerBoolConversionError,
        jax.errors.TracerArrayConversionError,
        jax.errors.TracerIntegerConversionError,
        jax.errors.NonConcreteBooleanIndexError,
    ) as error:
        raise InputError(
            f"the function's structure or shapes depend on values ({_line(error)}); use jnp.where, lax.cond or masks, "
            "and close over Python values (functools.partial) instead of passing them as inputs"
        ) from error
    except Exception as error:
        if type(error).__name__ == "TraceContextError":  # flax.nnx
            raise InputError(
                f"the function changes a module that lies outside of it ({_line(error)}); split the module "
                "(qjax.nnx.trace does) and merge it inside"
            ) from error
        raise
    if any(isinstance(constant, Tracer) for constant in closed.consts):
        raise InputError("the function keeps arrays of an earlier call outside itself; return them instead")
    return closed


def _line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def _described(closed: Any) -> tuple[Any, ...]:
    """What two equal programs have in common: primitives, shapes, literals and constants, all the way down."""
    constants = tuple(
        (str(getattr(c, "dtype", type(c))), np.shape(c), _bytes(c)) for c in getattr(closed, "consts", ())
    )
    jaxpr = getattr(closed, "jaxpr", closed)
    rows = []
    for equation in jaxpr.eqns:
        literals = tuple(str(atom.val) for atom in equation.invars if hasattr(atom, "val"))
        below = tuple(
            _described(part)
            for value in equation.params.values()
            for part in (value if isinstance(value, tuple) else (value,))
            if hasattr(part, "eqns") or hasattr(part, "jaxpr")
        )
        shapes = tuple(str(atom.aval) for atom in equation.outvars)
        rows.append((equation.primitive.name, literals, shapes, below))
    return constants, tuple(rows)


def _bytes(constant: Any) -> bytes:
    if isinstance(constant, jax.Array) and jnp.issubdtype(constant.dtype, jax.dtypes.prng_key):
        constant = jax.random.key_data(constant)
    return np.asarray(constant).tobytes() if hasattr(constant, "dtype") else b""
