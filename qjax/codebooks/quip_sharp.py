"""QuIP#'s codebook for every bit width under one name."""

from __future__ import annotations

from qjax.codebooks.base import CODEBOOKS, Codebook
from qjax.errors import InputError
from qjax.registry import Positive

__all__ = ["quip_sharp"]

_BY_BITS = {1: "e81b", 2: "e8p", 3: "e8p_rvq", 4: "e8p_rvq"}


@CODEBOOKS.register("quip_sharp")
def quip_sharp(bits: int | float, rms: Positive | None = None) -> Codebook:
    """The codebook of QuIP# with `bits` bits: `e81b` (1), `e8p` (2) or `e8p_rvq` (3 and 4).

    It describes itself by its own name, so nothing that is stored depends on this one.

    Args:
      bits: 1, 2, 3 or 4.
      rms: the input RMS; None is the codebook's optimum.

    Raises InputError for another width.
    Source: QuIP# (2402.04396), sections 4.2 and F.5.
    """
    if bits not in _BY_BITS:
        raise InputError(
            f"codebook 'quip_sharp' has 1, 2, 3 or 4 bits per weight, not {bits}; for a fraction use rules per layer"
        )
    return CODEBOOKS.make(_BY_BITS[int(bits)], bits, rms=rms)
