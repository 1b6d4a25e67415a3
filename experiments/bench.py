"""Measure single steps: `qjax bench matrix`, or another of `configs/bench/`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from omegaconf import DictConfig

from ._entry import entry

__all__ = ["main", "overrides"]


def overrides(arguments: Sequence[str]) -> list[str]:
    """A first word that is no option, `matrix sizes=…`, as Hydra's `bench=matrix sizes=…`."""
    first, *rest = arguments or ["bench=matrix"]
    return [f"bench={first}", *rest] if "=" not in first and not first.startswith("-") else [first, *rest]


@entry("bench")
def main(config: DictConfig) -> None:
    """Measure, print a table, and write JSON with `out`."""
    from ._bench import start  # with it comes JAX: names and kinds have been checked by now

    return start(config)


if __name__ == "__main__":
    sys.argv[1:] = overrides(sys.argv[1:])
    main()
