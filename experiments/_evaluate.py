"""The work behind `experiments.evaluate`, apart from it: it imports JAX, which a typing error need not wait for."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import jax
import yaml
from jax.sharding import Mesh
from omegaconf import DictConfig

from qjax import data, models
from qjax.errors import InputError
from qjax.evaluate.compare import compare, reference_states
from qjax.evaluate.harness import evaluate_tasks
from qjax.finetune import lora
from qjax.job.tuning import whole_model_bytes
from qjax.pipeline.stored import load_artifact
from qjax.runtime.atomic import write_json
from qjax.runtime.distributed import is_primary
from qjax.runtime.group import speaking
from qjax.tensor_parallel import distribute, summary

from ._entry import cache_folder, compilation_cache, join, mesh_or_none, plain


def run_settings(folder: pathlib.Path) -> dict[str, Any]:
    """The settings of the run that made an artifact, or nothing for an artifact that was moved elsewhere."""
    file = folder.parent / "config.yaml"
    return yaml.safe_load(file.read_text()) if file.is_file() else {}


def opened(source: str, dtype: str, mesh: Mesh | None) -> models.Model:
    """A dense model; on a mesh with blocks that stay on disk until their parts are placed."""
    return models.load(source, dtype) if mesh is None else models.stream(source, dtype)


def spread(model: models.Model, mesh: Mesh | None) -> models.Model:
    """The model on a mesh, or as it is without one."""
    if mesh is None:
        return model
    placed = dataclasses.replace(model, params=distribute(model.params, model.config, mesh, packed=False))
    print(f"[{model.name}: {summary(placed.params)}]")
    return placed


def stored(folder: str, adapters: str | None, mesh: Mesh | None) -> models.Model:
    """The model of an artifact with `adapters`; for a mesh on the host, with adapted layers as sums."""
    model = load_artifact(folder, adapters, device=mesh is None)
    return model if mesh is None or adapters is None else dataclasses.replace(model, params=lora.summed(model.params))


def tasks_of(settings: dict[str, Any], mesh: Mesh | None = None) -> dict[str, Any]:
    """Results by task of the artifact and, unless `reference=false`, of the dense model."""
    options = {key: settings[key] for key in ("fewshot", "limit", "include", "batch", "chat", "chat_options")}
    seed = 0 if settings["seed"] is None else settings["seed"]
    folder = settings["artifact"]
    source = settings["model"]
    if source is None:
        source = run_settings(pathlib.Path(folder)).get("model") if folder is not None else None
    if source is None and (folder is None or settings["reference"]):
        raise InputError("say which dense model: model='{source: …}', or with an artifact reference=false")
    report: dict[str, Any] = {}
    if folder is not None:
        model = spread(stored(folder, settings["adapters"], mesh), mesh)
        report["quantized"] = evaluate_tasks(model, settings["tasks"], seed=seed, **options)
        del model
    if source is not None and (folder is None or settings["reference"]):
        dense = spread(opened(source["source"], source.get("dtype", "float32"), mesh), mesh)
        report["reference"] = evaluate_tasks(dense, settings["tasks"], seed=seed, **options)
    return report


def start(config: DictConfig) -> None:
    """Print perplexity, KL and agreement of the artifact on its run's evaluation text, or on another one."""
    settings = plain(config)
    cache = cache_folder(settings["cache"])
    compilation_cache(cache)
    join(settings)
    if jax.process_count() > 1 and settings["tasks"] is not None:
        raise InputError("tasks=[…] run in one process with all its devices; leave distributed.coordinator out")
    mesh = mesh_or_none(settings)
    with speaking():
        _evaluate(settings, mesh, cache)


def _evaluate(settings: dict[str, Any], mesh: Mesh | None, cache: pathlib.Path) -> None:
    if settings["tasks"] is not None:
        settings["tasks"] = settings["tasks"] if isinstance(settings["tasks"], list) else [settings["tasks"]]
        finish(tasks_of(settings, mesh), settings["out"])
        return
    if settings["artifact"] is None:
        raise InputError("artifact=null needs tasks=[…]; give the artifact/ folder of a run")
    folder = pathlib.Path(settings["artifact"])
    quantized = stored(str(folder), settings["adapters"], mesh)
    known = run_settings(folder)
    for group in ("model", "data", "seed"):
        if settings[group] is None and group not in known:
            raise InputError(f"{folder} has no config.yaml beside it; say {group}= for the evaluation")
        settings[group] = known[group] if settings[group] is None else settings[group]
    model = opened(settings["model"]["source"], settings["model"].get("dtype", "float32"), mesh)
    options = {key: value for key, value in settings["data"].items() if value is not None}
    tokens = data.load(tokenizer=model.tokenizer, vocab_size=model.config.vocab_size, seed=settings["seed"], **options)
    size = whole_model_bytes(quantized.params)
    model, tested = spread(model, mesh), spread(quantized, mesh)
    del quantized
    teacher = reference_states(model, tokens.evaluation, settings["batch"], cache, mesh)
    report = compare(model, tested.params, teacher, tokens.evaluation, settings["batch"], tokens.rows, mesh)
    report["whole_model_bytes"] = size
    finish(report, settings["out"])


def finish(report: dict[str, Any], out: str | None) -> None:
    """Print the report and, with `out`, write it."""
    print(json.dumps(report, indent=2))
    if out is not None and is_primary():
        write_json(pathlib.Path(out), report)
