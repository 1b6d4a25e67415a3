"""Qwen3-MoE: Qwen3 with a mixture of experts in place of every MLP."""

from __future__ import annotations

from qjax.errors import ModelFileError
from qjax.models.families.base import FAMILIES
from qjax.models.families.fields import Fields
from qjax.models.families.mixture import Mixture, MixtureConfig
from qjax.models.families.qwen3 import Qwen3

__all__ = ["Qwen3MoE"]


@FAMILIES.register("Qwen3MoeForCausalLM")
class Qwen3MoE(Mixture, Qwen3):
    """Qwen3's attention, and experts of `moe_intermediate_size` features."""

    model_type = "qwen3_moe"
    title = "Qwen3MoeForCausalLM"
    gguf = None
    size = "moe_intermediate_size"
    default_active = 8

    def config(self, fields: Fields, architecture: str) -> MixtureConfig:
        """As `Family.config`: refuses models in which some blocks have one MLP and no experts."""
        dense, step = fields.table.get("mlp_only_layers") or [], fields.integer("decoder_sparse_step", 1)
        if dense or step != 1:
            raise ModelFileError(
                f"{fields.where}: mlp_only_layers is {dense!r} and decoder_sparse_step {step}; models whose blocks all "
                "have experts are supported: an empty list and 1"
            )
        return super().config(fields, architecture)
