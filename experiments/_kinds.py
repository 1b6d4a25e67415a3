"""Settings against the files of `configs/`: a key or a kind of value that no file has is refused, with what exists."""

from __future__ import annotations

import difflib
import functools
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml
from omegaconf import OmegaConf

from qjax.errors import InputError, listed

__all__ = ["NULLS", "check", "known_kinds", "suggestion"]

CONFIGS = pathlib.Path(__file__).resolve().parent.parent / "configs"
_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list: "a list",
    dict: "a mapping",
}
# What may stand where the files only say null.
NULLS: Mapping[str, type] = {
    **{f"codebook.{key}": float for key in ("rms",)},
    **{f"codebook.{key}": int for key in ("V",)},
    **{f"rounding.{key}": int for key in ("block", "rows", "chunk")},
    **{f"scale.{key}": kind for key, kind in (("rms", float), ("group_size", int))},
    **{f"data.{key}": str for key in ("path", "calibration", "evaluation")},
    **{f"finetune.{key}": int for key in ("sequences", "topk")},
    **{f"memory.{key}": float for key in ("host_gb", "disk_gb", "device_gb")},
    **{key: str for key in ("out", "cache", "machine", "adapters", "include", "system", "tracker.group")},
    **{key: int for key in ("mesh.data", "mesh.model", "seed", "fewshot", "limit", "top_k")},
    **{key: dict for key in ("chat_options", "data", "model")},
    **{key: list for key in ("prompts", "names", "tasks", "tracker.tags")},
    "distributed.coordinator": str,
    "artifact": str,
    "evaluate.sanity_perplexity": float,
    "bits": float,
}
# Their keys are the user's own.
_OPEN = ("data.parts", "artifacts", "chat_options", "data", "model", "rules")
_SCALARS_TOO = ("names", "bits", "sizes", "codes", "models", "tasks")  # one value stands for a list of one


@functools.cache
def _content(file: pathlib.Path) -> Mapping[str, Any]:
    loaded = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    return (
        {} if not isinstance(loaded, dict) else {str(k): v for k, v in loaded.items() if k not in ("defaults", "hydra")}
    )


def _leaves(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        name = f"{prefix}{key}"
        yield name, value
        if isinstance(value, Mapping) and name not in _OPEN:
            yield from _leaves(value, f"{name}.")


@functools.cache
def _groups() -> Mapping[str, tuple[pathlib.Path, ...]]:
    return {
        folder.name: tuple(sorted(folder.glob("*.yaml"))) for folder in CONFIGS.iterdir() if any(folder.glob("*.yaml"))
    }


@functools.cache
def known_kinds(entry: str) -> Mapping[str, frozenset[type]]:
    """Every dotted key that the files of an entry point have, with the types of the values they give it."""
    found: dict[str, set[type]] = {}
    primary = CONFIGS / f"{entry}.yaml"
    loaded = yaml.safe_load(primary.read_text())
    groups = [
        name for item in loaded["defaults"] if isinstance(item, dict) for name in [str(next(iter(item))).split()[-1]]
    ]
    contents = [("", _content(primary))]
    for group in groups:
        for file in _groups().get(group, ()):
            everywhere = "@package _global_" in file.read_text()
            contents.append(("" if everywhere else f"{group}.", _content(file)))
            if not everywhere:
                found.setdefault(group, set()).add(dict)
    for prefix, content in contents:
        for key, value in _leaves(content, prefix):
            if not (isinstance(value, str) and value.startswith("${")) and value != "???":
                found.setdefault(key, set()).add(type(value))
            else:
                found.setdefault(key, set()).add(str if value == "???" else type(None))
    return {key: frozenset(kinds | ({NULLS[key]} if key in NULLS else set())) for key, kinds in found.items()}


def suggestion(word: str, known: Sequence[str]) -> str:
    """` did you mean …?`, or nothing."""
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _fits(value: Any, kinds: frozenset[type], key: str) -> bool:
    if isinstance(value, float) and not math.isfinite(value):
        return False
    if type(value) in kinds or (type(value) is int and float in kinds):
        return True
    # YAML reads 1e3 and 2.0 as numbers with a point
    if type(value) is float and int in kinds and value.is_integer() and False:
        return True
    return (
        list in kinds and key in _SCALARS_TOO and isinstance(value, str | int | float) and not isinstance(value, bool)
    )


def _under(known: Mapping[str, Any], parent: str) -> list[str]:
    depth = parent.count(".") + 1 if parent else 0
    return sorted(
        k.rpartition(".")[2] for k in known if k.count(".") == depth and (not parent or k.startswith(f"{parent}."))
    )


def check(settings: Mapping[str, Any], entry: str) -> None:
    """Raises InputError for the first key that no configuration file has, and for a value of another kind than theirs.

    `settings`: resolved plain values. A group whose chosen `name` no file has (an algorithm registered by the user) is
    left to its registry.
    """
    known = known_kinds(entry)
    _walk(settings, "", known)


def _foreign(group: str, node: Mapping[str, Any]) -> bool:
    """Whether a group is set to something that its folder does not have, as a user's own algorithm."""
    names = {_content(file).get("name") for file in _groups().get(group, ())}
    return "name" in node and names != {None} and node["name"] not in names


def _walk(node: Mapping[str, Any], prefix: str, known: Mapping[str, frozenset[type]]) -> None:
    for key, value in node.items():
        name = f"{prefix}{key}"
        kinds = known.get(name)
        if kinds is None:
            parent = prefix.rstrip(".")
            there = _under(known, parent)
            raise InputError(
                f"{name}={value!r}: there is no {key!r}{f' in {parent}' if parent else ''}{suggestion(str(key), there)}; "
                f"there is: {listed(there)}"
            )
        if not _fits(value, kinds, name):
            wanted = [_NAMES[kind] for kind in _NAMES if kind in kinds and not (kind is int and float in kinds)]
            wanted += ["null"] if type(None) in kinds else []
            raise InputError(f"{name} is {value!r}; expected is {' or '.join(wanted)}")
        if isinstance(value, Mapping) and name not in _OPEN and not (not prefix and _foreign(name, value)):
            _walk(value, f"{name}.", known)
