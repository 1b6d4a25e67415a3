"""The contract of tuning methods: frozen dataclasses whose fields are the options of `finetune=`."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from jax.sharding import Mesh

from qjax.data import TokenStream
from qjax.errors import InputError
from qjax.finetune.rules import RateRule
from qjax.models import Model
from qjax.registry import Registry, check_options
from qjax.training.loop import Step

__all__ = ["TUNINGS", "Tuned", "TuningMethod", "method_of"]


@dataclasses.dataclass(frozen=True)
class Tuned:
    """The tuned model and what `results.json` says about its tuning."""

    params: Any
    report: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class TuningMethod:
    """A way to tune a quantised model; a subclass adds `tune`, or is used while blocks are rounded.

    Attributes:
      name: the registered name.
      while_rounding: whether it tunes each block as it is rounded; the others tune the whole rounded model.
      one_device: whether it runs on one device only.
      tunes_weights: whether there is a latent weight, or its gradient, as large as every matrix.
    """

    name: ClassVar[str]
    while_rounding: ClassVar[bool] = False
    one_device: ClassVar[bool] = False
    tunes_weights: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the options. Raises InputError for a value of another kind or out of its range."""
        check_options(self, "finetune")

    def windows(self) -> int | None:
        """The number of windows that the text must give, validation included; None for all there are."""
        return None

    def tune(
        self,
        reference: Model,
        params: Any,
        tokens: TokenStream,
        *,
        seed: int,
        identity: str,
        cache: pathlib.Path | None = None,
        folder: pathlib.Path | None = None,
        on_plan: Callable[[int], None] = lambda steps: None,
        on_teacher: Callable[[int, int], None] | None = None,
        on_step: Callable[[Step], None] = lambda step: None,
        mesh: Mesh | None = None,
    ) -> Tuned:
        """Tune the quantised `params` towards `reference` on `tokens`.

        Args:
          identity: names the reference and whatever else decides its states, for the cache.
          cache: folder of the reference's states, shared between runs.
          folder: of checkpoints; a killed run with the same folder continues to the same result.
          on_plan: called with the number of steps.
          on_teacher: blocks done.
          on_step: after every step.
          mesh: devices that share the work; None is one.
        """
        raise InputError(f"finetune={self.name} tunes blocks while they are rounded: quantise with it")


TUNINGS: Registry[TuningMethod] = Registry("tuning method", "qjax.finetune.TUNINGS")


def method_of(options: Mapping[str, Any]) -> TuningMethod | None:
    """The tuning method of the `finetune` group; None for the name "none".

    Raises InputError for a method or an option that does not exist, and for values out of range.
    """
    if options["name"] == "none":
        return None
    if "rules" in options:
        RateRule.several(options["rules"])  # whose words for what is no rule are better
    return TUNINGS.build(options)
