"""Make the .ipynb beside every notebook: `python scripts/make_notebooks.py` (`--check` only names the outdated).

The .py files in jupytext's percent format are the source; the .ipynb hold the same cells without outputs.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
import re
import sys
from typing import Any

NOTEBOOKS = pathlib.Path(__file__).resolve().parent.parent / "notebooks"
_CELL = re.compile(r"^# %%(?P<markdown> \[markdown\])?$")


def cells(text: str) -> list[tuple[str, str]]:
    """(kind, source) of every cell, kind "markdown" or "code"; before the first marker stands jupytext's header.

    Raises ValueError for a line of a markdown cell that is no comment.
    """
    found: list[tuple[str, list[str]]] = []
    for number, line in enumerate(text.splitlines(), start=1):
        marker = _CELL.match(line)
        if marker:
            found.append(("markdown" if marker["markdown"] else "code", []))
        elif found and found[-1][0] == "markdown" and line.strip():
            if not line.startswith("#"):
                raise ValueError(f"line {number}: {line!r} is no comment; a markdown cell holds comments only")
            found[-1][1].append(line[2:])
        elif found:
            found[-1][1].append(line)
    return [(kind, "\n".join(lines).strip("\n")) for kind, lines in found]


def notebook(text: str) -> dict[str, Any]:
    """The notebook (nbformat 4.5) of a percent file."""
    made = []
    for index, (kind, source) in enumerate(cells(text)):
        name = hashlib.sha256(f"{index}:{source}".encode()).hexdigest()[:8]
        cell: dict[str, Any] = {"cell_type": kind, "id": name, "metadata": {}}
        cell |= {"execution_count": None, "outputs": []} if kind == "code" else {}
        made.append(cell | {"source": source.splitlines(keepends=True)})
    metadata = {
        "jupytext": {"formats": "ipynb,py:percent"},
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return {"cells": made, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def rendered(path: pathlib.Path) -> str:
    """The .ipynb file of a percent file, as text."""
    return json.dumps(notebook(path.read_text(encoding="utf-8")), indent=1, ensure_ascii=False) + "\n"


def main() -> int:
    """Write, or with --check compare; the status is 1 when something was out of date."""
    stale = []
    for path in sorted(NOTEBOOKS.glob("*.py")):
        pair, text = path.with_suffix(".ipynb"), rendered(path)
        if not pair.exists() or pair.read_text(encoding="utf-8") != text:
            stale.append(pair.name)
            if "--check" not in sys.argv[1:]:
                pair.write_text(text, encoding="utf-8")
    verb = "out of date" if "--check" in sys.argv[1:] else "written"
    print(f"{verb}: {', '.join(stale)}" if stale else "all notebooks are up to date")
    return int(bool(stale) and "--check" in sys.argv[1:])


if __name__ == "__main__":
    raise SystemExit(main())
