"""The linears of a block, derived from one abstract evaluation of its forward pass.

No linear is listed by hand: the block is traced on shapes alone, `linear` records what it is asked for, and every
answer is replaced by a free variable. Linears that read the same array share a *site*; which answers reach an input
tells which linears follow upon which.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from qjax.models.config import ModelConfig
from qjax.models.context import Context
from qjax.models.families import family, paths
from qjax.models.linear import linear_weight, recorded

__all__ = ["Linear", "Structure", "abstract_block", "structure", "unnumbered"]


@dataclasses.dataclass(frozen=True)
class Linear:
    """One linear of a block.

    Attributes:
      name: its place in the block's parameters, e.g. "mlp.down_proj".
      site: the name of the first linear that reads the same input.
      out: outputs.
      inner: inputs.
      row_parallel: on a mesh its inputs are shared out among devices and its outputs summed: they come from linears
        whose outputs are shared out. Otherwise every device has the whole input and makes its own outputs.
      expert: the number of the expert whose it is; it reads the tokens that are routed to it. None for all others.
    """

    name: str
    site: str
    out: int
    inner: int
    row_parallel: bool
    expert: int | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.out, self.inner


@dataclasses.dataclass(frozen=True)
class Structure:
    """The linears of a block, in the order of the forward pass."""

    linears: tuple[Linear, ...]

    @functools.cached_property
    def sites(self) -> dict[str, str]:
        """The site of every linear, by name."""
        return {linear.name: linear.site for linear in self.linears}

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) of every linear, by name."""
        return {linear.name: linear.shape for linear in self.linears}

    @functools.cached_property
    def widths(self) -> dict[str, int]:
        """The input width at every site."""
        return {linear.site: linear.inner for linear in self.linears}

    @functools.cached_property
    def experts(self) -> dict[str, int]:
        """The number of the expert of every linear that has one, by name."""
        return {linear.name: linear.expert for linear in self.linears if linear.expert is not None}

    @functools.cached_property
    def stacks(self) -> dict[str, tuple[str, ...]]:
        """Sites of experts that differ in the expert alone, in order, by their name without its number.

        Their inputs have equal shapes, and what is summed of them is kept in one array.
        """
        found: dict[str, list[str]] = {}
        for site in self.widths:
            if site in self.experts:
                found.setdefault(unnumbered(site, self.experts[site]), []).append(site)
        return {name: tuple(sites) for name, sites in found.items()}

    @functools.cached_property
    def own_inputs(self) -> frozenset[str]:
        """The stacks whose experts read inputs of their own: they follow upon another linear of the same expert."""
        follows = {linear.name for linear in self.linears if linear.row_parallel}
        return frozenset(name for name, sites in self.stacks.items() if sites[0] in follows)

    @functools.cached_property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """The linears of every site, in order: those that can be quantised before anything behind them is known.

        The sites of a stack are one group: experts do not follow upon one another.
        """
        stack = {site: name for name, sites in self.stacks.items() for site in sites}
        keys = dict.fromkeys(stack.get(site, site) for site in self.widths)
        return tuple(tuple(name for name, own in self.sites.items() if stack.get(own, own) == key) for key in keys)


def unnumbered(name: str, expert: int) -> str:
    """The name of an expert's linear without its number: `mlp.experts.up_proj` of `mlp.experts.3.up_proj`."""
    return ".".join(part for part in name.split(".") if part != str(expert))


def abstract_block(config: ModelConfig) -> dict[str, Any]:
    """The parameters of a block as shapes, float32."""
    tensors = family(config).block_tensors(config)
    tree: dict[str, Any] = {}
    for name, path in paths(tensors).items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = jax.ShapeDtypeStruct(tensors[name], jnp.float32)
    return tree


@functools.cache
def structure(config: ModelConfig) -> Structure:
    """The structure of the model's blocks. Raises ValueError for a block that multiplies with a weight twice."""
    parameters, tensors = abstract_block(config), family(config).block_tensors(config)
    found = {".".join(path[:-1]): tensors[name] for name, path in paths(tensors).items() if path[-1] == "weight"}
    shapes = {name: shape for name, shape in found.items() if len(shape) == 2}
    answers = {name: jax.ShapeDtypeStruct((1, 2, shape[0]), jnp.float32) for name, shape in shapes.items()}
    order: list[str] = []
    sites: dict[str, str] = {}
    experts: dict[str, int | None] = {}

    def run(parameters: Any, x: Any, answers: dict[str, Any]) -> list[Any]:
        """The input of every linear, in order, as a function of the answers of the others."""
        weights = {id(linear_weight(parameters, name)): name for name in shapes}
        with recorded({key: answers[name] for key, name in weights.items()}) as record:
            family(config).block(parameters, x, Context(config))
        order[:] = [weights[id(weight)] for weight in record.weights]
        first: dict[int, str] = {}
        sites.update({name: first.setdefault(id(x), name) for name, x in zip(order, record.inputs, strict=True)})
        experts.update(zip(order, record.experts, strict=True))
        return record.inputs

    x = jax.ShapeDtypeStruct((1, 2, config.hidden_size), jnp.float32)
    traced = jax.make_jaxpr(run)(parameters, x, answers)
    if len(set(order)) != len(order):
        raise ValueError(f"{config.architecture}: a block multiplies with one weight twice: {order}")
    variables = dict(zip(traced.jaxpr.invars[-len(answers) :], sorted(answers), strict=True))  # dictionaries are sorted
    before = dict(zip(order, _reached(traced.jaxpr, variables), strict=True))
    rows: set[str] = set()
    for name in order:
        if before[name] - rows:  # a summed output is whole again
            rows.add(name)
    return Structure(tuple(Linear(name, sites[name], *shapes[name], name in rows, experts[name]) for name in order))


def _reached(jaxpr: Any, variables: dict[Any, str]) -> list[frozenset[str]]:
    """Of every output, the names of the variables that it depends on."""
    known: dict[Any, frozenset[str]] = {variable: frozenset([name]) for variable, name in variables.items()}
    read = lambda atom: frozenset() if hasattr(atom, "val") else known.get(atom, frozenset())  # noqa: E731  (a literal)
    for equation in jaxpr.eqns:
        found = frozenset().union(*map(read, equation.invars))
        known |= dict.fromkeys(equation.outvars, found)
    return [read(atom) for atom in jaxpr.outvars]
