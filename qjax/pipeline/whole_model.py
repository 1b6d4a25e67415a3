"""A whole model quantised in one call, in memory: what the command line does without a run directory."""

from __future__ import annotations

import contextlib
import pathlib
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

from jax.sharding import Mesh

from qjax.data.stream import TokenSplit, as_stream, check_vocabulary
from qjax.errors import InputError
from qjax.finetune import method_of
from qjax.hessian.store import HessianStore
from qjax.incoherence.families import Folded
from qjax.linalg.prng import seed_of
from qjax.matrix.arguments import Short, mesh_of
from qjax.matrix.quantize import MatrixReport
from qjax.models.loading import Model
from qjax.pipeline import hessians as hessians_of
from qjax.pipeline.by_recipe import Observer, Surroundings, rounded
from qjax.pipeline.compressed import CompressedModel
from qjax.pipeline.folding import prepared
from qjax.pipeline.presets import given_recipe
from qjax.pipeline.tuning import tuned
from qjax.runtime.progress import silent

__all__ = ["quantize_model"]


def quantize_model(
    model: Model,
    tokens: Any,
    recipe: Short,
    *,
    bits: Short = None,
    hessians: Mapping[str, Any] | None = None,
    key: Short = 0,
    progress: bool = True,
    cache: str | pathlib.Path | None = None,
    mesh: Mesh | None = None,
    on_layer: Callable[[MatrixReport], None] | None = None,
) -> CompressedModel:
    """Quantise every linear of a model by a recipe, and tune it where the recipe says so.

    Embedding and head stay as they are unless rules of the recipe name them (`LayerRule`).

    The same choices give the same bytes as `experiments.quantize`, on one device.

    Args:
      model: of `qjax.load`; it is not changed.
      tokens: of `qjax.data.load` (its calibration side), or token ids [sequences, length].
      recipe: a published method by name ("gptq", "quip_sharp", …), or a `qjax.Recipe`.
      bits: per weight, in place of the recipe's.
      hessians: `Hessian`s or arrays [in, in] by layer name, of the original model (`qjax.hessian.collect`), in place of
        those that the recipe describes.
      key: a seed, or `jax.random.key(seed)`.
      progress: show it.
      cache: a folder that keeps Hessians for later calls and the command line (`~/.cache/qjax`); None keeps nothing.
      mesh: devices that sequences and rows are split over, None is one.
      on_layer: called with the report of every matrix.

    Raises InputError for a recipe, tokens or Hessians that do not fit, NumericsError for a Hessian or weights that are
    not usable.
    """
    if not isinstance(model, Model) or isinstance(model, CompressedModel):
        raise InputError(
            f"model is {model!r}; a dense model is quantised: qjax.load('tiny'), a folder, a hub name or a .gguf file"
        )
    recipe, mesh = given_recipe(recipe, bits), mesh_of(mesh)
    if not (cache is None or isinstance(cache, str | pathlib.Path)):
        raise InputError(f"cache is {cache!r} ({type(cache).__name__}); it is the path of a folder, or None")
    if not (on_layer is None or callable(on_layer)):
        raise InputError(f"on_layer is {on_layer!r} ({type(on_layer).__name__}); it is called with every report")
    stream, seed = as_stream(tokens, "calibration"), seed_of(key)
    check_vocabulary(stream.tokens, model.config.vocab_size, "tokens")
    if stream.length > model.config.max_positions:
        raise InputError(f"tokens have {stream.length} positions and the model {model.config.max_positions}")
    if hessians is not None and isinstance(recipe.incoherence, Folded):
        raise InputError(
            "hessians are of the original model, and incoherence=folded quantises a rotated one: leave out"
        )
    model = prepared(model, recipe.incoherence, seed)
    source = None if hessians is None else hessians_of.given(hessians, model.config)
    evaluation = tokens.evaluation if isinstance(tokens, TokenSplit) else None
    with silent(not progress), contextlib.ExitStack() as stack:
        if cache is None:
            cache = stack.enter_context(tempfile.TemporaryDirectory(prefix="qjax-"))
        around = Surroundings(
            HessianStore(pathlib.Path(cache).expanduser() / "hessians"),
            mesh=mesh,
            label=f"quantise {model.name}",
            observer=_Caller(on_layer),
        )
        quantized = rounded(model, stream, recipe, around, seed=seed, hessians=source, evaluation=evaluation).model
        params = quantized.params
        method = None if recipe.finetune is None else method_of(recipe.finetune)
        if method is not None and not method.while_rounding:
            params = tuned(model, params, stream, method, seed=seed, label=f"tune {model.name}").params
    return CompressedModel.of(model, params, quantized.reports)


class _Caller(Observer):
    """Hands the reports on."""

    def __init__(self, on_layer: Callable[[MatrixReport], None] | None):
        self._on_layer = on_layer

    def layer(self, report: MatrixReport, found: bool, done: int) -> None:
        """The report of a finished matrix."""
        if self._on_layer is not None:
            self._on_layer(report)
