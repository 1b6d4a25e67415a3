"""Everything that a run depends on, checked."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax

from qjax.data import TokenSplit
from qjax.errors import InputError
from qjax.finetune import TuningMethod, method_of
from qjax.hessian.experts import ExpertFactor
from qjax.job.inputs import Inputs
from qjax.models.structure import structure
from qjax.pipeline.recipe import Recipe
from qjax.runtime.fingerprint import versions
from qjax.runtime.mesh import MeshSettings
from qjax.runtime.tracker import Tracker

__all__ = ["IRRELEVANT", "Job"]


# Settings that change where or how a run is carried out, not its bytes. The mesh changes the order in which Hessians
# are summed, so their last bits; it is left out nevertheless, so that a run may go on with other devices and processes.
IRRELEVANT = frozenset({"out", "cache", "dry_run", "resume", "tracker", "memory", "sweep", "mesh", "distributed"})


@dataclasses.dataclass(frozen=True)
class Job:
    """Everything a run depends on. `settings` is the resolved configuration as it is written down.

    Attributes:
      model: {"source", "dtype"}.
      data: arguments of `qjax.data.load`.
      recipe: by which the model is quantised, options of Hessians and tuning included.
      evaluate: {"enabled", "batch"}.
      memory: {"device_gb", "host_gb", "disk_gb"}.
      cache: folder shared between runs for Hessians and reference states.
      tracker: makes the tracker, given the run directory.
      inputs: the model and the tokens that jobs of one process share.
      mesh: the devices; all processes of a group run the same job, in folders that they share.
    """

    model: Mapping[str, Any]
    data: Mapping[str, Any]
    recipe: Recipe
    evaluate: Mapping[str, Any]
    memory: Mapping[str, Any]
    seed: int
    out: pathlib.Path
    cache: pathlib.Path
    settings: Mapping[str, Any]
    settings_yaml: str
    tracker: Callable[[pathlib.Path], Tracker]
    resume: bool = True
    dry_run: bool = False
    inputs: Inputs = dataclasses.field(default_factory=Inputs)
    mesh: MeshSettings = dataclasses.field(default_factory=MeshSettings)

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed is {self.seed}; it lies in 0 … 2^32 − 1")
        if self.evaluate["batch"] < 1:
            raise InputError(
                f"evaluate.batch is {self.evaluate['batch']}; it is the number of sequences per step, at least 1"
            )

    @property
    def hessian(self) -> Mapping[str, Any]:
        """The options of the `hessian` group."""
        return self.recipe.hessian

    @property
    def finetune(self) -> Mapping[str, Any]:
        """The options of the `finetune` group, {"name": "none"} without tuning."""
        return self.recipe.finetune or {"name": "none"}

    @functools.cached_property
    def tuning(self) -> TuningMethod | None:
        """The tuning method, None where there is none. Raises InputError for one or for options that do not exist."""
        return method_of(self.finetune)

    @property
    def streamed(self) -> bool:
        """Whether the run makes one pass over the blocks at a time alone; sketches and tuning go back and forth."""
        sketched = self.hessian["estimator"] != "input" or bool(self.hessian["fit_sequences"])
        return not sketched and (self.tuning is None or self.tuning.while_rounding)

    def fingerprint(self, tokens: TokenSplit) -> dict[str, Any]:
        """All that decides the run's bytes: settings without places and conveniences, model, tokens, versions."""
        settings = {key: value for key, value in self.settings.items() if key not in IRRELEVANT}
        if "hessian" in settings and not structure(self.inputs.files(self.model["source"]).config).experts:
            own = {field.name for field in dataclasses.fields(ExpertFactor)}  # they decide nothing
            settings["hessian"] = {key: value for key, value in settings["hessian"].items() if key not in own}
        return {
            "settings": settings,
            "model": self.inputs.fingerprint(self.model["source"], self.model["dtype"])["sha256"],
            "calibration": tokens.calibration.sha256,
            "evaluation": tokens.evaluation.sha256,
            "versions": versions(),
            "platform": jax.default_backend(),
        }
