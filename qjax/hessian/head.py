"""The Hessian of the head: the second moment of what the vocabulary's matrix is multiplied with."""

from __future__ import annotations

import collections
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int

from qjax.errors import NumericsError
from qjax.hessian import moments as sums
from qjax.hessian.moments import Moments, finish
from qjax.hessian.products import NONE
from qjax.linalg.compiled import lean_jit
from qjax.linalg.kronecker import Hessian
from qjax.models.config import ModelConfig
from qjax.models.transformer import final, head
from qjax.runtime.ahead import call
from qjax.streams.batches import Spread
from qjax.streams.blocks import blocks
from qjax.typing import HostOrDevice

__all__ = ["head_hessian"]

_NAME = "head"


@lean_jit(static_argnames=("config", "mesh"), donate_argnames="moments")
def accumulate_final(
    moments: Moments,
    parameters: Any,
    x: HostOrDevice,
    mask: HostOrDevice,
    numbers: HostOrDevice,
    config: ModelConfig,
    *,
    mesh: Any,
) -> tuple[Moments, None]:
    """Add a step of the last block's outputs: `f fᵀ` of f, what follows the blocks up to the head."""

    def own(moments: Moments, parameters: Any, x: Array, mask: Array, numbers: Array) -> tuple[Moments, None]:
        return sums.with_rows(moments, {_NAME: final(parameters, x, config)}, mask, numbers), None

    return sums.on_devices(mesh, own)(moments, parameters, x, mask, numbers)


def head_hessian(
    config: ModelConfig,
    params: Any,
    tokens: Int[np.ndarray, "sequences length"],
    *,
    batch: int,
    spread: Spread | None = None,
) -> Hessian:
    """`H = E[f fᵀ]` of the original model on the calibration tokens, f the input of the head; one forward pass.

    With `spread` the sequences are those that this process holds. Raises NumericsError for inputs that are not finite.
    """
    spread = spread or Spread(len(tokens), batch)
    here, *_ = collections.deque(blocks(config, params, tokens, batch=batch, spread=spread, outputs=True), maxlen=1)
    top = {"norm": params["norm"]}
    width = head(params)["head"].shape[1]

    def make(value: Any, shape: tuple[int, ...]) -> Any:
        return spread.sums(lambda whole: np.full(whole, value), shape)

    zero = np.float32(0)
    moments = Moments({_NAME: make(zero, (width,) * 2)}, {_NAME: make(zero, (width,) * 2)}, {_NAME: make(NONE, ())}, {})
    top = spread.whole(top)
    for step in spread.feed(here.y):
        moments, _ = call(
            accumulate_final, moments, top, *step.parts, step.mask, step.numbers, config, mesh=spread.mesh
        )
    count = spread.sequences * tokens.shape[1]
    means, bad, _ = finish(moments, count, spread.mesh)
    if bad:
        raise NumericsError(
            f"head: its inputs on the calibration data are not finite, first in sequence {bad[_NAME]}; drop that "
            "sequence, check the weights of the last blocks, or load the model in float32"
        )
    return Hessian(jax.device_put(means[_NAME]), None, count)
