"""The work behind `experiments.quantize`, apart from it: it imports JAX, which a typing error need not wait for."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Mapping
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import to_absolute_path
from omegaconf import DictConfig, OmegaConf

from qjax.configuration import plugins
from qjax.configuration.check import check
from qjax.errors import InputError
from qjax.job.inputs import Inputs
from qjax.job.run import run
from qjax.job.settings import Job
from qjax.pipeline.presets import recipe_of
from qjax.runtime import tracker
from qjax.runtime.distributed import is_primary

from . import _sweep
from ._devices import claim
from ._entry import CONFIGS, cache_folder, compilation_cache, join, mesh_of, plain

__all__ = ["CONFIGS", "job_of", "start"]


def default_out(settings: Mapping[str, Any]) -> str:
    """`runs/<model>-<rounding>-<codebook>-<bits>b-s<seed>`, in names that are safe for files."""
    model = str(settings["model"]["source"]).rstrip("/").rsplit("/", 1)[-1]
    parts = (
        model,
        settings["rounding"]["name"],
        settings["codebook"]["name"],
        f"{settings['bits']}b",
        f"s{settings['seed']}",
    )
    return "runs/" + "-".join("".join(c if c.isalnum() or c in "._" else "_" for c in str(part)) for part in parts)


def tracker_options(settings: Mapping[str, Any], *, swept: bool) -> dict[str, Any]:
    """The tracker's options; a job of a sweep is in the group of the sweep's name, wandb gets tags to filter by."""
    options = {key: value for key, value in settings["tracker"].items() if key != "name" and value is not None}
    if swept:
        options.setdefault("group", str(settings["sweep"]))
    if settings["tracker"]["name"] == "wandb":
        model = str(settings["model"]["source"]).rstrip("/").rsplit("/", 1)[-1]
        named = [settings[group]["name"] for group in ("rounding", "codebook", "incoherence", "finetune", "preset")]
        tags = [model, f"{settings['bits']} bits", *(name for name in named if name != "none")]
        options.setdefault("tags", list(dict.fromkeys(str(tag)[:64] for tag in tags)))  # wandb takes 64 characters
    return options


def job_of(config: DictConfig, out: pathlib.Path | None = None, inputs: Inputs | None = None) -> Job:
    """A run's settings, checked, as the job they describe; `out` and `inputs` are given by a sweep."""
    settings = plain(config)
    plugins.load(settings["plugins"])  # in a process that a launcher started
    check(settings, "quantize")
    out = out or pathlib.Path(settings["out"] or default_out(settings))
    settings["out"] = str(out)
    make_tracker = functools.partial(
        tracker.make,
        settings["tracker"]["name"],
        run_name=out.name,
        config=settings,
        **tracker_options(settings, swept=inputs is not None),
    )
    return Job(
        model=settings["model"],
        data={key: value for key, value in settings["data"].items() if value is not None},
        recipe=recipe_of(settings),
        evaluate=settings["evaluate"],
        memory=settings["memory"],
        seed=settings["seed"],
        out=out,
        cache=cache_folder(settings["cache"]),
        settings=settings,
        settings_yaml=OmegaConf.to_yaml(OmegaConf.create(settings)),
        tracker=make_tracker,
        resume=settings["resume"],
        dry_run=settings["dry_run"],
        inputs=inputs or Inputs(),
        mesh=mesh_of(settings),
    )


def tuning_line(report: Mapping[str, Any]) -> str:
    """The results of tuning, in a line."""
    before = report.get("before")
    known = "" if before is None else f"before: KL {before['kl_mean']:.4f}, perplexity {before['perplexity']:.2f}; "
    share = report.get("recovered")
    known += "" if share is None else f"{100 * share:.0f}% of the lost perplexity recovered; "
    return (
        f"tuned {report['parameters_tuned']} parameters on {report['tokens']} tokens in {report['seconds']:.0f} s: "
        f"{known}validation {report['validation_before']:.4f} -> {report['validation_after']:.4f} "
        f"(step {report['best_step']} of {report['steps']})"
    )


def summary(results: Mapping[str, Any]) -> str:
    """The run's numbers in a few lines."""
    lines = [
        f"bits per weight {results['bits_per_weight']:.3f}, whole model {results['whole_model_bytes'] / 2**20:.1f} MiB "
        f"(reference {results['whole_model_bytes_reference'] / 2**20:.1f})",
        f"mean relative proxy loss {results['proxy_loss_mean']:.4f}, worst {results['proxy_loss_worst']:.4f} "
        f"({results['proxy_loss_worst_layer']})",
    ]
    if "kl_mean" in results:
        perplexity = results["perplexity"]
        low, high = results["kl_mean_interval"]
        lines += [
            f"perplexity {'infinite' if perplexity is None else f'{perplexity:.2f}'} "
            f"(reference {results['perplexity_reference']:.2f}), "
            f"KL {results['kl_mean']:.4f} [{low:.4f}, {high:.4f}], top-1 agreement {results['top1_agreement']:.3f}"
        ]
    if "parameters_tuned" in results.get("finetune", {}):
        lines += [tuning_line(results["finetune"])]
    seconds = ", ".join(f"{name} {value:.0f}" for name, value in results["seconds"].items())
    lines += [
        f"seconds: {seconds}; {results['compiled_programs']} compiled programs; "
        f"peak memory {results['peak_memory_bytes'] / 2**30:.2f} GiB"
    ]
    return "\n".join(lines)


def carry_out(task: Job) -> float | None:
    """Run a job and print its numbers; returns its mean KL, the objective of a sweeper that searches."""
    compilation_cache(task.cache)
    results = run(task)
    if results is None:
        return None
    if is_primary():
        print(summary(results), flush=True)
    return results.get("kl_mean", results["proxy_loss_mean"])


_INPUTS = Inputs()  # shared by the jobs of a sweep that run in this process


def start(config: DictConfig) -> float | None:
    """Run the job of a configuration."""
    if HydraConfig.get().mode != RunMode.MULTIRUN:
        join(plain(config))
        return carry_out(job_of(config))
    if plain(config)["distributed"]["coordinator"] is not None:
        raise InputError(
            "-m with distributed.coordinator: a sweep runs in one process; start the jobs one by one, each in all "
            "processes, or the sweep in one process (mesh.data=… takes its devices)"
        )
    claim(str(HydraConfig.get().runtime.choices.get("hydra/launcher")))
    overrides = list(HydraConfig.get().overrides.task)
    settings = plain(config)
    out = pathlib.Path(settings["out"] or _sweep.directory(settings, overrides))
    folder = pathlib.Path(to_absolute_path(HydraConfig.get().sweep.dir))
    return _sweep.attempt(lambda: carry_out(job_of(config, out, _INPUTS)), out, folder, overrides)
