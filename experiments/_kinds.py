"""Settings against the files of `configs/`: a key or a kind of value that no file has is refused, with what exists."""

from __future__ import annotations

import difflib
import functools
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from omegaconf import OmegaConf

from qjax.errors import InputError, listed

from ._ranges import LIMITS

__all__ = ["NULLS", "Mistyped", "check", "groups_of", "known_kinds", "suggestion"]

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
    **dict.fromkeys(("rounding.block", "rounding.rows", "rounding.chunk", "codebook.V", "scale.group_size"), int),
    **dict.fromkeys(("finetune.sequences", "finetune.topk", "mesh.data", "seed", "fewshot", "limit", "top_k"), int),
    **dict.fromkeys(
        (
            "codebook.rms",
            "codebook.residual_scale",
            "scale.rms",
            "evaluate.sanity_perplexity",
            "rounding.output_damping",
        ),
        float,
    ),
    **dict.fromkeys(("memory.host_gb", "memory.disk_gb", "memory.device_gb"), float),
    **dict.fromkeys(("data.path", "data.calibration", "data.evaluation", "tracker.group"), str),
    **dict.fromkeys(("out", "cache", "machine", "artifact", "adapters", "include", "system"), str),
    **dict.fromkeys(("chat_options", "data", "model"), dict),
    **dict.fromkeys(("prompts", "names", "tasks", "bits", "tracker.tags", "hessian.prefixes"), list),
    "distributed.coordinator": str,
    "hessian.sequences": int,
}
# What may stand elsewhere although no file shows it.
_ALSO: Mapping[str, type] = {
    "runs": list,
    "rounding.output_damping": type(None),
    "data.path": list,
    "data.calibration": list,
    "data.evaluation": list,
    **dict.fromkeys(
        ("evaluate.sanity_perplexity", "codebook.overlap", "mesh.data", "artifact", "loss_size"), type(None)
    ),
}
_OPEN = ("data.parts", "artifacts", "chat_options")  # their keys are the user's own
_ONE_TOO = ("names", "bits", "sizes", "codes", "models", "tasks", "runs")  # one value stands for a list of one


class Mistyped(InputError):
    """A key or a value that is wrong with any other; in a sweep it is a failure, not an impossible combination."""


@functools.cache
def _content(file: pathlib.Path) -> Mapping[str, Any]:
    loaded = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    assert isinstance(loaded, dict)
    return {str(key): value for key, value in loaded.items() if key not in ("defaults", "hydra")}


@functools.cache
def _files(group: str) -> tuple[pathlib.Path, ...]:
    return tuple(sorted((CONFIGS / group).glob("*.yaml")))


@functools.cache
def _global(file: pathlib.Path) -> bool:
    return "@package _global_" in file.read_text(encoding="utf-8")


@functools.cache
def groups_of(entry: str) -> tuple[str, ...]:
    """The groups that an entry point chooses from, optional ones too."""
    defaults = OmegaConf.to_container(OmegaConf.load(CONFIGS / f"{entry}.yaml"))["defaults"]  # type: ignore[index]
    named = [str(next(iter(item))).split()[-1] for item in defaults if isinstance(item, dict)]
    return tuple(name for name in named if _files(name))


