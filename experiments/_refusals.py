"""Hydra's own errors (a group, option or key that does not exist, an override that cannot be read) with what exists."""

from __future__ import annotations

import re
from collections.abc import Sequence

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from qjax.configuration import former
from qjax.configuration.groups import ENTRIES, GROUPS, PLAIN, Group, options_of_entry
from qjax.configuration.store import CONFIGS
from qjax.errors import listed
from qjax.registry.table import nearest

__all__ = ["at_once", "explain"]

_NOT_THERE = re.compile(r"Could not (?:override|append to config|delete from config)\.? ?['\"]?([\w./@:-]*)")
_CHOICE = re.compile(r"Could not find '([\w/]+)/([^'/]+)'\s+Available options in '[^']*':\n((?:\t[^\n]*\n?)*)")
_WORD = re.compile(r"[+~]?([a-zA-Z_][\w.]*)(?:=(.*))?", re.S)
_KEY = re.compile(r"(?:full_key: |Key ')([\w.@/-]+)")


def explain(error: Exception, arguments: Sequence[str], entry: str) -> str:
    """The error in one message, without Hydra's hints for its own developers."""
    text = "\n".join(filter(None, (str(error), str(error.__cause__ or ""))))
    if (
        "not in struct" in text
        or "Could not delete" in text
        or ("Could not find" in text and "Available options" not in text)
    ):
        found = _NOT_THERE.search(text) or _KEY.search(text)
        if found and (name := found.group(1).rstrip(".")):
            return _absent(name, arguments, entry)
    if (choice := _CHOICE.search(text)) is not None:
        return _no_choice(*choice.groups())
    if isinstance(override := getattr(error, "override", None), str):
        text = f"{override}: {text}"
    text = re.sub(r"\n+Config search path:.*", "", text, flags=re.S)
    text = re.sub(r"\n\s*(?:full_key|object_type|reference_type)=?:?[^\n]*", "", text)
    return re.sub(r"\nSee https?://\S+ for details", "", text).strip()


def at_once(arguments: Sequence[str], entry: str) -> str | None:
    """What is wrong with a word of the command line, as far as that is known without composing; else None.

    Hydra composes three times before it says so, which takes a second.
    """
    if any(word.startswith(("--config", "-c", "hydra.searchpath")) for word in arguments):
        return None  # files of the user's own may have more
    known = sorted({*options_of_entry(entry), *_optional(entry)})
    for word in arguments:
        found = _WORD.fullmatch(word)
        if found is None or found[1].split(".")[0] == "hydra":
            continue
        key, value = found.groups()
        top, *inner = key.split(".")
        if top in former.SUCCESSORS or (top not in known and not _flat(entry)):
            return _no_such(key, top, known)
        group = GROUPS.get(top) if top in ENTRIES[entry].groups else None
        if group is None or group.flat:
            continue
        if inner and (missing := _missing(group, inner[0])):
            return missing
        if not inner and value and re.fullmatch(r"\w+(,\w+)*", value):
            names = {*group.names(), *(file.stem for file in (CONFIGS / top).glob("*.yaml")), PLAIN.get(top, "")}
            wrong = [name for name in value.split(",") if name not in names and name not in ("null", "None")]
            if wrong and names:
                return f"{word}: there is no {wrong[0]!r} in {top}{nearest(wrong[0], sorted(names))}; there is: " + (
                    listed(filter(None, names))
                )
    return None


def _flat(entry: str) -> bool:
    """Whether settings of a group lie at the top level, so that they are not known without the chosen option."""
    return any(GROUPS[name].flat for name in ENTRIES[entry].groups)


def _missing(group: Group, key: str) -> str | None:
    """The refusal of a setting that no option of a group has."""
    options = [group.options(name) for name in group.names() or [""]]
    known = sorted({group.key or "", *(name for one in options for name in one)} - {""})
    if key in known or any(one.open for one in options):
        return None
    return f"{group.name}.{key}: there is no {key!r} in {group.name}{nearest(key, known)}; there is: {listed(known)}"


def _no_such(name: str, top: str, known: Sequence[str]) -> str:
    if top in former.SUCCESSORS:
        return f"{name}: there is no {top!r} any more; it is {former.SUCCESSORS[top]}= now"
    return f"{name}: there is no {top!r}{nearest(top, list(known))}; there is: {listed(known)}"


def _no_choice(group: str, name: str, options: str) -> str:
    """`rounding=ldlqq`: there is no such option; with the nearest one and all there are."""
    there = sorted(option.strip() for option in options.split("\n") if option.strip())
    return f"{group}={name}: there is no {name!r} in {group}{nearest(name, there)}; there is: {listed(there)}"


def _absent(name: str, arguments: Sequence[str], entry: str) -> str:
    """`roundng`: there is no such setting; …  — with the groups and keys that the program has at that place."""
    parts = re.split(r"[./@]", name)
    if parts[0] in former.SUCCESSORS:
        return _no_such(name, parts[0], ())
    node = _composed(arguments, name, entry)
    above: list[str] = []
    while len(parts) > 1 and isinstance(node, DictConfig) and isinstance(node.get(parts[0]), DictConfig):
        node = node[parts[0]]
        above.append(parts.pop(0))
    there = [] if not isinstance(node, DictConfig) else sorted(map(str, node))
    if not above:
        there = sorted({*there, *_optional(entry)})
    place = f" in {'.'.join(above)}" if above else ""
    return f"{name}: there is no {parts[0]!r}{place}{nearest(parts[0], there)}; there is: {listed(there)}"


def _optional(entry: str) -> list[str]:
    """Groups that need not be chosen, such as experiment=."""
    return [*ENTRIES[entry].groups, *ENTRIES[entry].optional]


def _composed(arguments: Sequence[str], name: str, entry: str) -> DictConfig | None:
    """The configuration without the override that failed, or with no override at all when others fail too."""
    others = [word for word in arguments if "=" in word and "," not in word and word.lstrip("+~").split("=")[0] != name]
    for overrides in ([word for word in others if not word.startswith("-")], []):
        GlobalHydra.instance().clear()
        try:
            with initialize_config_dir(str(CONFIGS), version_base="1.3"):
                return compose(entry, overrides)
        except (HydraException, OmegaConfBaseException):
            continue
    return None
