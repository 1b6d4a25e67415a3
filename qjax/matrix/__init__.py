"""One matrix: what can stand in a linear's place, quantised, decoded where it is used, laid out for kernels."""

from qjax.matrix.dense import Dense
from qjax.matrix.lookup import Lookup
from qjax.matrix.low_rank import LowRank
from qjax.matrix.operator import OPERATORS, LinearOperator
from qjax.matrix.quantized import QuantizedMatrix
from qjax.matrix.stacked import Stacked
from qjax.matrix.sums import Sum

__all__ = ["OPERATORS", "Dense", "LinearOperator", "Lookup", "LowRank", "QuantizedMatrix", "Stacked", "Sum"]
