"""Which codebook, rounding, incoherence and scale every layer of a model gets: one recipe with ordered exceptions."""

from __future__ import annotations

import dataclasses
import numbers
import re
from collections.abc import Mapping, Sequence
from typing import Any

from qjax import codebooks
from qjax.codebooks.base import CODEBOOKS, Codebook
from qjax.codebooks.scaling import ScaleRule
from qjax.errors import InputError, suggested
from qjax.incoherence.families import Incoherence
from qjax.matrix.arguments import Short, incoherence_of, named, rounding_of, scale_of
from qjax.models.edges import EDGES, Edge
from qjax.pipeline.hessians import check_settings
from qjax.pipeline.options import named_options
from qjax.pipeline.tuning import check_tuning
from qjax.registry import NotNegative, Positive, check_options
from qjax.rounding.base import Rounding

__all__ = ["LayerPlan", "LayerRule", "Recipe"]


@dataclasses.dataclass(frozen=True)
class LayerRule:
    """An exception for the layers whose name contains a match of `pattern` (a regular expression).

    Embedding and head, "embed" and "head", stay as they are unless a rule names them: their name stands in its pattern.

    Attributes:
      skip: leave the layer as it is.
      bits: other bits per weight.
      codebook: another codebook, as `{"name": …, **options}`.
      rounding: another rounding, a name or `{"name": …, **options}`.
      incoherence: likewise, another incoherence; "none" for none.
      damping: another damping.
      scale: another scale: a number (the RMS the codebook sees), a method or `{"method": …, **options}`.
    """

    pattern: str
    skip: bool = False
    bits: Positive | None = None
    codebook: Mapping[str, Any] | None = None
    damping: NotNegative | None = None
    scale: Short = None
    rounding: Short = None
    incoherence: Short = None

    def __post_init__(self) -> None:
        check_options(self, "rules")
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise InputError(
                f"rules: {self.pattern!r} is not a regular expression ({error}); fix the pattern"
            ) from error
        made = {"scale": scale_of, "rounding": rounding_of, "incoherence": incoherence_of}
        for name, make in made.items():
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, make(value))
        changes = [field.name for field in dataclasses.fields(self) if field.name not in ("pattern", "skip")]
        if not self.skip and all(getattr(self, name) is None for name in changes):
            raise InputError(f"rules: {self.pattern!r} changes nothing; give skip or some of {', '.join(changes)}")

    def names_edge(self, name: str) -> bool:
        """Whether the rule is for the embedding or head of this name: a pattern for all layers is not."""
        return name in self.pattern and re.search(self.pattern, name) is not None


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """The treatment of one layer."""

    codebook: Codebook
    rounding: Rounding
    incoherence: Incoherence
    scale: float | ScaleRule | None
    damping: float


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The settings by which a model is quantised; the defaults are the command line's.

    Short forms are made whole: a name becomes what it names (`qjax.matrix.arguments`).

    Attributes:
      codebook: `{"name": …, **options}` or a name; its bits stand in `bits`.
      bits: per weight.
      rounding: an algorithm, a name or `{"name": …, **options}`.
      incoherence: likewise, None for none.
      scale: a `ScaleRule`, its method or mapping; a number is the RMS that the codebook sees; None the codebook's own.
      damping: added to the Hessian, as a fraction of its mean diagonal.
      rules: ordered exceptions, `LayerRule`s or mappings; the first that matches a layer's name applies.
      hessian: the options of the Hessians; given as a name ("original", "sequential", "corrected", "sketch_a",
        "sketch_b"), `{"name": …, **options}`, or all options.
      finetune: the options of tuning in the same forms ("block", "e2e", "lora", "pv", "qat"), None for none.

    Raises InputError for names and options that do not exist, with the nearest, and for values of another type.
    """

    codebook: Short = "half_integer"
    bits: Short = 2
    rounding: Short = "ldlq"
    incoherence: Short = "hadamard"
    scale: Short = None
    damping: Short = 0.01
    rules: Sequence[Any] = ()
    hessian: Short = "sequential"
    finetune: Short = None

    def __post_init__(self) -> None:
        for name, value in (("bits", self.bits), ("damping", self.damping)):
            if isinstance(value, bool) or not isinstance(value, numbers.Real):
                raise InputError(f"{name} is {value!r} ({type(value).__name__}); it is a number")
            if not 0 <= float(value) < float("inf"):
                raise InputError(f"{name} is {value}; it is finite and not negative")
        tuning = named_options("finetune", "none" if self.finetune is None else self.finetune)
        whole = {
            "codebook": _codebook(self.codebook),
            "rounding": rounding_of(self.rounding),
            "incoherence": incoherence_of(self.incoherence),
            "scale": scale_of(self.scale),
            "rules": tuple(map(_rule, self.rules or ())),
            "hessian": named_options("hessian", self.hessian),
            "finetune": None if tuning["name"] == "none" else tuning,
        }
        for name, value in whole.items():
            object.__setattr__(self, name, value)
        check_settings(self.hessian)
        check_tuning(self.finetune, self.hessian)
        if self.finetune is not None and (named := [rule.pattern for rule in self.rules if self._quantises_edge(rule)]):
            raise InputError(
                f"rules: {named[0]!r} quantises the embedding or the head, and finetune is {self.finetune['name']!r}: "
                "tuning keeps those as arrays; leave out the rule, or use finetune=none"
            )

    @staticmethod
    def _quantises_edge(rule: LayerRule) -> bool:
        return not rule.skip and any(rule.names_edge(name) for name in EDGES)

    def edge_rule(self, name: str, edge: Edge) -> LayerRule | None:
        """The rule that quantises a matrix outside of the blocks, None where it stays as it is.

        Raises InputError for two rules that say different things of one matrix.
        """
        names = EDGES if edge.tied else (name,)
        rules = [next((rule for rule in self.rules if rule.names_edge(own)), None) for own in names]
        found = [rule for rule in rules if rule is not None]
        if len(found) == 2 and dataclasses.replace(found[0], pattern=found[1].pattern) != found[1]:
            raise InputError(
                f"rules: {found[0].pattern!r} and {found[1].pattern!r} say different things of one matrix: the head of "
                "this model is its embedding (tie_word_embeddings); give one rule, for embed or for both"
            )
        return None if not found or found[0].skip else found[0]

    def edges(self, matrices: Mapping[str, Edge]) -> dict[str, LayerPlan]:
        """The plans of those matrices outside of the blocks that rules name; the others stay as they are.

        Raises InputError as `edge_rule`, and for an embedding whose rows could not be looked up.
        """
        books: dict[str, Codebook] = {}
        plans = {}
        for name, edge in matrices.items():
            rule = self.edge_rule(name, edge)
            if rule is None:
                continue
            plans[name] = self._layer(rule, books)
            if name == "embed":
                _check_rows(plans[name], rule.pattern)
        return plans

    def plan(self, names: Sequence[str]) -> dict[str, LayerPlan | None]:
        """The plan of every layer, None for layers that are left as they are.

        Raises InputError for a rule that applies to no layer (a typing error, or one shadowed by an earlier rule),
        for unknown codebooks, options or bits, and when nothing is left to quantise.
        """
        if not self.damping >= 0:
            raise InputError(f"damping is {self.damping}; it is a fraction of the mean diagonal, 0 or more")
        used: set[int] = set()
        books: dict[str, Codebook] = {}
        plans: dict[str, LayerPlan | None] = {}
        for name in names:
            index = next((i for i, rule in enumerate(self.rules) if re.search(rule.pattern, name)), None)
            rule = None if index is None else self.rules[index]
            used |= set() if index is None else {index}
            plans[name] = None if rule is not None and rule.skip else self._layer(rule, books)
        for i, rule in enumerate(self.rules):
            if i not in used and not any(rule.names_edge(name) for name in EDGES):
                raise InputError(
                    f"rules: {rule.pattern!r} applies to no layer (no name matches, or earlier rules take them all); "
                    f"names look like {names[0]} … {names[-1]}"
                )
        if not any(plans.values()) and not any(map(self._quantises_edge, self.rules)):
            raise InputError("rules: every layer is skipped; nothing is left to quantise")
        return plans

    def _layer(self, rule: LayerRule | None, books: dict[str, Codebook]) -> LayerPlan:
        bits = self.bits if rule is None or rule.bits is None else rule.bits
        options = self.codebook if rule is None or rule.codebook is None else rule.codebook
        known = repr((dict(options), bits))
        if known not in books:
            books[known] = codebooks.make(bits=bits, **options)
        return LayerPlan(
            codebook=books[known],
            rounding=self.rounding if rule is None or rule.rounding is None else rule.rounding,
            incoherence=self.incoherence if rule is None or rule.incoherence is None else rule.incoherence,
            scale=self.scale if rule is None or rule.scale is None else rule.scale,
            damping=self.damping if rule is None or rule.damping is None else rule.damping,
        )


def _check_rows(plan: LayerPlan, pattern: str) -> None:
    """Raises InputError for a plan of an embedding whose rows could not be looked up one by one."""
    incoherence: Any = plan.incoherence
    if plan.incoherence.name != "none" and getattr(incoherence, "side", "both") != "input":
        raise InputError(
            f"rules: {pattern!r}: the rows of an embedding are looked up, and incoherence={plan.incoherence.name} "
            "mixes them; put incoherence: none into the rule, or {name: …, side: input}"
        )
    if plan.codebook.tile[0] > 1:
        raise InputError(
            f"rules: {pattern!r}: the rows of an embedding are looked up, and codebook "
            f"{plan.codebook.spec()['name']} codes {plan.codebook.tile[0]} rows together; put codebook: {{name: grid}} "
            "into the rule"
        )


def _codebook(value: Any) -> dict[str, Any]:
    """`{"name": …, **options}` of a codebook without its bits."""
    if isinstance(value, Codebook):
        value = value.spec()
    options = named(value, CODEBOOKS, "codebook")
    if "bits" in options:
        raise InputError(f"codebook is {options}; bits of a recipe stand in Recipe(bits=…), or by layer in its rules")
    return options


def _rule(value: Any) -> LayerRule:
    """A rule, also of a mapping. Raises InputError for keys that do not exist, or without a pattern."""
    if isinstance(value, LayerRule):
        return value
    known = [field.name for field in dataclasses.fields(LayerRule)]
    if not isinstance(value, Mapping) or "pattern" not in value or set(value) - set(known):
        other = sorted(set(value) - set(known)) if isinstance(value, Mapping) else []
        near = suggested(other[0], known) if other else ""
        allowed = ", ".join(sorted(set(known) - {"pattern"}))
        raise InputError(f"rules: {value!r} is not a rule{near}; give pattern and some of {allowed}")
    return LayerRule(**value)
