"""Train the embedded model: `qjax train_tiny` (options: `--help`, configs/train_tiny.yaml)."""

from __future__ import annotations

from omegaconf import DictConfig

from ._entry import entry

__all__ = ["main"]


@entry("train_tiny")
def main(options: DictConfig) -> None:
    """Entry point: errors of qjax are printed without a traceback and exit with 2."""
    from ._train_tiny import start  # with it comes JAX: names and kinds have been checked by now

    return start(options)


if __name__ == "__main__":
    main()
