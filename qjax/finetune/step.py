"""One step of tuning: the loss of a batch, its gradient, the update; on one device or in parts on a mesh."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int

from qjax.errors import InputError
from qjax.finetune.edges import own_head, tree
from qjax.finetune.losses import KINDS, chunked_mean, next_token, soft_targets, topk_targets
from qjax.finetune.optimizer import Optimizer
from qjax.finetune.parameters import Layout, hidden
from qjax.finetune.sharding import AXIS, Parts
from qjax.models import transformer
from qjax.models.config import ModelConfig
from qjax.typing import HostOrDevice

__all__ = ["Options", "batch_loss", "train_step", "validation_step"]


@dataclasses.dataclass(frozen=True)
class Options:
    """Static choices of the step; hashable.

    Attributes:
      loss: "kl" to the teacher, or "next_token".
      remat: compute blocks again in the backward pass.
      chunk: positions whose logits exist at a time.
      dtype: of the activations.
    """

    loss: str = "kl"
    remat: bool = True
    chunk: int = 256
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.loss not in KINDS:
            raise InputError(f"finetune.loss is {self.loss!r}; there is: {', '.join(KINDS)}")
        if self.dtype not in ("float32", "bfloat16") or self.chunk < 1:
            raise InputError(
                f"finetune: dtype {self.dtype!r}, chunk {self.chunk}; dtype is float32 or bfloat16, chunk at least 1"
            )


def batch_loss(
    tuned: Mapping[str, Any],
    frozen: Mapping[str, Any],
    tokens: Int[HostOrDevice, "batch length"],
    targets: Mapping[str, Any],
    teacher: Any,
    layout: Layout,
    config: ModelConfig,
    options: Options,
    parts: Parts | None = None,
) -> Array:
    """Mean loss in nats over all positions of the windows but the last of each.

    With `parts` it runs inside `shard_map`: arrays are parts, windows and loss this device's own.
    """
    whole = (lambda name, array: array) if parts is None else parts.whole
    teacher = None if teacher is None else {name: whole(f"teacher.{name}", value) for name, value in teacher.items()}
    names = own_head((*frozen, *tuned))
    edges = {name for name in (*frozen, *tuned) if not name.startswith("layers.")}  # codebook tables among them
    frozen = {name: whole(name, value) if name in edges else value for name, value in frozen.items()}
    tuned = {name: whole(name, value) if name in edges else value for name, value in tuned.items()}
    arrays = {**frozen, **tuned}
    if options.dtype != "float32":
        arrays |= {name: a.astype(options.dtype) for name, a in arrays.items() if name.split(".")[0] == "embed"}
    gather = None if parts is None else functools.partial(parts.whole, layer=True)
    tokens = jnp.asarray(tokens)
    x = hidden(arrays, layout, tokens, config, options.remat, gather)
    width = x.shape[-1]
    flat = x[:, :-1].reshape(-1, width).astype(jnp.float32)
    moving = {part: tuned[name] for part, name in names.items() if name in tuned}
    fixed = {part: frozen[name] for part, name in names.items() if name in frozen}
    positions = {name: value[:, :-1].reshape(flat.shape[0], -1) for name, value in targets.items()}
    if options.loss == "next_token":
        positions = {"token": tokens[:, 1:].reshape(-1, 1)}

    def per_position(head: Any, x: Array, target: Any, constants: Any) -> Array:
        own = transformer.logits(tree({**constants["own"], **head}), x[None], config)[0]
        if options.loss == "next_token":
            return next_token(own, target["token"][:, 0])
        if "index" in target:
            return topk_targets(own, target["index"], target["log_p"].astype(jnp.float32))
        states = target["states"].astype(jnp.float32)
        return soft_targets(own, transformer.logits(tree(constants["teacher"]), states[None], config)[0])

    return chunked_mean(per_position, options.chunk, moving, flat, positions, {"own": fixed, "teacher": teacher})


@functools.partial(jax.jit, static_argnames=("layout", "config", "options", "parts"))
def validation_step(
    tuned: Mapping[str, Any],
    frozen: Mapping[str, Any],
    tokens: Int[HostOrDevice, "batch length"],
    targets: Mapping[str, Any],
    teacher: Any,
    layout: Layout,
    config: ModelConfig,
    options: Options,
    parts: Parts | None = None,
) -> Array:
    """`batch_loss` of a batch; on a mesh of all devices' windows, or of the same ones where they do not divide."""
    loss = functools.partial(batch_loss, layout=layout, config=config, options=options, parts=parts)
    if parts is None:
        return loss(tuned, frozen, tokens, targets, teacher)
    rows = P(AXIS) if tokens.shape[0] % parts.mesh.shape[AXIS] == 0 else P()
    specs = (parts.specs(tuned), parts.specs(frozen), rows, rows, _teacher_specs(teacher, parts))
    mean = parts.mapped(lambda *arrays: jax.lax.pmean(loss(*arrays), AXIS), specs, P())
    return mean(tuned, frozen, tokens, targets, teacher)


