"""Types that all rooms share."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Array

__all__ = ["HostOrDevice", "Leaf"]

Leaf: TypeAlias = Any
"""An array, or whatever jax puts in its place in a pytree: a shape, a sharding, a batch of arrays."""

HostOrDevice: TypeAlias = Array | np.ndarray
"""Host arrays go into compiled programs as they are: converting them first would compile a program of its own."""
