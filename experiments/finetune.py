"""Tune the model of a finished run: `qjax finetune artifact=runs/a/artifact out=runs/b`."""

from __future__ import annotations

from omegaconf import DictConfig

from ._entry import entry

__all__ = ["main"]


@entry("finetune")
def main(config: DictConfig) -> None:
    """Run and print the numbers."""
    from ._finetune import start  # with it comes JAX: names and kinds have been checked by now

    return start(config)


if __name__ == "__main__":
    main()
