"""Within-block tuning during quantisation: after each group of matrices the rest of the block makes up for its errors.

Targets are the outputs of the original model's block. Inputs are the original model's, so that an error does not reach
the next block's problem, or those of the tuned blocks before, so that a block makes up for their errors too. What can
move: gains of the matrices that are quantised already, norms, and the weights that are not quantised yet.
Sources: QuIP# (2402.04396), section 5; QTIP (2406.11235).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from qjax.errors import InputError
from qjax.finetune.methods import TUNINGS, TuningMethod
from qjax.finetune.optimizer import Optimizer, Schedule
from qjax.finetune.parameters import dense_folded, named_leaves, stored_block
from qjax.finetune.rules import RateRule, assign
from qjax.models import transformer
from qjax.models.config import ModelConfig
from qjax.registry import Count, OneOf
from qjax.training.order import windows_at

__all__ = ["BlockReport", "BlockTuning", "tune_block"]


@TUNINGS.register("block")
@dataclasses.dataclass(frozen=True)
class BlockTuning(TuningMethod):
    """Tuning inside each block while it is quantised: after qkv, o, gate and up, down. Needs `hessian=original`.

    Sources: QuIP# (2402.04396), section 5; QTIP (2406.11235).

    Attributes:
      epochs: passes over the calibration windows after each group of matrices, at most.
      patience: epochs without improvement on the validation windows after which it stops.
      batch: windows per step.
      validation: the last calibration windows, which choose the best epoch.
      stream: what a block reads: "original" (published), or "quantized": the tuned blocks before it, whose errors it
        then makes up for too.
      rules: learning rates by parameter, ordered, the first match wins; rate None freezes. Names:
        mlp.up_proj.input_gain, mlp.down_proj.weight (not quantised yet), input_layernorm.
      optimizer: AdamW on a cosine.
    """

    name: ClassVar[str] = "block"
    while_rounding: ClassVar[bool] = True
    one_device: ClassVar[bool] = True
    epochs: Count = 2
    patience: Count = 1
    batch: Count = 4
    validation: Count = 8
    stream: Annotated[str, OneOf("original", "quantized")] = "original"
    rules: tuple[RateRule, ...] = (
        RateRule(r"_gain$", 1.0e-3),
        RateRule(r"norm(\.\w+)?$", 1.0e-3),
        RateRule(r"weight$", 1.0e-4),
        RateRule(".", None),
    )
    optimizer: Schedule = dataclasses.field(default_factory=Schedule)


@dataclasses.dataclass(frozen=True)
class BlockReport:
    """Relative squared error of a block's output on the validation windows, before and after; epochs that were run.

    `stopped` says where a loss was not finite; the parameters are then those of the best epoch before.
    """

    before: float
    after: float
    epochs: int
    stopped: str | None


def _loss(tuned: Any, frozen: Any, x: Array, y: Array, structure: Any, names: tuple[str, ...], config: Any) -> Array:
    """`‖block(x) − y‖² / ‖y − x‖²`: relative to what the block has to add."""
    arrays = {**frozen, **tuned}
    out = transformer.block(jax.tree.unflatten(structure, [arrays[name] for name in names]), x, config)
    error = jnp.mean(jnp.square(out.astype(jnp.float32) - y.astype(jnp.float32)))
    return error / jnp.mean(jnp.square(y.astype(jnp.float32) - x.astype(jnp.float32)))


@functools.partial(jax.jit, static_argnames=("structure", "names", "config", "optimizer"))
def _step(
    state: Any,
    frozen: Any,
    rates: Any,
    x: Any,
    y: Any,
    *,
    structure: Any,
    names: Any,
    config: Any,
    optimizer: Optimizer,
) -> tuple[Any, Array]:
    value, gradient = jax.value_and_grad(_loss)(state["tuned"], frozen, x, y, structure, names, config)
    tuned, inner, _ = optimizer.update(gradient, state["optimizer"], state["tuned"], rates)
    return {"tuned": tuned, "optimizer": inner}, value


_value = jax.jit(_loss, static_argnames=("structure", "names", "config"))


def tune_block(
    parameters: Any,
    x: Float[np.ndarray, "windows length width"],
    y: Float[np.ndarray, "windows length width"],
    config: ModelConfig,
    settings: BlockTuning,
    *,
    seed: int,
) -> tuple[Any, BlockReport]:
    """The block's parameters after tuning towards outputs y for inputs x, with the best validation loss.

    Raises InputError for rules that leave a parameter uncovered, or too few windows.
    """
    batch, held = settings.batch, settings.validation
    if len(x) < held + batch:
        raise InputError(
            f"finetune=block: {len(x)} calibration windows; {held} validate and a step takes {batch}: "
            "raise data.calibration_sequences"
        )
    leaves, structure, tunable = named_leaves(dense_folded(parameters))
    rates = assign(settings.rules, tunable)
    tuned = {name: jax.device_put(np.asarray(leaves[name], np.float32)) for name, rate in rates.items() if rate}
    frozen = {name: leaf for name, leaf in leaves.items() if name not in tuned}
    scale = {name: np.array(rates[name], np.float32) for name in tuned}
    per_epoch = (len(x) - held) // batch
    optimizer = settings.optimizer.over(settings.epochs * per_epoch)
    static: Any = {"structure": structure, "names": tuple(leaves), "config": config}
    part = math.gcd(held, batch)

    def validation(tuned: Any) -> float:
        starts = range(len(x) - held, len(x), part)
        return float(
            np.mean([float(_value(tuned, frozen, x[s : s + part], y[s : s + part], **static)) for s in starts])
        )

    state: Any = {"tuned": tuned, "optimizer": optimizer.init(tuned)}
    before = validation(tuned)
    best, best_epoch, stopped, epoch = (before, tuned), 0, None, 0
    for epoch in range(1, settings.epochs + 1):
        for step in range(per_epoch):
            rows = windows_at(((epoch - 1) * per_epoch + step) * batch, batch, len(x) - held, seed)
            state, _ = _step(state, frozen, scale, x[rows], y[rows], **static, optimizer=optimizer)
        found = validation(state["tuned"])
        if not math.isfinite(found):
            stopped = f"epoch {epoch}: the validation loss is {found}"
            break
        if found < best[0]:
            best, best_epoch = (found, state["tuned"]), epoch
        elif epoch - best_epoch >= settings.patience:
            break
    return stored_block(parameters, jax.device_get(best[1])), BlockReport(before, best[0], epoch, stopped)
