"""A quantised model beside the original on a text: the states of the original, kept between runs, and the report."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh

from qjax import data, models
from qjax.evaluate.evaluation import evaluate, hidden_states
from qjax.evaluate.reference_cache import TeacherCache
from qjax.runtime.fingerprint import identity
from qjax.runtime.progress import Progress

__all__ = ["compare", "reference_states"]


def reference_states(
    model: models.Model, tokens: data.TokenStream, batch: int, cache: pathlib.Path, mesh: Mesh | None = None
) -> Any:
    """Final hidden states of the original model on the evaluation windows, cached between runs.

    `mesh` is the one that `model.params` lie on: another mesh sums in another order.
    """

    def compute() -> Any:
        with Progress("reference", model.config.num_layers) as progress:
            return hidden_states(
                model.params, tokens.tokens, model.config, batch, lambda done, total: progress.update(done)
            )

    key = f"{identity(model.fingerprint['sha256'])}-{batch}"
    if mesh is not None:
        key += f"-{mesh.shape['data']}x{mesh.shape['model']}"
    return TeacherCache(cache / "teachers").get(key, tokens.sha256, compute, jointly=mesh is not None)


def compare(
    model: models.Model,
    params: Any,
    teacher: Any,
    tokens: data.TokenStream,
    batch: int,
    domains: Mapping[str, Any] | None = None,
    mesh: Mesh | None = None,
) -> dict[str, Any]:
    """The evaluation of quantised parameters against the reference model and its states.

    `domains`: rows of each.  `mesh`: where both models lie, None is one device.
    """
    with Progress("evaluate", model.config.num_layers) as progress:
        report = evaluate(
            teacher,
            models.head(model.params),
            params,
            tokens,
            model.config,
            batch=batch,
            progress=lambda done, total: progress.update(done),
            domains=domains,
            mesh=mesh,
        )
    return report.to_dict()
