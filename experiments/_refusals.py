"""Hydra's own errors (a group, option or key that does not exist, an override that cannot be read) with what exists."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Sequence

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from qjax.errors import listed

from ._kinds import groups_of, suggestion

__all__ = ["explain"]

CONFIGS = pathlib.Path(__file__).resolve().parent.parent / "configs"
_NOT_THERE = re.compile(r"Could not (?:override|append to config|delete from config)\.? ?['\"]?([\w./@:-]*)")
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
    if isinstance(override := getattr(error, "override", None), str):
        text = f"{override}: {text}"
    text = re.sub(r"\n+Config search path:.*", "", text, flags=re.S)
    text = re.sub(r"\n\s*(?:full_key|object_type|reference_type)=?:?[^\n]*", "", text)
    return re.sub(r"\nSee https?://\S+ for details", "", text).strip()


def _absent(name: str, arguments: Sequence[str], entry: str) -> str:
    """`roundng`: there is no such setting; …  — with the groups and keys that the program has at that place."""
    parts = re.split(r"[./@]", name)
    node = _composed(arguments, name, entry)
    above: list[str] = []
    while len(parts) > 1 and isinstance(node, DictConfig) and isinstance(node.get(parts[0]), DictConfig):
        node = node[parts[0]]
        above.append(parts.pop(0))
    there = [] if not isinstance(node, DictConfig) else sorted(map(str, node))
    if not above:
        there = sorted({*there, *_optional(entry)})
    place = f" in {'.'.join(above)}" if above else ""
    return f"{name}: there is no {parts[0]!r}{place}{suggestion(parts[0], there)}; there is: {listed(there)}"


def _optional(entry: str) -> list[str]:
    """Groups that need not be chosen, such as experiment=."""
    return list(groups_of(entry))


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