def _teacher_specs(teacher: Any, parts: Parts) -> Any:
    return None if teacher is None else {name: parts.spec(f"teacher.{name}") for name in teacher}


def _gradient(
    tuned: Mapping[str, Any], frozen: Mapping[str, Any], tokens: HostOrDevice, targets: Any, teacher: Any, loss: Any
) -> tuple[Array, dict[str, Array]]:
    """Mean loss and gradient over the accumulated batches `[accumulate, batch, …]`."""

    def accumulate(total: Any, part: Any) -> tuple[Any, None]:
        value, gradient = jax.value_and_grad(loss)(tuned, frozen, part[0], part[1], teacher)
        return jax.tree.map(jnp.add, total, (value, gradient)), None

    if tokens.shape[0] == 1:
        return jax.value_and_grad(loss)(
            tuned, frozen, tokens[0], {name: leaf[0] for name, leaf in targets.items()}, teacher
        )
    zero = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, tuned))
    (value, gradient), _ = jax.lax.scan(accumulate, zero, (tokens, targets))
    return jax.tree.map(lambda leaf: leaf / np.float32(tokens.shape[0]), (value, gradient))


@functools.partial(jax.jit, static_argnames=("layout", "config", "options", "optimizer", "parts"), donate_argnums=(0,))
def train_step(
    state: Any,
    frozen: Mapping[str, Any],
    rates: Mapping[str, Any],
    tokens: Int[HostOrDevice, "accumulate batch length"],
    targets: Mapping[str, Any],
    teacher: Any,
    *,
    layout: Layout,
    config: ModelConfig,
    options: Options,
    optimizer: Optimizer,
    parts: Parts | None = None,
) -> tuple[Any, Array, Array]:
    """One update: (new state, loss before it, norm of the gradient). The old state's buffers are donated."""
    loss = functools.partial(batch_loss, layout=layout, config=config, options=options, parts=parts)
    if parts is None:
        value, gradient = _gradient(state["tuned"], frozen, tokens, targets, teacher, loss)
    else:

        def own(*arrays: Any) -> tuple[Array, dict[str, Array]]:
            value, gradient = _gradient(*arrays, loss=loss)
            return jax.lax.pmean(value, AXIS), parts.mean_gradient(gradient)

        moving, rows = parts.specs(state["tuned"]), P(None, AXIS)
        specs = (moving, parts.specs(frozen), rows, rows, _teacher_specs(teacher, parts))
        value, gradient = parts.mapped(own, specs, (P(), moving))(state["tuned"], frozen, tokens, targets, teacher)
    tuned, inner, norm = optimizer.update(gradient, state["optimizer"], state["tuned"], rates)
    new = {"tuned": tuned, "optimizer": inner}
    return new if parts is None else parts.kept(new), value, norm
