"""What the mixtures of experts have in common: a router in every block, and gated MLPs that share a block's tokens."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from qjax.errors import ModelFileError
from qjax.models.config import ModelConfig
from qjax.models.experts import affine_each, mixed, numbered, shares
from qjax.models.families.base import Shape
from qjax.models.families.fields import Fields
from qjax.models.families.llama import Llama

__all__ = ["Mixture", "MixtureConfig"]


@dataclasses.dataclass(frozen=True, repr=False)
class MixtureConfig(ModelConfig):
    """The configuration of a mixture of experts; `intermediate_size` is the width of one expert.

    Attributes:
      experts: in every block.
      active: experts that a token passes.
      renormalised: whether the weights of a token's experts add up to 1.
    """

    experts: int = 1
    active: int = 1
    renormalised: bool = True


class Mixture(Llama):
    """Llama with `Σ share · down(silu(gate(x)) · up(x))` over a token's experts in place of its MLP.

    Attributes:
      place: the MLP's in the names of tensors.
      projections: the names of gate, up and down.
      counts: keys of the configuration that may say how many experts there are.
      size: the key that says how wide an expert is.
      default_active: experts of a token where the configuration does not say.
    """

    gguf = None
    Config = MixtureConfig
    place: ClassVar[str] = "mlp"
    projections: ClassVar[tuple[str, str, str]] = ("gate_proj", "up_proj", "down_proj")
    counts: ClassVar[tuple[str, ...]] = ("num_experts", "num_local_experts")
    size: ClassVar[str] = "intermediate_size"
    default_active: ClassVar[int | None] = None

    def config(self, fields: Fields, architecture: str) -> MixtureConfig:
        """As `Family.config`: also refuses a block that passes a token through more experts than it has."""
        common = super().config(fields, architecture)
        key = next((key for key in self.counts if fields.table.get(key) is not None), self.counts[0])
        experts, active = fields.integer(key), fields.integer("num_experts_per_tok", self.default_active)
        if active > experts:
            raise ModelFileError(
                f"{fields.where}: num_experts_per_tok is {active} and {key} {experts}; a token passes at most all"
            )
        values = {field.name: getattr(common, field.name) for field in dataclasses.fields(ModelConfig)}
        values |= {"intermediate_size": fields.integer(self.size), "mlp_bias": False}
        return MixtureConfig(**values, experts=experts, active=active, renormalised=self.renormalised(fields))

    def renormalised(self, fields: Fields) -> bool:
        """Whether the weights of a token's experts add up to 1."""
        return fields.flag("norm_topk_prob")

    def block_tensors(self, config: Any) -> dict[str, Shape]:
        """As `Family.block_tensors`: one matrix per expert and projection."""
        width, middle, place = config.hidden_size, config.intermediate_size, self.place
        llama = super().block_tensors(config)
        tensors = {name: shape for name, shape in llama.items() if not name.startswith("mlp.")}
        tensors[f"{place}.gate.weight"] = (config.experts, width)
        for expert in range(config.experts):
            for name, shape in zip(self.projections, ((middle, width), (middle, width), (width, middle)), strict=True):
                tensors[f"{place}.experts.{expert}.{name}.weight"] = shape
        return tensors

    def feed_forward(self, parameters: Any, x: Array, config: Any) -> Array:
        """The sum over a token's experts by their weights."""
        own = parameters[self.place]
        logits = jnp.einsum("bld,ed->ble", x.astype(jnp.float32), own["gate"].astype(jnp.float32))
        weights = shares(logits, config.active, config.renormalised)
        routed = weights > 0
        gate, up, down = (numbered(own["experts"], name) for name in self.projections)
        hidden = jax.nn.silu(affine_each(gate, x, routed)) * affine_each(up, x, routed)
        return mixed(affine_each(down, hidden, routed), weights)
