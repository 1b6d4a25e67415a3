"""Collect the Hessians of a model into the shared cache: `qjax hessians model=tiny data=pydoc`."""

from __future__ import annotations

from omegaconf import DictConfig

from ._entry import entry

__all__ = ["main"]


@entry("hessians")
def main(config: DictConfig) -> None:
    """Collect what the cache lacks, and print where it is."""
    from ._hessians import start  # with it comes JAX: names and kinds have been checked by now

    return start(config)


if __name__ == "__main__":
    main()
