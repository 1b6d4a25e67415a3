"""Who gets how many bits: a level for every layer, within a budget."""

from qjax.allocate.base import ALLOCATORS, solve
from qjax.allocate.evolution import evolve

__all__ = ["ALLOCATORS", "evolve", "solve"]
