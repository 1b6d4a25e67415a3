"""Collect the Hessians of a model into the shared cache: `python -m experiments.hessians model=tiny data=pydoc`."""

from __future__ import annotations

import time

from omegaconf import DictConfig

from experiments._entry import cache_folder, compilation_cache, entry, plain
from qjax import data, models
from qjax.hessian.store import HessianStore, identity
from qjax.run.progress import Progress


@entry("hessians")
def main(config: DictConfig) -> None:
    """Collect what the cache lacks, and print where it is."""
    settings = plain(config)
    cache = cache_folder(settings["cache"])
    compilation_cache(cache)
    started = time.perf_counter()
    model = models.load(settings["model"]["source"], settings["model"]["dtype"])
    options = {key: value for key, value in settings["data"].items() if value is not None}
    tokens = data.load(
        tokenizer=model.tokenizer, vocab_size=model.config.vocab_size, seed=settings["seed"], **options
    ).calibration
    store, batch = HessianStore(cache / "hessians"), min(settings["hessian"]["batch"], tokens.sequences)
    key = store.key(identity(model.fingerprint["sha256"]), tokens.sha256, settings["hessian"]["estimator"], batch)
    with Progress("hessians", model.config.num_layers) as progress:
        load = store.collect(
            key,
            model.config,
            model.params,
            tokens.tokens,
            batch=batch,
            progress=lambda done, total: progress.update(done),
        )
    size = sum(file.stat().st_size for file in (store.path / key).iterdir())
    counted = load(0)["self_attn.q_proj"].tokens
    print(
        f"{store.path / key}: {model.config.num_layers} blocks, {counted} tokens, {size / 2**20:.1f} MiB, "
        f"{time.perf_counter() - started:.0f} s"
    )


if __name__ == "__main__":
    main()
