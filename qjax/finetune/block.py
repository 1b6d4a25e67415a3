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
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from qjax.errors import InputError
from qjax.finetune.optimizer import Optimizer
from qjax.finetune.parameters import dense_folded, named_leaves, stored_block
from qjax.finetune.rules import RateRule, assign
from qjax.models import transformer
from qjax.models.config import ModelConfig
from qjax.training.order import windows_at

__all__ = ["BlockReport", "BlockSettings", "tune_block"]

STREAMS = ("original", "quantized")


@dataclasses.dataclass(frozen=True)
class BlockSettings:
    """The options of block-wise tuning; `configs/finetune/block.yaml` explains and sets them.

    Attributes:
      epochs: passes over the calibration windows after each group, at most.
      patience: epochs without improvement on
        the validation windows after which it stops.
      validation: windows, the last ones, that choose the best epoch.
      stream: whose activations a block reads, "original" (published) or "quantized", the tuned blocks before it.
    """

    rules: tuple[RateRule, ...]
    epochs: int = 2
    patience: int = 1
    batch: int = 4
    validation: int = 8
    stream: str = "original"
    optimizer: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> BlockSettings:
        """From plain values, `name` left out. Raises InputError for options that do not exist or are out of range."""
        values = {key: value for key, value in options.items() if key != "name"}
        known = {field.name for field in dataclasses.fields(cls)}
        if surplus := sorted(set(values) - known):
            raise InputError(f"finetune has no option {', '.join(surplus)}; its options are {', '.join(sorted(known))}")
        settings = cls(**{**values, "rules": RateRule.several(values.get("rules", ()))})
        for name in ("epochs", "patience", "batch", "validation"):
            if getattr(settings, name) < 1:
                raise InputError(f"finetune.{name} is {getattr(settings, name)}; it must be at least 1")
        if settings.stream not in STREAMS:
            raise InputError(f"finetune.stream is {settings.stream!r}; allowed are {', '.join(STREAMS)}")
        return settings


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
    settings: BlockSettings,
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
    optimizer = Optimizer(steps=settings.epochs * per_epoch, **settings.optimizer)
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