def _leaves(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        yield f"{prefix}{key}", value
        if isinstance(value, Mapping) and f"{prefix}{key}" not in _OPEN:
            yield from _leaves(value, f"{prefix}{key}.")


def _kind(value: Any) -> type:
    if value == "???":
        return str
    return type(None) if isinstance(value, str) and value.startswith("${oc.env:") else type(value)


@functools.cache
def known_kinds(entry: str) -> Mapping[str, frozenset[type]]:
    """Every dotted key that the files of an entry point have, with the types of the values they give it.

    The elements of lists are under `key[]`.
    """
    found: dict[str, set[type]] = {}
    contents = [("", _content(CONFIGS / f"{entry}.yaml"))]
    for group in groups_of(entry):
        contents += [("" if _global(file) else f"{group}.", _content(file)) for file in _files(group)]
        if not all(map(_global, _files(group))):
            found[group] = {dict}
    for prefix, content in contents:
        for key, value in _leaves(content, prefix):
            found.setdefault(key, set()).add(_kind(value))
            if isinstance(value, list):
                found.setdefault(f"{key}[]", set()).update(map(_kind, value))
    for key, kinds in found.items():
        kinds |= {_ALSO[key]} if key in _ALSO else set()
        if kinds <= {type(None), list} and key in NULLS:
            kinds.add(NULLS[key])
    return {key: frozenset(kinds) for key, kinds in found.items()}


def suggestion(word: str, known: Sequence[str]) -> str:
    """`; did you mean …?`, or nothing."""
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def check(settings: Mapping[str, Any], entry: str) -> None:
    """Refuse what no configuration file has.

    `settings`: resolved plain values. A group whose `name` no file has (an algorithm registered by the user) is left to
    its registry. Raises Mistyped for the first key that does not exist (with those that do), for a key that a group
    lacks, a value of another kind than the files', and a number out of its range.
    """
    _walk(settings, "", known_kinds(entry), entry)


def _walk(node: Mapping[str, Any], prefix: str, known: Mapping[str, frozenset[type]], entry: str) -> None:
    for key, value in node.items():
        name = f"{prefix}{key}"
        kinds = known.get(name)
        if kinds is None:
            raise Mistyped(f"{name}={value!r}: {_no_such(str(key), prefix.rstrip('.'), known)}")
        _check_value(name, value, kinds, known.get(f"{name}[]", frozenset()))
        sourced = f"{name}.source" in known or (name in ("model", "data") and type(None) in kinds)
        if sourced and isinstance(value, Mapping) and "source" not in value:
            raise Mistyped(f"{name} is {dict(value)!r}, which lacks source; as in {name}='{{source: …}}'")
        if isinstance(value, Mapping) and name not in _OPEN and not (not prefix and _left_alone(name, value, entry)):
            if not prefix:
                _complete(name, value)
            _walk(value, f"{name}.", known, entry)


def _no_such(key: str, parent: str, known: Mapping[str, Any]) -> str:
    depth = parent.count(".") + 1 if parent else 0
    inside = [name for name in known if name.count(".") == depth and (not parent or name.startswith(f"{parent}."))]
    there = sorted({name.rpartition(".")[2] for name in inside if not name.endswith("[]")})
    return f"there is no {key!r}{f' in {parent}' if parent else ''}{suggestion(key, there)}; there is: {listed(there)}"


def _left_alone(group: str, node: Mapping[str, Any], entry: str) -> bool:
    """A group chosen from a user's own files, or a mapping that stands for one (`data={…}` of evaluate)."""
    if group not in groups_of(entry):
        return NULLS.get(group) is dict
    names = {_content(file).get("name") for file in _files(group)}
    return names != {None} and isinstance(node.get("name"), str) and node["name"] not in names


def _complete(group: str, node: Mapping[str, Any]) -> None:
    common = [set(_content(file)) for file in _files(group) if not _global(file)]
    missing = sorted(set.intersection(*common) - set(node)) if common else []
    if missing:
        raise Mistyped(f"{group} is {dict(node)!r}, which lacks {listed(missing)}; choose {group}=<option>")


def _is(value: Any, kinds: frozenset[type]) -> bool:
    if isinstance(value, float) and not math.isfinite(value):
        return False
    return type(value) in kinds or (type(value) is int and float in kinds)


def _check_value(name: str, value: Any, kinds: frozenset[type], elements: frozenset[type]) -> None:
    one = list in kinds and name in _ONE_TOO and isinstance(value, str | int | float) and not isinstance(value, bool)
    if not (_is(value, kinds) or one):
        wanted = [text for kind, text in _NAMES.items() if kind in kinds and not (kind is int and float in kinds)]
        raise Mistyped(
            f"{name} is {value!r}; expected is {' or '.join([*wanted, *(['null'] if type(None) in kinds else [])])}"
        )
    if isinstance(value, list) and elements and not all(_is(item, elements) for item in value):
        wanted = [text for kind, text in _NAMES.items() if kind in elements and not (kind is int and float in elements)]
        raise Mistyped(f"{name} is {value!r}; expected is a list, each {' or '.join(wanted)}")
    if name in LIMITS and isinstance(value, int | float):
        allowed, words = LIMITS[name]
        if not allowed(value):
            raise Mistyped(f"{name} is {value}; it is {words}")
