"""Named constructors: one table per family of algorithms, with errors that list what exists."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from qjax.errors import InputError, listed

__all__ = ["Registry"]

T = TypeVar("T")
Constructor = TypeVar("Constructor", bound=Callable[..., Any])


class Registry(Mapping[str, Callable[..., T]], Generic[T]):
    """A mapping from a name to a constructor; `make` checks the name and every option before it calls."""

    def __init__(self, kind: str):
        self.kind = kind
        self._table: dict[str, Callable[..., T]] = {}

    def register(self, name: str) -> Callable[[Constructor], Constructor]:
        """Decorator that adds a constructor under `name`. Raises InputError when the name is taken."""

        def add(constructor: Constructor) -> Constructor:
            if name in self._table:
                raise InputError(f"{self.kind} {name!r} is registered already; choose another name")
            self._table[name] = constructor
            return constructor

        return add

    def make(self, name: str, /, *args: Any, **options: Any) -> T:
        """Build the entry called `name`. Raises InputError for an unknown name or option, listing what exists."""
        if name not in self._table:
            raise InputError(f"unknown {self.kind} {name!r}; there is: {listed(self._table)}")
        constructor = self._table[name]
        parameters = inspect.signature(constructor).parameters
        takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        unknown = [] if takes_any else [option for option in options if option not in parameters]
        if unknown:
            allowed = listed(list(parameters)[len(args) :])
            raise InputError(f"{self.kind} {name!r} has no option {listed(unknown)}; its options are: {allowed}")
        return constructor(*args, **options)

    def __getitem__(self, name: str) -> Callable[..., T]:
        return self._table[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._table)

    def __len__(self) -> int:
        return len(self._table)
