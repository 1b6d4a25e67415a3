"""qjax: compress language models to 1-4 bits per weight, as pure functions on JAX arrays."""

from qjax import codebooks, data, evaluate, hessian, incoherence, models, rounding
from qjax.hessian import Hessian
from qjax.matrix.quantize import MatrixReport, quantize_matrix
from qjax.matrix.quantized import QuantizedMatrix

__version__ = "0.2.0"
__distribution__ = "qjax-compression"  # a stranger's package of this name has no such line

__all__ = [
    "Hessian",
    "MatrixReport",
    "QuantizedMatrix",
    "codebooks",
    "data",
    "evaluate",
    "hessian",
    "incoherence",
    "models",
    "quantize_matrix",
    "rounding",
]
