"""The work behind `experiments.hessians`, apart from it: it imports JAX, which a typing error need not wait for."""

from __future__ import annotations

import time

from omegaconf import DictConfig

from qjax import data, models
from qjax.errors import InputError
from qjax.hessian.store import HessianStore
from qjax.models.structure import structure
from qjax.pipeline.hessians import check_settings, fits, provide
from qjax.runtime.distributed import is_primary
from qjax.runtime.monitor import peak_memory_bytes

from ._entry import cache_folder, compilation_cache, join, mesh_of, plain


def start(config: DictConfig) -> None:
    """Collect what the cache lacks, and print where it is."""
    settings = plain(config)
    join(settings)
    mesh = mesh_of(settings).make()
    cache = cache_folder(settings["cache"])
    compilation_cache(cache)
    started = time.perf_counter()
    model = models.load(settings["model"]["source"], settings["model"]["dtype"])
    options = {key: value for key, value in settings["data"].items() if value is not None}
    split = data.load(tokenizer=model.tokenizer, vocab_size=model.config.vocab_size, seed=settings["seed"], **options)
    tokens = split.calibration
    if settings["hessian"]["stream"] != "original":
        raise InputError(
            f"hessian.stream is {settings['hessian']['stream']!r}; only Hessians of the original model can be kept for "
            "later runs: hessian=original, sketch_a or sketch_b"
        )
    check_settings(settings["hessian"])
    store = HessianStore(cache / "hessians")
    source = provide(store, model, tokens, settings["hessian"], mesh)
    if not is_primary():
        return
    for key in source.keys:
        size = sum(file.stat().st_size for file in (store.path / key).iterdir())
        counted = next(iter(store.loader(key)(0).values())).tokens
        print(
            f"{store.path / key}: {model.config.num_layers} blocks, {counted} tokens or sequences, "
            f"{size / 2**20:.1f} MiB, {time.perf_counter() - started:.0f} s, peak {peak_memory_bytes() / 2**30:.2f} GiB"
        )
    found = fits(store, model, split.evaluation, settings["hessian"], source)
    if found is not None:
        print(
            f"cosine with the true Fisher on {settings['hessian']['fit_sequences']} evaluation sequences, mean ± error"
        )
        for linear in structure(model.config).sites:
            own = [fit for name, fit in found.items() if name.endswith(linear)]
            error = sum(fit.cosine_error**2 for fit in own) ** 0.5 / len(own)
            print(f"  {linear:<18} {sum(fit.cosine for fit in own) / len(own):.3f} ± {error:.3f}")
