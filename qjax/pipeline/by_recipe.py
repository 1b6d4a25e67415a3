"""A model rounded by a recipe: its Hessians, then block by block, with block-wise tuning where the recipe has it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from qjax.data.stream import TokenStream
from qjax.finetune import BlockReport, BlockTuning, method_of
from qjax.hessian.experts import ExpertFactor
from qjax.hessian.fit import Fit
from qjax.hessian.store import HessianStore
from qjax.matrix.quantize import MatrixReport
from qjax.models.edges import edge_matrices
from qjax.models.loading import Model
from qjax.models.transformer import layer_names
from qjax.pipeline.hessians import Provided, fits, provide
from qjax.pipeline.quantize_and_tune import quantize_and_tune
from qjax.pipeline.quantize_model import QuantizedModel, quantize_model
from qjax.pipeline.recipe import Recipe
from qjax.pipeline.records import Records
from qjax.runtime.freed_memory import give_back
from qjax.runtime.memory import forget_programs, shrinking
from qjax.runtime.progress import Progress
from qjax.streams.activations import Place, placed

__all__ = ["Observer", "Rounded", "Surroundings", "rounded"]

_GROWTH = 64 << 20  # bytes that may be held freed before they are given back between two matrices


class Observer:
    """Someone who is told what happens; this one prints warnings and ignores the rest."""

    def stage(self, name: str) -> contextlib.AbstractContextManager[Any]:
        """The context in which the stage "hessians" or "quantize" runs."""
        return contextlib.nullcontext()

    def layer(self, report: MatrixReport, found: bool, done: int) -> None:
        """A matrix is finished, the `done`-th; `found`: it was before."""

    def block(self, index: int, report: BlockReport, done: int) -> None:
        """A block was tuned, after `done` matrices."""

    def warning(self, text: str) -> None:
        """Something went otherwise than asked for, and the work goes on."""
        print(f"warning: {text}", flush=True)


@dataclasses.dataclass(frozen=True)
class Surroundings:
    """Where and how a model is quantised, which does not change what comes out (on one device).

    Attributes:
      store: keeps Hessians of the original model.
      records: keeps finished matrices, None nowhere.
      mesh: the devices, None is one.
      place: of the activations between blocks.
      held_bytes: of finished matrices that stay in memory, None all.
      label: of the progress.
      observer: is told what happens.
    """

    store: HessianStore
    records: Records | None = None
    mesh: Mesh | None = None
    place: Place = dataclasses.field(default_factory=Place)
    held_bytes: int | None = None
    label: str = "quantise"
    observer: Observer = dataclasses.field(default_factory=Observer)


@dataclasses.dataclass(frozen=True)
class Rounded:
    """The rounded model.

    Attributes:
      model: its parameters and reports.
      blocks: reports of block-wise tuning.
      fits: of the sketches, None where none were measured.
    """

    model: QuantizedModel
    blocks: list[dict[str, Any]]
    fits: Mapping[str, Fit] | None


def rounded(
    model: Model,
    calibration: TokenStream,
    recipe: Recipe,
    around: Surroundings,
    *,
    seed: int,
    hessians: Provided | None = None,
    evaluation: TokenStream | None = None,
) -> Rounded:
    """Collect what the recipe's Hessians need and round; with fewer sequences per step where memory runs out.

    Args:
      seed: the root of all randomness; every layer's key is derived from it and the layer's name.
      hessians: used in place of those that the recipe describes.
      evaluation: where the fit of sketches is measured, if the recipe asks for that.

    Raises InputError for a recipe that does not fit the model, NumericsError as `quantize_matrix`, RunError for memory
    that one sequence per step uses up.
    """
    place = ["the Hessians"]

    def step(batch: int) -> Rounded:
        return _rounded(model, calibration, recipe, around, seed, hessians, evaluation, batch, place)

    batch = min(recipe.hessian["batch"], calibration.sequences)
    with placed(around.place):
        if jax.process_count() > 1:  # all would have to run out at once
            return step(batch)
        return shrinking(step, batch, lambda: place[0], around.observer.warning)


def _rounded(
    model: Model,
    calibration: TokenStream,
    recipe: Recipe,
    around: Surroundings,
    seed: int,
    source: Provided | None,
    evaluation: TokenStream | None,
    batch: int,
    place: list[str],
) -> Rounded:
    observer, settings = around.observer, {**recipe.hessian, "batch": batch}
    place[0], measured = "the Hessians", None
    stream = settings["stream"] if source is None else "original"
    with observer.stage("hessians"):
        if source is None:
            source = provide(around.store, model, calibration, settings, around.mesh)
            if evaluation is not None:
                measured = fits(around.store, model, evaluation, settings, source)
    forget_programs()
    place[0] = "the first matrix"
    matrices = sum(plan is not None for plan in recipe.plan(layer_names(model.config)).values())
    matrices += len(recipe.edges(edge_matrices(model.config)))
    with observer.stage("quantize"), Progress(around.label, matrices) as progress:

        def on_layer(report: MatrixReport, found: bool) -> None:
            give_back(grown=_GROWTH)
            place[0] = f"what follows {report.name}"
            if report.tokens == 0 and not found:
                observer.warning(
                    f"{report.name}: no calibration token is routed to this expert; it is rounded with the Hessian of "
                    "all tokens: more data.calibration_sequences reach it"
                )
            progress.advance(note=f"{report.name} proxy loss {report.proxy_loss:.4f}")
            observer.layer(report, found, progress.done)

        block_reports: list[dict[str, Any]] = []

        def on_block(index: int, report: BlockReport) -> None:
            block_reports.append({"block": index, **dataclasses.asdict(report)})
            observer.block(index, report, progress.done)

        common: dict[str, Any] = {
            "seed": seed,
            "records": around.records,
            "batch": batch,
            "on_layer": on_layer,
            "held_bytes": around.held_bytes,
            "experts": ExpertFactor.of(settings),
        }
        of = (model.config, model.params, calibration.tokens, recipe)
        tuning = None if recipe.finetune is None else method_of(recipe.finetune)
        if isinstance(tuning, BlockTuning) and source.hessians is not None:
            found = quantize_and_tune(*of, tuning, hessians=source.hessians, on_block=on_block, **common)
        else:
            found = quantize_model(
                *of,
                stream=stream,
                hessians=source.hessians,
                outputs=source.outputs,
                correction=settings["correction"],
                mesh=around.mesh,
                **common,
            )
    return Rounded(found, block_reports, measured)
