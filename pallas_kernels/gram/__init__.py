"""Products `Xᵀ X` of which only the lower triangle is computed."""

from pallas_kernels.gram.api import available, chosen, gram

__all__ = ["available", "chosen", "gram"]
