"""The configuration reference as a page of Markdown, built from what is registered and the files of `configs/`."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator
from typing import Any

from qjax.configuration.groups import ENTRIES, GROUPS, PLAIN, Group, options_of_entry
from qjax.configuration.store import CONFIGS
from qjax.registry.options import REQUIRED, Option, Options

__all__ = ["reference"]

_HEAD = """# Config reference

A group is chosen by `group=option` and its values are set by `group.key=value`; `--help` of an entry point prints the
composed whole. Options and defaults are those of the Python constructors of the same name.
"""


def reference() -> str:
    """The whole page: entry points, groups with all their options, presets and experiments."""
    parts = [_HEAD, "## Entry points\n"]
    for name in ENTRIES:
        parts += [f"### {name}\n", _table(options_of_entry(name))]
    for group in GROUPS.values():
        parts.append(f"## {group.name}=\n")
        files = [] if group.name == "preset" else _files(group.name)
        for option in [PLAIN[group.name]] if group.name in PLAIN else group.names():
            parts += [f"### {group.name}={option}\n", *_option(group, option)]
        for file in files:
            parts += [f"### {group.name}={file.stem}\n", _content(file)]
    for folder in ("preset", "experiment", "debug"):
        parts.append(f"## {folder}=, {'all of a published method' if folder == 'preset' else 'any settings at once'}\n")
        for file in _files(folder):
            parts += [f"### {folder}={file.stem}\n", _content(file)]
    return "\n".join(parts)


def _files(group: str) -> list[pathlib.Path]:
    return sorted((CONFIGS / group).glob("*.yaml"))


def _option(group: Group, name: str) -> Iterator[str]:
    options = group.options(name)
    summary = options.doc.split("\n\n")[0].replace("\n", " ").strip()
    if summary:
        yield f"{summary}\n"
    if options:
        yield _table(options)


def _table(options: Options) -> str:
    rows = [f"| `{option.name}` | {_default(option.default)} | {_what(option)} |" for option in options.values()]
    return "\n".join(["| setting | default | |", "| --- | --- | --- |", *rows, ""])


def _default(value: Any) -> str:
    if value == REQUIRED:
        return "must be given"
    return f"`{json.dumps(value, ensure_ascii=False)}`".replace("|", "\\|")


def _what(option: Option) -> str:
    kind = option.kind
    told = [option.doc.rstrip(".")]
    if kind.choices and not all(choice in option.doc for choice in kind.choices):
        told.append(f"one of {', '.join(kind.choices)}")
    if kind.limits is not None:
        told.append(kind.limits.words)
    return "; ".join(filter(None, told)).replace("|", "\\|")


def _content(file: pathlib.Path) -> str:
    return f"```yaml\n{file.read_text(encoding='utf-8').rstrip()}\n```\n"
