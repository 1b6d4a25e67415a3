"""A sweep before its first job, in the process that starts it: where it lies, and whether its jobs get in the way."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Sequence
from typing import Any, cast

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.utils import to_absolute_path
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

__all__ = ["FOLDER", "Listener", "conflict"]

FOLDER = "QJAX_SWEEP_FOLDER"  # where its jobs are listed, as the process that started it sees it


class Listener(Callback):
    """Hydra's callback in the process that starts a sweep: says where `hydra.sweep.dir` is, wherever that may be.

    `configs/quantize.yaml` names it, so it has the same name in a clone and in an installation.
    """

    def on_multirun_start(self, config: Any, **kwargs: Any) -> None:
        """Put the folder into the environment, which the processes that the launcher starts inherit.

        Exits with 2 for a sweep of which two jobs have one directory.
        """
        os.environ[FOLDER] = to_absolute_path(str(config.hydra.sweep.dir))
        try:
            found = conflict(config)
        except (HydraException, OmegaConfBaseException):
            return  # the sweeper meets it too, and says what it is
        if found is not None:
            print(f"error: {found}", file=sys.stderr, flush=True)
            raise SystemExit(2)  # Hydra passes over exceptions of its callbacks


def conflict(config: Any) -> str | None:
    """The reason why two jobs of a sweep cannot have the `out=` that they would have; None where all differ."""
    if config.get("dry_run"):
        return None
    loader = GlobalHydra.instance().config_loader()
    written = [OmegaConf.to_container(part, resolve=False) for part in (config.hydra.sweeper, config.hydra.overrides)]
    sweeper, overrides = cast(Any, written)
    params = [f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()]
    parsed = OverridesParser.create(config_loader=loader).parse_overrides([*params, *overrides["task"]])
    axes = {one.get_key_element(): one for one in parsed}  # a later one takes the place of an earlier
    swept = {key: one for key, one in axes.items() if one.is_sweep_override()}
    raw = OmegaConf.to_container(config, resolve=False)
    constant = raw.get("out") if isinstance(raw, dict) and "out" not in swept else "${}"
    if constant is None or not all(one.is_discrete_sweep() for one in swept.values()):
        return None
    jobs = [
        [f"{key}={value}" for key, value in zip(swept, values, strict=True)]
        for values in itertools.product(*(list(one.sweep_string_iterator()) for one in swept.values()))
    ]
    if "${" not in str(constant):
        return _message(str(constant), jobs[0], jobs[1]) if len(jobs) > 1 else None
    fixed = [str(one.input_line) for key, one in axes.items() if key not in swept]
    seen: dict[str, Sequence[str]] = {}
    for job in jobs:
        out = loader.load_sweep_config(config, [*fixed, *job]).get("out")
        if out is not None and seen.setdefault(str(out), job) is not job:
            return _message(str(out), seen[str(out)], job)
    return None


def _message(out: str, one: Sequence[str], other: Sequence[str]) -> str:
    return (
        f"out={out} is the directory of one job, and two jobs of the sweep have it: {' '.join(one)} and "
        f"{' '.join(other)}; leave out= away (every job then gets a directory of its own in runs/<sweep>), or put "
        "what varies into it, as in 'out=runs/a/${bits}'"
    )
