"""qjax: compress language models to 1-4 bits per weight, as pure functions on JAX arrays.

    model = qjax.load("tiny")
    tokens = qjax.data.load("pydoc", model, calibration_sequences=96, evaluation_sequences=32, length=256)
    small = qjax.quantize_model(model, tokens, "quip_sharp", bits=2)
    print(qjax.evaluate(small, tokens, reference=model))

Rooms and names are imported when they are first used: `import qjax` alone does not even import jax.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qjax import (
        allocate,
        bench,
        codebooks,
        configuration,
        data,
        errors,
        finetune,
        formats,
        function,
        hessian,
        incoherence,
        interchange,
        job,
        linalg,
        matrix,
        models,
        pipeline,
        registry,
        report,
        rounding,
        runtime,
        streams,
        tensor_parallel,
        testing,
        training,
        typing,
    )
    from qjax.evaluate import Evaluation, Room
    from qjax.evaluate.model import Comparison
    from qjax.evaluate.model import compare_models as compare
    from qjax.function import equinox, linen, nnx
    from qjax.function.traced import Traced, trace
    from qjax.linalg.kronecker import Hessian
    from qjax.matrix.operator import LinearOperator
    from qjax.matrix.quantize import MatrixReport, quantize_matrix
    from qjax.matrix.quantized import QuantizedMatrix
    from qjax.models.loading import Model
    from qjax.pipeline.compressed import CompressedModel, replace
    from qjax.pipeline.recipe import LayerRule, Recipe
    from qjax.pipeline.stored import load
    from qjax.pipeline.whole_model import quantize_model
    from qjax.streams.inputs import activations

    evaluate: Room

__version__ = "0.2.0"
__distribution__ = "qjax-compression"  # a stranger's package of this name has no such line

__all__ = [
    "Comparison",
    "CompressedModel",
    "Evaluation",
    "Hessian",
    "LayerRule",
    "LinearOperator",
    "MatrixReport",
    "Model",
    "QuantizedMatrix",
    "Recipe",
    "Traced",
    "__version__",
    "activations",
    "allocate",
    "bench",
    "codebooks",
    "compare",
    "configuration",
    "data",
    "equinox",
    "errors",
    "evaluate",
    "finetune",
    "formats",
    "function",
    "hessian",
    "incoherence",
    "interchange",
    "job",
    "linalg",
    "linen",
    "load",
    "matrix",
    "models",
    "nnx",
    "pipeline",
    "quantize_matrix",
    "quantize_model",
    "registry",
    "replace",
    "report",
    "rounding",
    "runtime",
    "streams",
    "tensor_parallel",
    "testing",
    "trace",
    "training",
    "typing",
]

_NAMES = {
    "Comparison": "qjax.evaluate.model",
    "CompressedModel": "qjax.pipeline.compressed",
    "Evaluation": "qjax.evaluate.summary",
    "Hessian": "qjax.linalg.kronecker",
    "LayerRule": "qjax.pipeline.recipe",
    "LinearOperator": "qjax.matrix.operator",
    "MatrixReport": "qjax.matrix.quantize",
    "Model": "qjax.models.loading",
    "QuantizedMatrix": "qjax.matrix.quantized",
    "Recipe": "qjax.pipeline.recipe",
    "Traced": "qjax.function.traced",
    "activations": "qjax.streams.inputs",
    "compare": "qjax.evaluate.model:compare_models",
    "load": "qjax.pipeline.stored",
    "quantize_matrix": "qjax.matrix.quantize",
    "quantize_model": "qjax.pipeline.whole_model",
    "replace": "qjax.pipeline.compressed",
    "trace": "qjax.function.traced",
}
_DOORS = ("equinox", "linen", "nnx")  # modules of the room function


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'qjax' has no attribute {name!r}; it has {', '.join(__all__)}")
    if name in _DOORS:
        globals()[name] = found = importlib.import_module(f"qjax.function.{name}")
        return found
    if name not in _NAMES:
        return importlib.import_module(f"qjax.{name}")  # which sets the attribute
    module, _, own = _NAMES[name].partition(":")
    globals()[name] = found = getattr(importlib.import_module(module), own or name)
    return found


def __dir__() -> list[str]:
    return sorted(__all__)
