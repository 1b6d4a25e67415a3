"""Evaluate an artifact against its reference model: `python -m experiments.evaluate artifact=runs/a/artifact`."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import yaml
from omegaconf import DictConfig

from experiments._entry import cache_folder, compilation_cache, entry, plain
from qjax import artifact, data, job, models
from qjax.errors import InputError
from qjax.finetune import lora
from qjax.run.atomic import write_json
from qjax.tuning import whole_model_bytes


def run_settings(folder: pathlib.Path) -> dict[str, Any]:
    """The settings of the run that made an artifact, or nothing for an artifact that was moved elsewhere."""
    file = folder.parent / "config.yaml"
    return yaml.safe_load(file.read_text()) if file.is_file() else {}


@entry("evaluate_artifact")
def main(config: DictConfig) -> None:
    """Print perplexity, KL and agreement of the artifact on its run's evaluation text, or on another one."""
    settings = plain(config)
    cache = cache_folder(settings["cache"])
    compilation_cache(cache)
    folder = pathlib.Path(settings["artifact"])
    quantized = artifact.load(folder)
    params = quantized.params
    if settings["adapters"] is not None:
        params = lora.attached(params, lora.load(settings["adapters"], quantized.fingerprint["sha256"]))
    known = run_settings(folder)
    for group in ("model", "data", "seed"):
        if settings[group] is None and group not in known:
            raise InputError(f"{folder} has no config.yaml beside it; say {group}= for the evaluation")
        settings[group] = known[group] if settings[group] is None else settings[group]
    model = models.load(settings["model"]["source"], settings["model"].get("dtype", "float32"))
    options = {key: value for key, value in settings["data"].items() if value is not None}
    tokens = data.load(tokenizer=model.tokenizer, vocab_size=model.config.vocab_size, seed=settings["seed"], **options)
    teacher = job.reference_states(model, tokens.evaluation, settings["batch"], cache)
    report = job.compare(model, params, teacher, tokens.evaluation, settings["batch"])
    report["whole_model_bytes"] = whole_model_bytes(params)
    print(json.dumps(report, indent=2))
    if settings["out"] is not None:
        write_json(pathlib.Path(settings["out"]), report)


if __name__ == "__main__":
    main()
