"""Hydra's store of configurations, filled from the registries; the files of `configs/` say what deviates."""

from __future__ import annotations

import pathlib

from qjax.configuration.groups import ENTRIES, GROUPS, PLAIN, options_of_entry
from qjax.registry.source import PACKAGE

__all__ = ["CONFIGS", "fill"]

# Beside the package in the repository, inside it once installed.
CONFIGS = next(
    (folder for folder in (PACKAGE / "configs", PACKAGE.parent / "configs") if (folder / "quantize.yaml").is_file()),
    pathlib.Path(PACKAGE / "configs"),
)


def fill() -> None:
    """Put an option for everything that is registered into Hydra's store, and the defaults of the entry points.

    A file of the same group and name stands before it. To be called again after plugins were imported.
    """
    from hydra.core.config_store import ConfigStore  # slow, and not needed in a notebook that composes nothing

    store = ConfigStore.instance()
    for name, group in GROUPS.items():
        for option in [PLAIN[name]] if name in PLAIN else group.names():
            store.store(group=name, name=option, node=group.node(option), package="_global_" if group.flat else None)
    for entry in ENTRIES:
        store.store(name=f"{entry}_options", node=options_of_entry(entry).defaults(), package="_global_")
