"""Quantise a language model: `qjax quantize model=tiny rounding=ldlq bits=2 out=runs/a`."""

from __future__ import annotations

from omegaconf import DictConfig

from ._entry import entry

__all__ = ["main"]


@entry("quantize", sweeps=True)
def main(config: DictConfig) -> float | None:
    """Run the job of a configuration."""
    from ._quantize import start  # with it comes JAX: names and kinds have been checked by now

    return start(config)


if __name__ == "__main__":
    main()
