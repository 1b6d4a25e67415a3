"""Named constructors: one table per family of algorithms, with errors that list what exists."""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Generic, TypeVar

from qjax.errors import InputError, listed, nearest_name
from qjax.registry.options import Options, build, options_of
from qjax.registry.source import Unreadable, found_in, options_at

__all__ = ["Registry", "nearest"]

T = TypeVar("T")
Constructor = TypeVar("Constructor", bound=Callable[..., Any])


class Registry(Mapping[str, Callable[..., T]], Generic[T]):
    """A mapping from a name to a constructor; `make` checks the name and every option before it calls.

    Args:
      kind: what the entries are, for messages: "rounding".
      variable: where the registry is, "qjax.rounding.ROUNDINGS". The room's files are searched for the names that
        they register, and a file is imported when one of its names is first asked for: a new file needs no other line.
        None: whatever is registered by then.
    """

    known: ClassVar[dict[str, Registry[Any]]] = {}
    """The registries that have been imported, by their variable."""

    def __init__(self, kind: str, variable: str | None = None):
        if variable is not None:
            self.known[variable] = self
        self.kind = kind
        self.variable = variable
        self._table: dict[str, Callable[..., T]] = {}

    @functools.cached_property
    def _in_files(self) -> Mapping[str, tuple[str, str]]:
        """(module, definition) of the names that the room's files register."""
        if self.variable is None:
            return {}
        room, _, name = self.variable.rpartition(".")
        return found_in(room, name)

    def register(self, name: str) -> Callable[[Constructor], Constructor]:
        """Decorator that adds a constructor under `name`. Raises InputError when the name is taken."""

        def add(constructor: Constructor) -> Constructor:
            planned, _ = self._in_files.get(name, (constructor.__module__, ""))
            if name in self._table or planned != constructor.__module__:
                raise InputError(f"{self.kind} {name!r} is registered already; choose another name")
            self._table[name] = constructor
            return constructor

        return add

    def make(self, name: str, /, *args: Any, **options: Any) -> T:
        """Build the entry called `name`. Raises InputError for an unknown name or option, listing what exists."""
        self.check(name, options, *args)
        return self[name](*args, **options)

    def check(self, name: str, options: Mapping[str, Any], *args: Any) -> None:
        """Raises InputError for an unknown name or option."""
        if name not in self:
            near = nearest(str(name), list(self))
            raise InputError(f"unknown {self.kind} {name!r}; there is: {listed(self)}{near}")
        known = options_of(self[name])
        unknown = [] if known.open else [option for option in options if option not in known]
        if unknown:
            allowed = listed(list(known)[len(args) :])
            near = nearest(unknown[0], list(known)[len(args) :])
            raise InputError(f"{self.kind} {name!r} has no option {listed(unknown)}; its options are: {allowed}{near}")

    def build(self, options: Mapping[str, Any], *given: Any) -> T:
        """The entry that a mapping of YAML values describes: `{"name": …, **options}`.

        Lists become tuples, mappings the dataclasses that they stand for. Raises InputError as `make` does.
        """
        name, own = options["name"], {key: value for key, value in options.items() if key != "name"}
        self.check(name, own, *given)
        return build(self[name], own, *given)

    def options(self, name: str) -> Options:
        """The options of an entry, where possible without importing its file. Raises KeyError for an unknown name."""
        if name not in self._table and name in self._in_files:
            with contextlib.suppress(Unreadable):
                return options_at(*self._in_files[name])
        return options_of(self[name])

    def __getitem__(self, name: str) -> Callable[..., T]:
        if name not in self._table and name in self._in_files:
            importlib.import_module(self._in_files[name][0])
        return self._table[name]

    def __contains__(self, name: object) -> bool:
        return name in self._table or name in self._in_files

    def __iter__(self) -> Iterator[str]:
        return iter({**self._in_files, **self._table})

    def __len__(self) -> int:
        return len({**self._in_files, **self._table})


def nearest(word: str, known: list[str]) -> str:
    """`; did you mean …?`, or nothing."""
    near = nearest_name(word, known)
    return "" if near is None else f"; did you mean {near}?"
