"""Mixtral: Llama with a mixture of experts, whose weights are renormalised, in place of every MLP."""

from __future__ import annotations

from qjax.models.families.base import FAMILIES
from qjax.models.families.fields import Fields
from qjax.models.families.mistral import Mistral
from qjax.models.families.mixture import Mixture

__all__ = ["Mixtral"]


@FAMILIES.register("MixtralForCausalLM")
class Mixtral(Mixture, Mistral):
    """Mistral's attention, and experts `w2(silu(w1 x) · w3 x)`."""

    model_type = "mixtral"
    title = "MixtralForCausalLM"
    place = "block_sparse_moe"
    projections = ("w1", "w3", "w2")
    counts = ("num_local_experts",)
    default_active = 2

    def windows(self, fields: Fields, layers: int) -> list[int | None]:
        """`sliding_window` of all layers; an absent key is none."""
        return [None] if fields.table.get("sliding_window") is None else super().windows(fields, layers)

    def renormalised(self, fields: Fields) -> bool:
        """Always."""
        return True
