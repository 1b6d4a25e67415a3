"""One step of next-token training as a pure function of its state; the loop, the files and the clock are elsewhere."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int
from optax.contrib import MuonDimensionNumbers, muon

from qjax.errors import DataError
from qjax.models.config import ModelConfig
from qjax.models.linear import replace_linears
from qjax.models.structure import abstract_block, structure
from qjax.models.transformer import forward
from qjax.training.order import random_bits, windows_at

__all__ = ["Schedule", "TrainState", "batch_at", "initial_state", "sum_loss", "train_step"]

Params = Any


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Muon for the blocks' matrices and AdamW for the embedding and the gains, under one learning rate.

    The rate rises linearly over `warmup` steps and falls along a cosine to `final_share` of its peak; Muon's updates
    are scaled to Adam's usual size (RMS 0.2), so that one rate fits both. The global gradient norm is clipped at
    `clip`. Source: K. Jordan et al., "Muon: an optimizer for hidden layers" (2024); the scale: J. Liu et al.,
    "Muon is scalable for LLM training" (arXiv 2502.16982), section 2.2.
    """

    steps: int
    learning_rate: float
    warmup: int
    final_share: float = 0.02
    weight_decay: float = 0.1
    clip: float = 1.0

    def optimizer(self) -> optax.GradientTransformation:
        """The optax chain."""
        rate = optax.warmup_cosine_decay_schedule(
            0.0, self.learning_rate, self.warmup, self.steps, self.final_share * self.learning_rate
        )
        update = muon(
            rate,
            weight_decay=self.weight_decay,
            adam_b2=0.95,
            adam_weight_decay=self.weight_decay,
            muon_weight_dimension_numbers=_muon_leaves,
            consistent_rms=0.2,
        )
        return optax.chain(optax.clip_by_global_norm(self.clip), update)


def _muon_leaves(params: Params) -> Params:
    """The matrices of the blocks; a row of the embedding is rarely touched, which orthogonalisation would amplify."""

    def choose(path: tuple[Any, ...], leaf: Array) -> MuonDimensionNumbers | None:
        in_block = isinstance(path[0], jax.tree_util.DictKey) and path[0].key == "blocks"
        return MuonDimensionNumbers() if in_block and leaf.ndim == 2 else None

    return jax.tree_util.tree_map_with_path(choose, params)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["params", "optimizer"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Float32 parameters and the optimiser's state (which counts the steps)."""

    params: Params
    optimizer: optax.OptState


@functools.partial(jax.jit, static_argnames=("config", "schedule"))
def initial_state(key: Array, config: ModelConfig, schedule: Schedule) -> TrainState:
    """Normal weights of deviation `fan_in**-0.5`, divided by `sqrt(2 layers)` where they write to the residual."""
    linears, residual = structure(config).linears, (2 * config.num_layers) ** -0.5
    keys = iter(jax.random.split(key, config.num_layers * len(linears) + 1))

    def layer() -> Params:
        weights = {}
        for linear in linears:
            scale = residual if linear.row_parallel else 1.0  # those whose outputs are added to the residual
            weights[linear.name] = jax.random.normal(next(keys), linear.shape) * (scale * linear.inner**-0.5)
        ones = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), abstract_block(config))
        return replace_linears(ones, weights)

    embed = jax.random.normal(next(keys), (config.vocab_size, config.hidden_size)) * 0.02
    params = {
        "embed": embed,
        "norm": jnp.ones(config.hidden_size),
        "blocks": [layer() for _ in range(config.num_layers)],
    }
    return TrainState(params, schedule.optimizer().init(params))


@functools.partial(jax.jit, static_argnames="config")
def sum_loss(params: Params, tokens: Int[Array, "batch length"], config: ModelConfig) -> Float[Array, ""]:
    """`-sum log p(t[i+1] | t[..i])` in nats over all windows of a batch."""
    scores = forward(params, tokens[:, :-1], config)
    return jnp.sum(optax.softmax_cross_entropy_with_integer_labels(scores, tokens[:, 1:]))


@functools.partial(jax.jit, static_argnames=("config", "schedule"), donate_argnums=0)
def train_step(
    state: TrainState, tokens: Int[Array, "batch length"], config: ModelConfig, schedule: Schedule
) -> tuple[TrainState, Float[Array, ""], Float[Array, ""]]:
    """One update: `(new state, mean loss in nats per token before it, norm of the gradient)`.

    The old state's buffers are donated. Nothing is raised: the caller looks at the loss and the norm.
    """

    def mean_loss(params: Params) -> Array:
        return sum_loss(params, tokens, config) / (tokens.shape[0] * (tokens.shape[1] - 1))

    loss, gradient = jax.value_and_grad(mean_loss)(state.params)
    # optax raises Python floats to integer step counts, which strict promotion rules forbid.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        update, optimizer = schedule.optimizer().update(gradient, state.optimizer, state.params)
    return TrainState(optax.apply_updates(state.params, update), optimizer), loss, optax.tree.norm(gradient)


def batch_at(
    stream: Int[np.ndarray, " tokens"], position: int, batch: int, context: int, seed: int, first_token: int
) -> Int[np.ndarray, "batch window"]:
    """Windows `position .. position + batch` of an endless shuffled reading of `stream`: a pure function.

    Every epoch cuts the stream at another offset and visits its windows in another order; half of the windows begin
    with `first_token`, so that the model is used to streams with and without it. Raises DataError for a stream shorter
    than two windows.
    """
    per_epoch = (len(stream) - 1) // context - 1  # one window is given to the offset
    if per_epoch < 1:
        raise DataError(f"{len(stream)} training tokens are fewer than two windows of {context}; use a shorter context")
    rows = []
    for index, place in enumerate(windows_at(position, batch, per_epoch, seed), position):
        epoch, visit = divmod(index, per_epoch)
        bits = random_bits(seed, epoch, per_epoch + 1)
        start = int(bits[-1] % np.uint64(context)) + int(place) * context
        window = np.array(stream[start : start + context + 1], np.int32)
        if bits[visit] & np.uint64(1):
            window[0] = first_token
        rows.append(window)
    return np.stack(rows)
