"""Groups of the configuration, and what stands behind each: a registry, or a dataclass of options.

Read from source files, so that a name or an option is known before JAX is imported. Of a plugin, which is imported by
then, the registries themselves are asked.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Mapping
from typing import Any

from qjax.registry.options import Options
from qjax.registry.source import Unreadable, found_in, options_at
from qjax.registry.table import Registry

__all__ = ["ENTRIES", "GROUPS", "Entry", "Group", "options_of_entry"]


@dataclasses.dataclass(frozen=True)
class Group:
    """A group of the configuration: `name=option`, then `name.key=value`.

    Attributes:
      name: as on the command line.
      key: the setting that says which option it is, `rounding.name`; None where all have the same settings.
      registry: the variable that holds the options, "qjax.rounding.ROUNDINGS"; None without one.
      given: parameters of the constructors that are no settings.
      shared: a dataclass, "module.Class", whose fields every option has.
      more: options besides those of the registry: name -> dataclass, or None for one without settings.
      flat: whether the settings lie at the top level, as those of `bench`.
    """

    name: str
    key: str | None = "name"
    registry: str | None = None
    given: tuple[str, ...] = ()
    shared: str | None = None
    more: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
    flat: bool = False

    def names(self) -> list[str]:
        """The options' names, those of plugins last."""
        own = {*self.more}
        if self.registry is not None:
            own |= {*found_in(*_split(self.registry)), *Registry.known.get(self.registry, ())}
        return sorted(own)

    def options(self, name: str) -> Options:
        """The settings of an option, without `key`. Raises KeyError for a name that there is not."""
        own = Options({})
        if name in self.more:
            own = _options(self.more[name]) if self.more[name] is not None else own
        elif self.registry is not None:
            own = self._registered(name)
        elif self.key is not None:
            raise KeyError(name)
        shared = _options(self.shared) if self.shared is not None else Options({})
        return dataclasses.replace(own, known={**own.without(*self.given).known, **shared.known})

    def node(self, name: str) -> dict[str, Any]:
        """The settings of an option with their defaults, as the configuration has them."""
        named = {} if self.key is None else {self.key: name}
        return {**named, **self.options(name).defaults()}

    def _registered(self, name: str) -> Options:
        assert self.registry is not None
        found = found_in(*_split(self.registry))
        if name in found:
            try:
                return options_at(*found[name])
            except Unreadable:
                importlib.import_module(found[name][0])
        return Registry.known[self.registry].options(name)


def _split(variable: str) -> tuple[str, str]:
    room, _, name = variable.rpartition(".")
    return room, name


@functools.cache
def _options(place: str) -> Options:
    return options_at(*_split(place))


_BENCH = ("Matrix", "Codebook", "Two_Sided", "Decode", "Finetune", "Kernels")

GROUPS: Mapping[str, Group] = {
    group.name: group
    for group in (
        Group("model", key=None, shared="qjax.job.options.ModelSource"),
        Group(
            "data",
            key="source",
            registry="qjax.data.SOURCES",
            given=("opener",),
            shared="qjax.data.loading.Windows",
            more={"mixture": "qjax.data.loading.Mixture"},
        ),
        Group("hessian", key="estimator", registry="qjax.hessian.ESTIMATORS"),
        Group("incoherence", registry="qjax.incoherence.INCOHERENCE"),
        Group("codebook", registry="qjax.codebooks.CODEBOOKS", given=("bits",)),
        Group("rounding", registry="qjax.rounding.ROUNDINGS", given=("rule",)),
        Group("scale", key=None, shared="qjax.codebooks.scaling.ScaleRule"),
        Group("finetune", registry="qjax.finetune.TUNINGS", more={"none": None}),
        Group("allocate", more={"none": None}),
        Group("evaluate", key=None, shared="qjax.job.options.Evaluate"),
        Group("tracker", registry="qjax.runtime.TRACKERS", given=("folder", "run_name", "config", "clock")),
        Group("mesh", key=None, shared="qjax.runtime.mesh.MeshSettings"),
        Group("distributed", key=None, shared="qjax.runtime.distributed.DistributedSettings"),
        Group("memory", key=None, shared="qjax.job.options.Memory"),
        Group("preset", key=None, shared="qjax.job.options.NoPreset"),
        Group(
            "bench",
            key="bench",
            more={name.lower(): f"qjax.bench.options.{name.replace('_', '')}" for name in _BENCH},
            flat=True,
        ),
    )
}
# The option of a group whose settings are the dataclass's defaults; the others are files that say what deviates.
PLAIN: Mapping[str, str] = {
    "model": "hf",
    "scale": "rms",
    "evaluate": "default",
    "mesh": "single",
    "distributed": "none",
    "memory": "unlimited",
    "preset": "none",
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """An entry point of the command line.

    Attributes:
      options: the dataclass of its settings outside of groups.
      groups: those it chooses from.
      optional: groups of files that set any of its settings: `experiment=`, `debug=`.
    """

    options: str
    groups: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()


_QUANTIZE = "model data hessian incoherence codebook rounding scale finetune allocate evaluate tracker mesh distributed"
ENTRIES: Mapping[str, Entry] = {
    "quantize": Entry(
        "qjax.job.options.Quantize", (*_QUANTIZE.split(), "memory", "preset"), ("experiment", "preset", "debug")
    ),
    "hessians": Entry("qjax.job.options.Hessians", ("model", "data", "hessian", "mesh", "distributed")),
    "evaluate_artifact": Entry("qjax.job.options.EvaluateArtifact", ("mesh", "distributed")),
    "finetune": Entry("qjax.job.options.Finetune", ("finetune", "mesh", "distributed")),
    "generate": Entry("qjax.job.options.Generate", ("mesh",)),
    "export": Entry("qjax.job.options.Export"),
    "report": Entry("qjax.job.options.Report"),
    "bench": Entry("qjax.bench.options.Bench", ("bench",)),
    "train_tiny": Entry("qjax.training.options.Training"),
}


def options_of_entry(entry: str) -> Options:
    """The settings of an entry point outside of its groups."""
    return _options(ENTRIES[entry].options)
