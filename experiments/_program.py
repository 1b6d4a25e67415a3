#!/usr/bin/env python3
"""The program `qjax`: its commands, and the refusal of a stranger's package of the same name.

The wheel installs this file a second time, as the script `qjax`. An entry point would import the package before
anything else, and where a stranger's lies in front nobody would be left to say so: nothing here imports qjax but the
command that is run.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
import pathlib
import re
import runpy
import sys
from importlib import metadata
from typing import NoReturn

__all__ = ["main", "refusal", "refuse_a_stranger"]

DISTRIBUTION = "qjax-compression"
REMEDY = f"pip uninstall qjax {DISTRIBUTION}, then install this one again: pip install -e . in a clone of qjax"
_MARK = re.compile(rf'^__distribution__ = "{DISTRIBUTION}"', re.M)
_VERSION = re.compile(r'^__version__ = "(.+)"', re.M)


def _found() -> pathlib.Path | None:
    """The file that `import qjax` reads; None where there is none, or a folder without `__init__.py`."""
    spec = importlib.util.find_spec("qjax")
    return None if spec is None or spec.origin is None else pathlib.Path(spec.origin)


def _text(file: pathlib.Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace")


def _owns(one: metadata.Distribution, file: pathlib.Path) -> bool:
    listed = (entry for entry in one.files or () if entry.name == file.name)
    return any(pathlib.Path(str(one.locate_file(entry))).resolve() == file.resolve() for entry in listed)


def refusal() -> str | None:
    """Why the qjax that Python finds cannot be used, and the remedy; None where it is this one and whole."""
    file = _found()
    if file is None:
        return f"no whole qjax is installed for {sys.executable} (its qjax/__init__.py is missing); {REMEDY}"
    if not _MARK.search(_text(file)):
        owners = [f"{one.name} {one.version}" for one in metadata.distributions() if _owns(one, file)]
        whose = f"installed by {' and '.join(owners) or 'no distribution'}"
        return f"{file} ({whose}) is another project's qjax, where that of {DISTRIBUTION} should be; {REMEDY}"
    try:
        other = metadata.distribution("qjax")
    except metadata.PackageNotFoundError:
        return None
    if not _owns(other, file):
        return None
    return (
        f"{file.parent} holds the files of two distributions, {DISTRIBUTION} and {other.name} {other.version}, which "
        f"overwrite each other; {REMEDY}"
    )


def refuse_a_stranger() -> None:
    """End a program (`python -m`, status 2) with the refusal; raises ImportError with it elsewhere."""
    problem = refusal()
    if problem is not None and sys.argv[:1] == ["-m"]:
        _fail(problem)
    if problem is not None:
        raise ImportError(problem)


def _fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def commands(home: pathlib.Path) -> dict[str, str]:
    """The entry points beside a package (in it, or in its clone), each with the first line of its docstring."""
    inside = home / "experiments"
    folder = inside if (inside / "quantize.py").is_file() else home.parent / "experiments"
    files = sorted(file for file in folder.glob("*.py") if not file.name.startswith("_"))
    lines = {file.stem: (ast.get_docstring(ast.parse(_text(file))) or "").partition("\n")[0] for file in files}
    return {name: line.partition(": `")[0].rstrip(".") for name, line in lines.items()}


def overview(version: str, known: dict[str, str]) -> str:
    """The text of `qjax --help`."""
    width = max(map(len, known))
    return "\n".join(
        [
            f"qjax {version}: compress language models to 1-4 bits per weight",
            "",
            "usage: qjax <command> [option=value ...]",
            "",
            *(f"  {name:<{width}}  {line}" for name, line in known.items()),
            "",
            "qjax <command> --help lists the options of a command, qjax --version the version and where it lies",
        ]
    )


def main() -> None:
    """Run the command that the first word names, as `python -m qjax.experiments.<command>` does.

    Exits with 2 for a command that does not exist, and where `import qjax` finds another project's package.
    """
    problem, file = refusal(), _found()
    if problem is not None or file is None:
        _fail(str(problem))
    found = _VERSION.search(_text(file))
    version, known = found.group(1) if found else "", commands(file.parent)
    command, *rest = sys.argv[1:] or ["--help"]
    if command in ("-h", "--help"):
        print(overview(version, known))
    elif command == "--version":
        print(f"qjax {version} ({DISTRIBUTION}, {file.parent})")
    elif command in known:
        sys.argv[1:] = rest
        runpy.run_module(f"qjax.experiments.{command}", run_name="__main__", alter_sys=True)
    else:
        near = difflib.get_close_matches(command, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        _fail(f"there is no command {command!r}{hint}; there is: {', '.join(known)}")


if __name__ == "__main__":
    main()
