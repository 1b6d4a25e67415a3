"""`model=<folder, file or hub name>` on the command line, in the grammar that Hydra has for it."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

import yaml

from qjax.configuration.groups import ENTRIES
from qjax.configuration.store import CONFIGS

__all__ = ["spelled"]

_SHIPPED = CONFIGS / "model"


def spelled(arguments: Sequence[str], entry: str) -> list[str]:
    """The words of a command line, with `model=` a source where it is one.

    Where models are a group, `model=path` becomes `model=hf model.source='path'`; elsewhere also a group's name such as
    `model=tiny` becomes its source.
    """
    words: list[str] = []
    for word in arguments:
        found = re.fullmatch(r"\+?model=([^{].*)", word)
        source = None if found is None else _source(found[1], grouped="model" in ENTRIES[entry].groups)
        if source is None:
            words.append(word)
        elif "model" in ENTRIES[entry].groups:
            words += ["model=hf", f"model.source={_quoted(source)}"]
        elif entry == "generate":
            words.append(f"model.source={_quoted(source)}")
        else:
            words.append(f"model={{source: {_quoted(source)}}}")
    return words


def _source(value: str, *, grouped: bool) -> str | None:
    """The source that a value is; None for a choice of the group, several of them, and what is no model at all."""
    if not grouped and re.fullmatch(r"\w+", value) and (file := _SHIPPED / f"{value}.yaml").is_file():
        return yaml.safe_load(file.read_text(encoding="utf-8")).get("source")
    like = value.startswith(("pypi:", "~")) or "/" in value or value.lower().endswith(".gguf")
    several = "," in value and not os.path.exists(os.path.expanduser(value))
    return value if (like or (os.path.isdir(value) and not _choice(value))) and not several else None


def _choice(value: str) -> bool:
    return (_SHIPPED / f"{value}.yaml").is_file()


def _quoted(value: str) -> str:
    """The value as a quoted string of Hydra's grammar."""
    if value[:1] in "'\"":
        return value
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
