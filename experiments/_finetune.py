"""The work behind `experiments.finetune`, apart from it: it imports JAX, which a typing error need not wait for."""

from __future__ import annotations

import contextlib
import pathlib
from typing import Any

import jax
from omegaconf import DictConfig

from qjax import data, models
from qjax.errors import InputError, RunError, listed
from qjax.evaluate.compare import compare, reference_states
from qjax.finetune import TUNINGS, lora, method_of
from qjax.finetune.sharding import check_mesh
from qjax.interchange import artifact
from qjax.job.tuning import finetune_model, recovered, stored_bits, whole_model_bytes
from qjax.pipeline.compressed import save_adapters
from qjax.pipeline.tuning import check_edges
from qjax.runtime.atomic import read_json, write_json
from qjax.runtime.distributed import is_primary, on_primary
from qjax.runtime.fingerprint import device, versions
from qjax.runtime.group import leading
from qjax.runtime.monitor import peak_memory_bytes
from qjax.runtime.tracker import make

from ._entry import cache_folder, compilation_cache, join, mesh_or_none, plain
from ._evaluate import run_settings
from ._quantize import tuning_line


def completed(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with the run's own model, data and seed where none are given."""
    if settings["artifact"] is None:
        raise InputError("artifact is null; give the artifact/ folder of a run")
    folder = pathlib.Path(settings["artifact"])
    known = run_settings(folder)
    for group in ("model", "data", "seed"):
        if settings[group] is None and group not in known:
            raise InputError(f"{folder} has no config.yaml beside it; say {group}=")
        settings[group] = known[group] if settings[group] is None else settings[group]
    return settings


def run(settings: dict[str, Any]) -> dict[str, Any]:
    """Tune, evaluate before and after, store; returns the results.

    Raises RunError for an `out` that holds the source.
    """
    settings = completed(settings)
    mesh = mesh_or_none(settings)
    method = method_of(settings["finetune"])
    if method is None or method.while_rounding:
        raise InputError(
            f"finetune={settings['finetune']['name']} tunes no finished model; choose one of "
            f"{listed(name for name in TUNINGS if not TUNINGS[name].while_rounding)}"
        )
    if mesh is not None:
        check_mesh(mesh, settings["finetune"]["batch"])
    if jax.process_count() > 1 and method.one_device:
        raise InputError(f"finetune={method.name} runs on one device; use one process, or finetune=e2e, lora or qat")
    source, out = pathlib.Path(settings["artifact"]).resolve(), pathlib.Path(settings["out"])
    cache = cache_folder(settings["cache"])
    if source.is_relative_to(out.resolve()):
        raise RunError(f"out={out} holds the artifact that is tuned; choose another out=")
    with leading(out):
        if (known := on_primary(lambda: _finished(out))) is not None:
            print(f"{out}: finished before; nothing to do", flush=True)
            return known
        quantized = artifact.load(source)
        check_edges(quantized.params, method)
        model = models.load(settings["model"]["source"], settings["model"].get("dtype", "float32"))
        text = {key: value for key, value in settings["data"].items() if value is not None}
        tokens = data.load(
            tokenizer=model.tokenizer, vocab_size=model.config.vocab_size, seed=settings["seed"], **text
        ).evaluation
        teacher: Any = None

        def evaluated(params: Any) -> dict[str, Any]:
            nonlocal teacher
            if teacher is None:
                teacher = reference_states(model, tokens, settings["batch"], cache)
            return compare(model, params, teacher, tokens, settings["batch"])

        before = on_primary(lambda: evaluated(quantized.params))
        kind = "jsonl" if is_primary() else "none"
        with contextlib.closing(make(kind, out, run_name=out.name, config=settings)) as tracker:
            tuned = finetune_model(
                model,
                quantized.params,
                method=method,
                text=text,
                seed=settings["seed"],
                cache=cache,
                out=out,
                tracker=tracker,
                mesh=mesh,
            )
        after = on_primary(lambda: evaluated(tuned.params))
        artifact.save(out / "artifact", model, lora.stripped(tuned.params), source / "weights")
        save_adapters(out, tuned.params)
        results = {
            **after,
            "finetune": {"before": before, "recovered": recovered(before, after), **tuned.report},
            "stored_bits": stored_bits(tuned.params),
            "whole_model_bytes": whole_model_bytes(tuned.params),
            "settings": settings,
            "peak_memory_bytes": peak_memory_bytes(),
            "versions": versions(),
            "device": device(),
        }
        on_primary(lambda: write_json(out / "results.json", results))
        return results


def _finished(out: pathlib.Path) -> dict[str, Any] | None:
    file = out / "results.json"
    return read_json(file) if file.exists() else None


def start(config: DictConfig) -> None:
    """Run and print the numbers."""
    settings = plain(config)
    compilation_cache(cache_folder(settings["cache"]))
    join(settings)
    results = run(settings)
    if not is_primary():
        return
    print(tuning_line(results["finetune"]))
    print(
        f"after: KL {results['kl_mean']:.4f}, perplexity {results['perplexity']:.2f}, "
        f"agreement {results['top1_agreement']:.3f}"
    )
