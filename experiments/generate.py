"""Continue texts: `qjax generate artifact=runs/a/artifact prompt="The function returns"`."""

from __future__ import annotations

from omegaconf import DictConfig

from ._entry import entry

__all__ = ["main"]


@entry("generate")
def main(config: DictConfig) -> None:
    """Print the prompts and their continuations, and how fast they came."""
    from ._generate import start  # with it comes JAX: names and kinds have been checked by now

    return start(config)


if __name__ == "__main__":
    main()
