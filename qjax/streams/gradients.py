"""One batch through all blocks and back: every block's output, then its pullback, the last block first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import jax
from jaxtyping import Array

from qjax.models.config import ModelConfig
from qjax.models.transformer import probed
from qjax.typing import HostOrDevice

__all__ = ["Way", "backward", "forward", "there_and_back"]

forward = jax.jit(probed, static_argnames="config")
"""A block's output, its pullback and the inputs of its linears."""

Way: TypeAlias = Iterator[tuple[int, Any, dict[str, Array]]]
"""(number of a block, its pullback, the inputs of its linears by site), the last block first."""


@jax.jit
def backward(pull: Any, gradient: HostOrDevice) -> Array:
    """The gradient in a block's input alone."""
    return pull(gradient)[0]


def there_and_back(
    blocks: Sequence[Any], x: Array, config: ModelConfig, *, lowest: int = 0, keep: bool = True
) -> tuple[Array, Way]:
    """The last block's output for the input x of the first, and the way back to block `lowest`.

    With `keep` every block is evaluated once, and what its pullback needs is held until the way back has passed it;
    else its input is, and the block evaluated a second time, to the same bits.
    """
    kept: list[Any] = []
    for index, parameters in enumerate(blocks):
        before = x
        x, pull, inputs = forward(parameters, before, config)
        if index >= lowest:
            kept.append((pull, inputs) if keep else before)
        del pull, inputs

    def way() -> Way:
        for index in range(len(blocks) - 1, lowest - 1, -1):
            yield index, *(kept.pop() if keep else forward(blocks[index], kept.pop(), config)[1:])

    return x, way()
