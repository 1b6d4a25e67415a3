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
from qjax.models.context import Context
from qjax.models.families import family, paths
from qjax.models.linear import recorded, replace_linears
from qjax.models.structure import abstract_block, structure
from qjax.models.transformer import embed, forward, head, logits
from qjax.training.order import random_bits, windows_at

__all__ = ["Schedule", "TrainState", "batch_at", "initial_state", "routed_loss", "sum_loss", "train_step"]

Params = Any
_BALANCE = 0.02  # the weight of the routers' balance in what is trained


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
    tensors = family(config).block_tensors(config)
    block = {path: tensors[name] for name, path in paths(tensors).items()}
    matrices = sum(len(shape) == 2 for shape in block.values())  # linears and routers
    keys = iter(jax.random.split(key, config.num_layers * matrices + 1))

    def layer() -> Params:
        weights = {}
        for linear in linears:
            scale = residual if linear.row_parallel else 1.0  # those whose outputs are added to the residual
            weights[linear.name] = jax.random.normal(next(keys), linear.shape) * (scale * linear.inner**-0.5)
        ones = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), abstract_block(config))
        routers = [path for path, shape in block.items() if len(shape) == 2 and path[-1] != "weight"]
        for path in routers:
            *groups, last = path
            node = functools.reduce(lambda node, key: node[key], groups, ones)
            node[last] = jax.random.normal(next(keys), block[path]) * block[path][1] ** -0.5
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


def routed_loss(
    params: Params, tokens: Int[Array, "batch length"], config: ModelConfig
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(the sum of `sum_loss`, the mean over all routers of `E Σ f_e p_e`) of a mixture of E experts.

    f_e is the share of places that expert e got and p_e its mean probability: 1 where all get the same, and what keeps
    a router from sending all tokens to few. Source: Switch Transformers (2101.03961), section 2.2.
    """
    x, balance = embed(params["embed"], tokens[:, :-1], config), jnp.zeros(())
    for parameters in params["blocks"]:
        with recorded() as record:
            x = family(config).block(parameters, x, Context(config))
        (probabilities,) = record.routers
        count = probabilities.shape[-1]
        routed = jnp.stack(record.routed[record.experts.index(0) :][:count], axis=-1)
        shares = jnp.mean(routed.astype(jnp.float32), axis=(0, 1))
        places = jax.lax.stop_gradient(shares / jnp.sum(shares))
        balance += count * jnp.sum(places * jnp.mean(probabilities, axis=(0, 1)))
    scores = logits(head(params), x, config)
    loss = jnp.sum(optax.softmax_cross_entropy_with_integer_labels(scores, tokens[:, 1:]))
    return loss, balance / config.num_layers


@functools.partial(jax.jit, static_argnames=("config", "schedule"), donate_argnums=0)
def train_step(
    state: TrainState, tokens: Int[Array, "batch length"], config: ModelConfig, schedule: Schedule
) -> tuple[TrainState, Float[Array, ""], Float[Array, ""]]:
    """One update: `(new state, mean loss in nats per token before it, norm of the gradient)`.

    The old state's buffers are donated. Nothing is raised: the caller looks at the loss and the norm.
    """
    count = tokens.shape[0] * (tokens.shape[1] - 1)

    def mean_loss(params: Params) -> tuple[Array, Array]:
        if not structure(config).experts:
            loss = sum_loss(params, tokens, config) / count
            return loss, loss
        loss, balance = routed_loss(params, tokens, config)
        return loss / count + _BALANCE * balance, loss / count

    (_, loss), gradient = jax.value_and_grad(mean_loss, has_aux=True)(state.params)
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
