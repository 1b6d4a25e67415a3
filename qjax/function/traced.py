"""Any JAX function as a model: its linears found, measured and replaced."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.errors import DataError, InputError, listed, suggested
from qjax.function import files, views
from qjax.function.evaluate import Held, evaluate
from qjax.function.moments import input_hessians
from qjax.function.pieces import Pieces
from qjax.function.program import Program, abstract, leaf_name, program
from qjax.function.quantize import quantized
from qjax.function.sites import LinearSite, leaf_names
from qjax.function.sketches import sketch_hessians
from qjax.hessian.sketch import Sketch
from qjax.linalg.kronecker import Hessian
from qjax.matrix.operator import is_operator
from qjax.matrix.quantize import MatrixReport

__all__ = ["Traced", "trace"]


def trace(function: Callable[..., Any], params: Any, *inputs: Any, unused: str = "refuse") -> Traced:
    """`function(params, *inputs)` as a model whose linears can be measured and replaced.

    A linear is a parameter that enters a `dot_general`, or a convolution whose windows do not overlap, through
    reshapes, transposes, casts, squeezes and slices; inside jit, remat, cond, scan, custom_jvp and custom_vjp too (of
    the last two the products' derivative is then JAX's own, not the custom one).

    Args:
      function: of arrays to arrays, without side effects. flax.linen: `module.apply`.
      params: a pytree of arrays.
      inputs: arrays, or pytrees of them, of the shapes that batches have (others are traced when they come).
      unused: what becomes of a parameter that no output needs: "refuse" it, or "leave" it as it is.

    Raises InputError for parameters or inputs that are no arrays, functions that no program can say (side effects,
    Python-side randomness, data-dependent shapes), unused parameters, and functions without a linear.
    """
    paths, structure = jax.tree_util.tree_flatten_with_path(params)
    for path, leaf in paths:
        if not _is_array(leaf):
            raise InputError(
                f"parameter {leaf_name(path)} is {leaf!r:.80} ({type(leaf).__name__}); parameters are arrays: close "
                "over anything else"
            )
    for path, leaf in jax.tree_util.tree_flatten_with_path(inputs)[0]:
        if not _is_array(leaf) and not isinstance(leaf, bool | int | float | complex):
            raise InputError(
                f"input {leaf_name(path)} is {leaf!r:.80} ({type(leaf).__name__}); inputs are arrays: close over "
                "anything else (functools.partial)"
            )
    if unused not in ("refuse", "leave"):
        raise InputError(f"unused is {unused!r}; it is 'refuse' or 'leave'")
    leaves = [leaf for _, leaf in paths]
    names = leaf_names([path for path, _ in paths])
    found = program(function, structure, leaves, names, inputs)
    for number in found.unused if unused == "refuse" else ():
        raise InputError(
            f"parameter {'.'.join(names[number])} is needed by no output; take it out of the parameters, return what "
            "it is for, or trace with unused='leave'"
        )
    traced = Traced(function, structure, tuple(leaves), names, jax.tree.structure(inputs))
    traced.keep(inputs, found)
    if not traced.linears:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in found.sites.left.items())
        raise InputError(f"the function has no linear: {reasons or 'no parameter enters a product'}")
    return traced


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


class Traced:
    """A function as a model.

    Attributes:
      linears: `LinearSite`s by name, in the program's order.
      left: why a parameter was not taken, by its key path.
      reports: of the matrices of the last `quantize`.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        structure: Any,
        leaves: tuple[Any, ...],
        names: list[list[str]],
        inputs: Any,
    ):
        self._function, self._structure, self._leaves = function, structure, leaves
        self._names, self._inputs = names, inputs
        self._programs: dict[Any, Program] = {}
        self._first: Program | None = None
        self.reports: tuple[MatrixReport, ...] = ()

    @property
    def linears(self) -> dict[str, LinearSite]:
        """The linears by name."""
        assert self._first is not None
        return self._first.sites.linears

    @property
    def left(self) -> dict[str, str]:
        """Why a parameter was not taken, by name."""
        assert self._first is not None
        return self._first.sites.left

    @property
    def params(self) -> Any:
        """The parameters that the function was traced with."""
        return jax.tree.unflatten(self._structure, self._leaves)

    def __repr__(self) -> str:
        matrices = sum(len(site.matrices) for site in self.linears.values())
        return f"Traced({len(self.linears)} linears, {matrices} matrices; {len(self.left)} parameters not taken)"

    def keep(self, inputs: Sequence[Any], found: Program) -> None:
        """Remember the program for inputs of these shapes."""
        self._programs[_key(inputs)] = found
        self._first = self._first or found

    def program(self, inputs: Sequence[Any]) -> Program:
        """The program for inputs of these shapes. Raises InputError for one with other linears."""
        key = _key(inputs)
        if key not in self._programs:
            found = program(self._function, self._structure, self._leaves, self._names, inputs)
            views = lambda sites: {name: (s.view, s.stack) for name, s in sites.items()}  # noqa: E731
            if views(found.sites.linears) != views(self.linears):
                raise InputError(
                    f"with inputs {_shapes(inputs)} the function has other linears "
                    f"({listed(found.sites.linears)}) than it was traced with ({listed(self.linears)}); trace it with "
                    "inputs like these"
                )
            self.keep(inputs, found)
        return self._programs[key]

    def hessians(
        self,
        batches: Iterable[Any],
        estimator: str = "input",
        *,
        params: Any = None,
        loss: Callable[..., Any] | None = None,
        **sketch: Any,
    ) -> dict[str, Hessian]:
        """The Hessian of every linear over batches, each the inputs of a call (a tuple, or the only one as it is).

        Linears that share an input share the array; those of a stack are `[*stack, in, in]`. One compiled step per
        shape of batch.

        Args:
          batches: an iterable; a sequence for sketches, which pass over it more than once.
          estimator: "input", `E[x xᵀ]`; "sketch_a", "sketch_b": Kronecker factors from gradients (`qjax.hessian`).
            Every input then has sequences as leading axis.
          params: in place of those of the trace; dense.
          loss: `loss(output, *inputs)` of one sequence for sketches; None: the output is logits, whose own softmax
            gives the labels.
          sketch: `rounds`, `labels`, `seed` of `qjax.hessian.Sketch`.

        Raises InputError for batches of another structure, DataError for none, NumericsError for values that are not
        finite.
        """
        leaves = self._leaves if params is None else self._dense_leaves(params)
        if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves):
            raise InputError("the function was traced on shapes; give params= for Hessians")
        if estimator == "input":
            if sketch or loss is not None:
                given = listed([*sketch, *(["loss"] if loss is not None else [])])
                raise InputError(f"{given}: options of the estimators sketch_a and sketch_b, not of 'input'")
            return input_hessians(self._checked(batches), leaves, {})
        if estimator not in ("sketch_a", "sketch_b"):
            known = ("input", "sketch_a", "sketch_b")
            raise InputError(
                f"unknown Hessian estimator {estimator!r}{suggested(estimator, known)}; there is: {', '.join(known)}"
            )
        options = Sketch(estimator, **sketch)
        if options.compute != "float32":
            raise InputError(f"compute is {options.compute!r}; sketches of a function compute as it does")
        batches = batches if isinstance(batches, Sequence) else list(batches)
        moments = input_hessians(self._checked(batches), leaves, {}) if estimator == "sketch_a" else None

        def split() -> Iterator[Any]:
            for number, batch in enumerate(batches):
                inputs = self._batch(batch, number)
                flat, structure = jax.tree.flatten(inputs)
                sizes = {np.shape(a)[:1] for a in flat}
                if len(sizes) != 1 or sizes == {()}:
                    raise InputError(
                        f"batch {number} has inputs {_shapes(inputs)}; for sketches all have the same leading axis, "
                        "sequences"
                    )
                yield [np.asarray(a) if not isinstance(a, jax.Array) else a for a in flat], structure

        def one(inputs: Sequence[Any]) -> Any:
            found = self.program(jax.tree.unflatten(self._inputs, inputs))
            return found, found.output

        return sketch_hessians(split, one, leaves, options, loss, moments)

    def _batch(self, batch: Any, number: int) -> tuple[Any, ...]:
        inputs = tuple(batch) if isinstance(batch, tuple | list) else (batch,)
        if jax.tree.structure(inputs) != self._inputs:
            raise InputError(
                f"batch {number} is {jax.tree.structure(inputs)}; the function was traced with inputs {self._inputs}"
            )
        return inputs

    def _checked(self, batches: Iterable[Any]) -> Iterator[tuple[Program, list[Any]]]:
        number = -1
        for number, batch in enumerate(batches):
            inputs = self._batch(batch, number)
            yield self.program(inputs), jax.tree.leaves(inputs)
        if number < 0:
            raise DataError("there are no calibration batches; at least one is needed")

    def quantize(
        self,
        hessians: Mapping[str, Any],
        recipe: Any,
        *,
        bits: float | None = None,
        key: Any = 0,
        params: Any = None,
        on_layer: Callable[[MatrixReport], None] | None = None,
    ) -> Any:
        """The parameters with operators in the place of all linears that the recipe does not skip.

        Every matrix of a stack is quantised by itself, seeded by its own name; a stack needs the same settings
        throughout. `reports` holds those of the matrices afterwards.

        Args:
          hessians: of `hessians`, or arrays `[*stack, in, in]`, by the linear's name.
          recipe: a preset's name or a `qjax.Recipe` without tuning; `hessians` stand in the place of its own.
          bits: per weight, in place of the recipe's.
          key: a seed, or `jax.random.key(seed)`.
          params: dense ones in place of those of the trace.
          on_layer: called with the report of every matrix.

        Raises InputError for a recipe or Hessians that do not fit, NumericsError as `quantize_matrix`.
        """
        leaves = list(self._leaves if params is None else self._dense_leaves(params))
        operators, reports = quantized(self.linears, leaves, hessians, recipe, bits, key, on_layer)
        self.reports = tuple(reports)
        return self.with_operators(operators, jax.tree.unflatten(self._structure, leaves))

    def with_operators(self, operators: Mapping[str, Any], params: Any = None) -> Any:
        """The parameters with these operators in the place of linears, by name.

        Raises InputError for unknown names, and for a parameter of which only some slices are given.
        """
        for name, operator in operators.items():
            if name not in self.linears:
                raise InputError(f"there is no linear {name!r}{suggested(name, self.linears)}: {listed(self.linears)}")
            site = self.linears[name]
            if tuple(operator.shape) != (*site.stack, *site.shape):
                raise InputError(
                    f"{name} is {[*site.stack, *site.shape]}; what shall stand in its place is {list(operator.shape)}"
                )
        leaves = list(self._leaves if params is None else self._dense_leaves(params))
        for leaf, sites in self._by_leaf().items():
            given = {site.name: operators[site.name] for site in sites if site.name in operators}
            if not given:
                continue
            if missing := [site.name for site in sites if site.name not in given]:
                raise InputError(f"{missing[0]} is a slice of a parameter whose other slices are replaced; replace all")
            if len(sites) == 1 and not views.sliced(sites[0].view):
                leaves[leaf] = given[sites[0].name]
            else:
                ordered = tuple(self.linears[name].view for name in sorted(given))
                leaves[leaf] = Pieces(given, ordered, tuple(np.shape(leaves[leaf])))
        return jax.tree.unflatten(self._structure, leaves)

    def operators(self, params: Any) -> dict[str, Any]:
        """The operators in parameters by the name of their linear."""
        leaves = self._flat(params)
        found = {}
        for name, site in self.linears.items():
            leaf = leaves[site.leaf]
            if isinstance(leaf, Pieces):
                found[name] = leaf.operators[name]
            elif is_operator(leaf):
                found[name] = leaf
        return found

    def dense(self, params: Any) -> Any:
        """The parameters with dense arrays of the original dtype in the place of operators."""
        return jax.tree.unflatten(self._structure, self._dense_leaves(params))

    def save(self, params: Any, folder: str | pathlib.Path) -> None:
        """Write parameters with operators to a folder, which `load` of the same function reads.

        Raises InputError for a folder with something else in it.
        """
        operators, leaves = self.operators(params), self._flat(params)
        dense = {name: leaf for name, leaf in zip(self._paths, leaves, strict=True) if not _is_replaced(leaf)}
        files.write(folder, files.structure(self.linears, self._paths, self._leaves), operators, dense)

    def load(self, folder: str | pathlib.Path) -> Any:
        """The parameters of `save`.

        Raises ArtifactError for a folder that is damaged or of a function with other linears or parameters.
        """
        operators, dense = files.read(folder, files.structure(self.linears, self._paths, self._leaves))
        leaves = [
            jnp.asarray(dense[name]) if name in dense else jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype)
            for name, leaf in zip(self._paths, self._leaves, strict=True)
        ]
        return self.with_operators(operators, jax.tree.unflatten(self._structure, leaves))

    @property
    def _paths(self) -> list[str]:
        return [".".join(name) for name in self._names]

    def __call__(self, params: Any, *inputs: Any) -> Any:
        """The function's output with these parameters, dense or operators; under jit, grad and vmap as well."""
        leaves = self._flat(params)
        if not any(_is_replaced(leaf) for leaf in leaves):
            return self._function(params, *inputs)
        if jax.tree.structure(inputs) != self._inputs:
            raise InputError(
                f"the inputs are {jax.tree.structure(inputs)}; the function was traced with {self._inputs}"
            )
        found = self.program(inputs)
        numbers = {name: number for number, name in enumerate(self.linears)}
        held: list[Any] = []
        for number, leaf in enumerate(leaves):
            if isinstance(leaf, Pieces):
                held.append(Held({numbers[name]: own for name, own in leaf.operators.items()}))
            elif is_operator(leaf):
                (site,) = self._by_leaf()[number]
                held.append(Held({numbers[site.name]: leaf}))
            else:
                held.append(leaf)
        flat = [jnp.asarray(a, abstract(a).dtype) for a in jax.tree.leaves(inputs)]
        outputs, _ = evaluate(found.closed, [*held, *flat], found.uses, found.sites.of_use)
        return jax.tree.unflatten(found.output, outputs)

    def _by_leaf(self) -> dict[int, list[LinearSite]]:
        result: dict[int, list[LinearSite]] = {}
        for site in self.linears.values():
            result.setdefault(site.leaf, []).append(site)
        return result

    def _flat(self, params: Any) -> list[Any]:
        leaves, structure = jax.tree.flatten(params, is_leaf=_is_replaced)
        if structure != self._structure:
            raise InputError(f"the parameters are {structure}; the function was traced with {self._structure}")
        for number, (leaf, original) in enumerate(zip(leaves, self._leaves, strict=True)):
            name = ".".join(self._names[number])
            if _is_replaced(leaf):
                if number not in self._by_leaf():
                    reason = self.left.get(name, "it enters no product")
                    raise InputError(f"an operator stands in the place of {name}, which is no linear: {reason}")
            elif np.shape(leaf) != np.shape(original):
                raise InputError(f"parameter {name} is {list(np.shape(leaf))}; it was {list(np.shape(original))}")
        return leaves

    def _dense_leaves(self, params: Any) -> list[Any]:
        leaves = self._flat(params)
        sites = self._by_leaf()
        for number, leaf in enumerate(leaves):
            dtype = abstract(self._leaves[number]).dtype
            if isinstance(leaf, Pieces):
                leaves[number] = leaf.dense(dtype)
            elif is_operator(leaf):
                leaves[number] = views.undo(sites[number][0].view, leaf.dequantize()).astype(dtype)
        return leaves


def _is_replaced(node: Any) -> bool:
    return isinstance(node, Pieces) or is_operator(node)


def _key(inputs: Sequence[Any]) -> Any:
    flat, structure = jax.tree.flatten(tuple(inputs))
    return structure, tuple((tuple(np.shape(a)), str(abstract(a).dtype)) for a in flat)


def _shapes(inputs: Sequence[Any]) -> str:
    return ", ".join(f"{abstract(a).dtype}{list(np.shape(a))}" for a in jax.tree.leaves(tuple(inputs)))
