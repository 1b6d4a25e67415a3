"""AdamW with clipping and a schedule; learning rates by parameter are arrays and not part of the compiled program."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from qjax.errors import InputError
from qjax.registry import Decay, NotNegative, Positive, Share, check_options

__all__ = ["Optimizer", "Schedule"]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """AdamW on a cosine, in shares of its steps and of the peak rates.

    Attributes:
      warmup: share of the steps in which the rate rises linearly.
      final: the rate at the end as a share of the peak; it falls along a cosine.
      b1: Adam's decay of the mean gradient.
      b2: Adam's decay of the mean square.
      eps: Adam's ε.
      decay: decoupled weight decay.
      clip: largest global norm of a gradient.
    """

    warmup: Decay = 0.05
    final: Share = 0.05
    b1: Decay = 0.9
    b2: Decay = 0.99
    eps: Positive = 1e-10
    decay: NotNegative = 0.0
    clip: Positive = 1.0

    def __post_init__(self) -> None:
        check_options(self, "finetune.optimizer")

    def over(self, steps: int) -> Optimizer:
        """The optimiser of a run of `steps` steps."""
        return Optimizer(**dataclasses.asdict(self), steps=steps)


@dataclasses.dataclass(frozen=True)
class Optimizer(Schedule):
    """Static choices; the rates themselves come with `update`.

    Attributes:
      steps: of the whole run.
    """

    steps: int = dataclasses.field(kw_only=True)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InputError(f"finetune: {self.steps} steps; allow at least one batch of tokens")
        super().__post_init__()

    def _chain(self) -> optax.GradientTransformation:
        warmup = round(self.warmup * self.steps)
        schedule = optax.warmup_cosine_decay_schedule(1 / (warmup + 1), 1.0, warmup, max(self.steps, 2), self.final)
        return optax.chain(
            optax.clip_by_global_norm(self.clip),
            optax.scale_by_adam(self.b1, self.b2, self.eps),
            optax.add_decayed_weights(self.decay),
            optax.scale_by_schedule(schedule),
        )

    def init(self, tuned: Any) -> Any:
        """The optimiser's state for parameters."""
        return self._chain().init(tuned)

    def update(self, gradient: Any, state: Any, tuned: Any, rates: Any) -> tuple[Any, Any, Array]:
        """(new parameters, new state, norm of the gradient): `θ − rate · schedule · (Adam(clipped g) + decay θ)`.

        A rate of 0 leaves its parameters alone, and their gradients out of the norm.
        """

        def spread(rate: Array, leaf: Array) -> Array:
            return jnp.broadcast_to(rate, leaf.shape) if rate.ndim else jnp.full(leaf.shape, rate)

        rates = jax.tree.map(spread, rates, gradient)
        gradient = jax.tree.map(lambda g, rate: jnp.where(rate > 0, g, jnp.zeros_like(g)), gradient, rates)
        # optax raises Python floats to integer step counts, which strict promotion rules forbid.
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            update, state = self._chain().update(gradient, state, tuned)
        new = jax.tree.map(lambda p, u, rate: p - rate * u, tuned, update, rates)
        return new, state, optax.tree.norm(gradient)
