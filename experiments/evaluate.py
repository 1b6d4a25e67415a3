"""Evaluate an artifact against its reference model: `qjax evaluate artifact=runs/a/artifact`.

With `tasks=[…]` the tasks of the lm-evaluation-harness, on the artifact and on its reference; with `artifact=null
model=…` on a dense model alone.
"""

from __future__ import annotations

from omegaconf import DictConfig

from ._entry import entry

__all__ = ["main"]


@entry("evaluate_artifact")
def main(config: DictConfig) -> None:
    """Print perplexity, KL and agreement of the artifact on its run's evaluation text, or on another one."""
    from ._evaluate import start  # with it comes JAX: names and kinds have been checked by now

    return start(config)


if __name__ == "__main__":
    main()
