"""`check(kind, name)`: all laws of a registered entry, one after the other."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence

from qjax import codebooks, rounding
from qjax.data.corpus import SOURCES
from qjax.errors import InputError, listed, suggested
from qjax.hessian.estimators import ESTIMATORS
from qjax.incoherence.families import INCOHERENCE
from qjax.registry import Registry
from qjax.testing import laws, rounding_laws
from qjax.testing.problems import LawBroken, Refused, book

__all__ = ["Outcome", "check"]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a law.

    Attributes:
      law: its name.
      partner: the codebook or rounding that it was tried with; empty where there is none.
      refused: why the pair does not exist; None where the law holds.
    """

    law: str
    partner: str
    refused: str | None = None


_KINDS: Mapping[str, Registry] = {
    "codebook": codebooks.CODEBOOKS,
    "data": SOURCES,
    "hessian": ESTIMATORS,
    "incoherence": INCOHERENCE,
    "rounding": rounding.ROUNDINGS,
}
_ALONE = {"codebook": laws.CODEBOOK, "data": laws.SOURCE, "hessian": laws.HESSIAN, "incoherence": laws.INCOHERENCE}


def check(kind: str, name: str, partners: Sequence[str] | None = None) -> list[Outcome]:
    """The outcomes of all laws for what is registered as `name`.

    A rounding is tried with every codebook, a codebook with every rounding, or with `partners` alone. `kind` is
    "rounding", "codebook", "incoherence", "hessian" or "data". Raises LawBroken with the law, the partner and what was
    found, at the first that does not hold; InputError for a kind or name that there is not.
    """
    if kind not in _KINDS:
        raise InputError(f"there are no laws for {kind!r}{suggested(kind, _KINDS)}; there are for: {listed(_KINDS)}")
    if name not in _KINDS[kind]:
        known = _KINDS[kind]
        raise InputError(f"{kind} {name!r} is not registered{suggested(name, known)}; there is: {listed(known)}")
    outcomes = []
    for law, partner, held in _cases(kind, name, partners):
        try:
            held()
        except Refused as reason:
            outcomes.append(Outcome(law, partner, str(reason)))
        except LawBroken as broken:
            beside = f" with {partner}" if partner else ""
            raise LawBroken(f"{kind} {name!r}{beside}: {law.replace('_', ' ')}: {broken}") from broken
        else:
            outcomes.append(Outcome(law, partner))
    return outcomes


def _cases(kind: str, name: str, partners: Sequence[str] | None) -> Iterator[tuple[str, str, Callable[[], None]]]:
    for law, held in _ALONE.get(kind, {}).items():
        yield law, "", functools.partial(held, name)
    if kind in ("rounding", "codebook"):
        others = codebooks.CODEBOOKS if kind == "rounding" else rounding.ROUNDINGS
        for partner in list(others) if partners is None else partners:
            pair = (name, partner) if kind == "rounding" else (partner, name)
            if book(pair[1]).spec()["name"] != pair[1]:  # a name that stands for other codebooks
                continue
            for law, pair_law in rounding_laws.LAWS.items():
                yield law, partner, functools.partial(pair_law, *pair)
