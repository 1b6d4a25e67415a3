"""Write a model for other tools: `qjax export artifact=runs/a/artifact format=compressed-tensors out=exported`."""

from __future__ import annotations

from omegaconf import DictConfig

from ._entry import entry

__all__ = ["main"]


@entry("export")
def main(config: DictConfig) -> None:
    """Write an artifact as a Hugging Face folder in the format of another tool."""
    from ._export import start  # with it comes JAX: names and kinds have been checked by now

    return start(config)


if __name__ == "__main__":
    main()
