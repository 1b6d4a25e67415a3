"""Compare finished runs: `qjax report runs=runs/demo out=runs/demo/report`."""

from __future__ import annotations

from omegaconf import DictConfig

from ._entry import entry

__all__ = ["main"]


@entry("report")
def main(config: DictConfig) -> None:
    """Print the comparison and, with `out`, save it as Markdown, CSV, a page and figures."""
    from ._report import start  # with it comes JAX: names and kinds have been checked by now

    return start(config)


if __name__ == "__main__":
    main()
