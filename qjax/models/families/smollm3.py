"""SmolLM3: Llama in which every fourth layer does not turn queries and keys by their positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qjax.errors import ModelFileError
from qjax.models.config import AttentionKind, Scaling
from qjax.models.families.base import FAMILIES
from qjax.models.families.fields import Fields
from qjax.models.families.llama import Llama
from qjax.models.families.windows import windows_of_layers

__all__ = ["SmolLM3"]


@FAMILIES.register("SmolLM3ForCausalLM")
class SmolLM3(Llama):
    """Llama with layers that see no positions (`no_rope_layers`, of which 0 marks one)."""

    model_type = "smollm3"
    title = "SmolLM3ForCausalLM"
    gguf = "smollm3"

    def gguf_table(self, entry: Callable[..., Any]) -> dict[str, Any]:
        """Nothing: every fourth layer is one without rotation."""
        return {}

    def options(self, fields: Fields) -> dict[str, Any]:
        """As `Llama.options`: the head is the embedding unless the configuration says otherwise."""
        return {"tie_embeddings": fields.flag("tie_word_embeddings", True)}

    def default_kv_heads(self, heads: int) -> int | None:
        """The key is needed."""
        return None

    def kinds(self, fields: Fields, layers: int, theta: float, scaling: Scaling | None) -> tuple[AttentionKind, ...]:
        """As `Llama.kinds`."""
        marks = fields.table.get("no_rope_layers")
        if marks is None:
            every = fields.integer("no_rope_layer_interval", 4)
            marks = [int((index + 1) % every != 0) for index in range(min(layers, 10_000))]
        if not isinstance(marks, list) or not all(mark in (0, 1) for mark in marks):
            raise ModelFileError(f"{fields.where}: no_rope_layers is {marks!r}; a list of 0 and 1 by layer is expected")
        windows: list[int | None] = [None]
        if fields.flag("use_sliding_window") and fields.table.get("sliding_window") is not None:
            windows = windows_of_layers(fields, fields.integer("sliding_window"), full=0, layers=layers)
        windows = windows * len(marks) if len(windows) == 1 else windows
        return tuple(AttentionKind(w, bool(mark), theta, scaling) for w, mark in zip(windows, marks, strict=False))
