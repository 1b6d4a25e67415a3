"""The contract of a model family: its configuration, its tensors, its forward pass; all else is derived from these."""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

from jaxtyping import Array, Float, Int

from qjax.models.config import ModelConfig
from qjax.models.context import Cached, Context
from qjax.models.families.fields import Fields
from qjax.registry import Registry
from qjax.typing import HostOrDevice

__all__ = ["FAMILIES", "KIND", "Family", "Residual", "Shape", "family", "paths"]

Shape = tuple[int, ...]

KIND = "attention_kind"
"""The place of a layer's `AttentionKind` in the parameters of its block, in models whose layers differ."""


@dataclasses.dataclass(frozen=True)
class Residual:
    """The linears around a residual stream that only norms without a mean read: it can be rotated.

    Attributes:
      readers: by the norm of a block, the linears that read its output.
      writers: linears whose outputs are added to the stream.
      values: the linear of the heads' values.
      mixed: the linear whose inputs are the heads' mixed values.
    """

    readers: Mapping[str, tuple[str, ...]]
    writers: tuple[str, ...]
    values: str
    mixed: str


class Family(abc.ABC):
    """A family of decoder-only transformers. An instance has no state.

    Parameters of a model are `{"embed", "norm", "blocks", "head"?}`: what comes before the blocks, what comes between
    them and the product with the vocabulary, the blocks, and the vocabulary's matrix unless it is the embedding's.
    Linear weights are `[out, in]`. A tensor's place in the parameters follows from its name (see `paths`).

    Attributes:
      model_type: as in `config.json`.
      title: for messages.
      prefix: what the names of block 0's tensors begin with, `{index}` in place of 0.
      Config: the static description, `ModelConfig` or a dataclass derived from it.
      whole: why its blocks cannot be cut into parts of heads and hidden features; None where they can.
      ignored: ends of the names of tensors that files hold and nothing reads: buffers of masks and angles.
      gguf: `general.architecture` of its GGUF files, None where there are none.
      gguf_gain: what GGUF files add to the gains of norms.
      gguf_paired: linears whose rows GGUF files store with the rotary pairs as neighbours (row 2i with 2i + 1).
    """

    model_type: ClassVar[str]
    title: ClassVar[str]
    prefix: ClassVar[str] = "model.layers.{index}."
    Config: ClassVar[type[ModelConfig]] = ModelConfig
    gguf_gain: ClassVar[float] = 0.0
    whole: ClassVar[str | None] = None
    ignored: ClassVar[tuple[str, ...]] = ("rotary_emb.inv_freq",)
    gguf: ClassVar[str | None] = None
    gguf_paired: ClassVar[tuple[str, ...]] = ()

    @abc.abstractmethod
    def config(self, fields: Fields, architecture: str) -> ModelConfig:
        """The static description from `config.json`. Raises ModelFileError for what the forward pass does not have."""

    def gguf_table(self, entry: Callable[..., Any]) -> dict[str, Any] | None:
        """The keys of `config.json` that a GGUF file of the family means beside shapes, rotary base and its scaling.

        `entry(key, default)` is a number of its metadata. None: the family has no keys of its own.
        """
        return None

    @abc.abstractmethod
    def block_tensors(self, config: Any) -> dict[str, Shape]:
        """Name, without prefix, and shape of every tensor of a block."""

    @abc.abstractmethod
    def edge_tensors(self, config: Any) -> dict[str, tuple[str, Shape]]:
        """Name of every tensor outside of the blocks: its path in the parameters ("embed", "norm/weight") and shape."""

    @abc.abstractmethod
    def embed(
        self, parameters: Any, tokens: Int[Array, "batch length"], positions: Int[Array, "#batch length"], config: Any
    ) -> Float[Array, "batch length width"]:
        """The first block's input; `parameters` are the model's "embed".

        The table's rows come through `qjax.models.linear.rows`: it may be quantised.
        """

    @abc.abstractmethod
    def block(self, parameters: Any, x: HostOrDevice, context: Context | Cached) -> Float[Array, "batch length width"]:
        """One block. Linears are computed by `qjax.models.linear.affine`, once for each, attention by the context."""

    def residual(self) -> Residual | None:
        """What a rotation of the residual stream has to be folded into; None where it cannot be."""
        return None

    @abc.abstractmethod
    def final(self, parameters: Any, x: HostOrDevice, config: Any) -> Float[Array, "batch length features"]:
        """The factor of the vocabulary's matrix; x the last block's output, `parameters` the model's "norm"."""


FAMILIES: Registry[Family] = Registry("model family", "qjax.models.families.FAMILIES")
"""By the name of the architecture in `config.json`."""


@functools.cache
def _instance(architecture: str) -> Family:
    return FAMILIES.make(architecture)


def family(config: ModelConfig) -> Family:
    """The family of a model. Raises InputError for an architecture that is not registered."""
    return _instance(config.architecture)


def paths(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The place in a block's parameters of every tensor, by its name: its parts, in nested dictionaries.

    A gain without a bias is an array under its own name (`input_layernorm`, not `input_layernorm.weight`), and so is a
    router (`gate`), which is no linear: it stays dense.
    """
    names = list(names)
    known, found = set(names), {}
    for name in names:
        *parts, kind = name.split(".")
        alone = parts[-1].endswith("norm") or parts[-1] == "gate"
        bare = kind == "weight" and alone and ".".join([*parts, "bias"]) not in known
        found[name] = tuple(parts) if bare else (*parts, kind)
    return found
