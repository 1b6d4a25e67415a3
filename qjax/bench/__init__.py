"""Measurements of single steps: seconds, rates, memory; compile time apart."""

from qjax.bench.timing import Program, Timing, compiled, interleaved, surroundings

__all__ = ["Program", "Timing", "compiled", "interleaved", "surroundings"]
