"""A user's own packages: modules that register algorithms, imported before the configuration is read."""

from __future__ import annotations

import importlib
import os
import pathlib
import sys
import traceback
from collections.abc import Iterable, Sequence
from importlib import metadata

from qjax.configuration.store import CONFIGS
from qjax.errors import InputError

__all__ = ["ENTRY_POINTS", "load", "load_installed", "named"]

ENTRY_POINTS = "qjax.plugins"
"""The group of entry points that an installed package names its modules in."""


def named(arguments: Sequence[str]) -> list[str]:
    """The modules that a command line names: `plugins=[my.module]`, or those in the file of its `experiment=`."""
    found: list[str] = []
    folders = [CONFIGS, *_folders(arguments)]
    for argument in arguments:
        key, _, value = argument.lstrip("+").partition("=")
        if key == "plugins":
            found += _listed(value)
        elif key in ("experiment", "preset", "debug"):
            for folder in folders:
                for name in value.split(","):
                    found += _in_file(folder / key / f"{name}.yaml")
    return list(dict.fromkeys(found))


def _folders(arguments: Sequence[str]) -> list[pathlib.Path]:
    """The user's own folders of configuration files: `--config-dir`, `hydra.searchpath`."""
    found = []
    for index, argument in enumerate(arguments):
        key, _, value = argument.partition("=")
        if key in ("--config-dir", "-cd"):
            found += [value or (arguments[index + 1] if index + 1 < len(arguments) else "")]
        elif key == "hydra.searchpath":
            found += [place.removeprefix("file://") for place in _listed(value)]
    return [pathlib.Path(place) for place in found if place]


def _listed(text: str) -> list[str]:
    return [word.strip().strip("'\"") for word in text.strip().strip("[]").split(",") if word.strip()]


def _in_file(file: pathlib.Path) -> list[str]:
    """`plugins:` of a YAML file; nothing where it cannot be read, which Hydra then says."""
    if not file.is_file():
        return []
    import yaml

    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return []
    value = content.get("plugins") if isinstance(content, dict) else None
    return [value] if isinstance(value, str) else [str(name) for name in value or []]


def load(modules: Iterable[str] | str) -> int:
    """Import modules, each once, and return how many were new; the folder of the call is searched as well.

    Raises InputError naming the module and what went wrong in it.
    """
    here, new = os.getcwd(), 0
    for name in [modules] if isinstance(modules, str) else modules:
        if name in sys.modules:
            continue
        if here not in sys.path and "" not in sys.path:
            sys.path.append(here)
        try:
            importlib.import_module(name)
        except Exception as error:
            raise InputError(f"plugins: {name!r} cannot be imported: {_cause(error, name)}") from error
        new += 1
    return new


def _cause(error: Exception, name: str) -> str:
    """The error, and where in the user's files it was raised."""
    if isinstance(error, ModuleNotFoundError) and error.name is not None and name.startswith(error.name):
        return f"there is no module {error.name!r}; run where it lies, set PYTHONPATH, or install its package"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "importlib" not in frame.filename]
    place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"


def load_installed() -> int:
    """Import what installed packages name under the entry point `qjax.plugins`, and return how many there are.

    Raises InputError as `load` does.
    """
    points = metadata.entry_points(group=ENTRY_POINTS)
    for point in points:
        try:
            point.load()
        except Exception as error:
            owner = point.dist.name if point.dist is not None else "?"
            raise InputError(
                f"plugins: the entry point {point.name!r} ({point.value}) of the package {owner!r} cannot be loaded: "
                f"{_cause(error, point.module)}; repair or uninstall that package"
            ) from error
    return len(points)
