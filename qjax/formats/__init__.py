"""Number formats with their roundings: floats, fixed point, shared exponents, MX, NVFP4, NF4."""

from typing import Any

from qjax.formats import tables
from qjax.formats.base import FORMATS, NumberFormat
from qjax.formats.kahan import kahan_add, kahan_sum
from qjax.formats.rounding import ROUNDINGS

__all__ = ["FORMATS", "ROUNDINGS", "NumberFormat", "kahan_add", "kahan_sum", "make", "tables"]


def make(name: str, **options: Any) -> NumberFormat:
    """The format of a name, e.g. `make("float", exponent_bits=4, mantissa_bits=3)`.

    Raises InputError listing names and options, and for widths that cannot exist.
    """
    return FORMATS.make(name, **options)
