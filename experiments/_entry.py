"""Common part of the entry points: errors without tracebacks, the compilation cache, settings as plain objects."""

from __future__ import annotations

import contextlib
import functools
import os
import pathlib
import signal
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import hydra
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qjax.configuration import former, plugins, store
from qjax.configuration.check import check
from qjax.errors import QjaxError

if TYPE_CHECKING:  # a typing error is answered before JAX is imported
    from jax.sharding import Mesh

    from qjax.runtime.mesh import MeshSettings

from ._models import spelled
from ._refusals import at_once, explain
from ._sweep import Sweep

__all__ = ["CONFIGS", "cache_folder", "compilation_cache", "entry", "join", "mesh_of", "mesh_or_none", "plain"]

CONFIGS = str(store.CONFIGS)
_RAISE = "HYDRA_FULL_ERROR"
store.fill()


class Terminated(BaseException):
    """SIGTERM, which a scheduler sends before it kills."""


def _terminated(number: int, frame: object) -> None:
    raise Terminated(f"signal {number}")


def entry(config_name: str, *, sweeps: bool = False) -> Callable[[Callable[[DictConfig], Any]], Callable[[], None]]:
    """Decorator: a Hydra program on `configs/<config_name>.yaml` that prints qjax's errors plainly and exits with 2.

    `sweeps`: list the failures of a sweep at its end.
    """

    def decorate(function: Callable[[DictConfig], Any]) -> Callable[[], None]:
        @functools.wraps(function)
        def guarded(config: DictConfig) -> Any:
            previous = signal.signal(signal.SIGTERM, _terminated)
            try:
                if not swept():  # a job of a sweep checks its own
                    check(plain(config), config_name)
                from qjax.runtime.freed_memory import keep_between_steps  # with it comes JAX

                keep_between_steps()
                return function(config)
            except (QjaxError, OmegaConfBaseException) as error:
                print(f"error: {error}", file=sys.stderr, flush=True)
                raise SystemExit(2) from None
            except RuntimeError as error:
                _end_with_the_others(error)
                raise
            except KeyboardInterrupt:
                print("interrupted: what was finished is kept; the same command continues", file=sys.stderr, flush=True)
                raise SystemExit(130) from None
            except Terminated:
                print("terminated: what was finished is kept; the same command continues", file=sys.stderr, flush=True)
                raise SystemExit(143) from None
            finally:
                signal.signal(signal.SIGTERM, previous)

        def swept() -> bool:
            return sweeps and HydraConfig.get().mode == RunMode.MULTIRUN

        program = hydra.main(version_base="1.3", config_path=CONFIGS, config_name=config_name)(guarded)

        @functools.wraps(function)
        def started() -> None:
            _known(config_name)
            with Sweep() if sweeps else contextlib.nullcontext():
                _plainly(program, config_name)

        return started

    return decorate


def _known(config_name: str) -> None:
    """Everything that the command line may name, a user's own algorithms too, put where Hydra looks."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", FutureWarning)
        warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr, flush=True)
        sys.argv[1:] = spelled(former.renewed(sys.argv[1:]), config_name)
    try:
        plugged = plugins.load_installed() + plugins.load(plugins.named(sys.argv[1:]))
    except QjaxError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    if plugged:
        store.fill()
    if (wrong := at_once(sys.argv[1:], config_name)) is not None:
        print(f"error: {wrong}", file=sys.stderr, flush=True)
        raise SystemExit(2)


def _end_with_the_others(error: RuntimeError) -> None:
    """Ends this process where one of a group is lost: not through JAX's shutdown, which waits for all of them."""
    jax = sys.modules.get("jax")
    if jax is None or not isinstance(error, jax.errors.JaxRuntimeError) or jax.process_count() == 1:
        return
    from qjax.runtime.distributed import is_primary, lost

    print(f"error: {lost(error)}", file=sys.stderr, flush=True)
    if is_primary():
        time.sleep(2)  # with it goes the coordinator, which aborts those that have not spoken yet
    os._exit(3)


def _plainly(program: Callable[[], Any], config_name: str) -> None:
    """Run a Hydra program; what Hydra refuses is one message that lists what exists, and an exit with 2."""
    before = os.environ.get(_RAISE)
    os.environ[_RAISE] = "1"  # Hydra then leaves its errors to us
    try:
        program()
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        print(f"error: {explain(error, sys.argv[1:], config_name)}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    finally:
        if before is None:
            os.environ.pop(_RAISE, None)
        else:
            os.environ[_RAISE] = before


def plain(config: Any) -> Any:
    """A configuration node as resolved plain Python values."""
    return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)


def mesh_of(settings: Mapping[str, Any]) -> MeshSettings:
    """The `mesh` group, checked; `make()` of it touches the devices."""
    from qjax.runtime.mesh import MeshSettings

    return MeshSettings(**settings["mesh"])


def mesh_or_none(settings: Mapping[str, Any]) -> Mesh | None:
    """The mesh of the `mesh` group; None for one device, which needs none. Several processes give at least one each."""
    import jax

    wanted = mesh_of(settings)
    if (wanted.data, wanted.model) == (1, 1) and jax.process_count() == 1:
        return None
    made = wanted.make()
    return None if made.size == 1 else made


def join(settings: Mapping[str, Any]) -> None:
    """Join the other processes of the `distributed` group; every entry point that runs on a mesh does so first."""
    from qjax.runtime.distributed import DistributedSettings, initialise

    group = DistributedSettings(**settings["distributed"])
    initialise(group)
    if group.coordinator is not None:
        print(
            f"process {group.process} of {group.processes}: when one of them dies, JAX ends the others within about "
            f"{group.heartbeat_s} s; the same command, in any number of processes, continues",
            flush=True,
        )


def cache_folder(setting: str | None) -> pathlib.Path:
    """The folder shared between runs: `cache=`, or QJAX_CACHE, or `~/.cache/qjax`."""
    folder = pathlib.Path(setting or os.environ.get("QJAX_CACHE") or "~/.cache/qjax").expanduser()
    os.environ["QJAX_CACHE"] = str(folder)  # downloads of models and texts go to the same place
    return folder


def compilation_cache(folder: pathlib.Path) -> None:
    """Keep compiled programs between processes, unless JAX was told a place already."""
    import jax

    if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_compilation_cache_dir", str(folder / "programs"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
