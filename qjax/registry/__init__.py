"""Registered constructors, their options and the ranges of these, known with and without importing anything."""

from qjax.registry.options import REQUIRED, Option, Options, build, check_options, options_of, plain
from qjax.registry.ranges import Count, Decay, Natural, NotNegative, OneOf, Part, Positive, Range, Share
from qjax.registry.table import Registry

__all__ = [
    "REQUIRED",
    "Count",
    "Decay",
    "Natural",
    "NotNegative",
    "OneOf",
    "Option",
    "Options",
    "Part",
    "Positive",
    "Range",
    "Registry",
    "Share",
    "build",
    "check_options",
    "options_of",
    "plain",
]
