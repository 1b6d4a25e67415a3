"""Calibration and evaluation token streams: fixed-length windows of named sources, hashed and described."""

from qjax.data.corpus import SOURCES, Corpus
from qjax.data.loading import BOS_POLICIES, PACKINGS, load
from qjax.data.stream import Tokenizer, TokenSplit, TokenStream, as_stream, check_disjoint, check_vocabulary

__all__ = [
    "BOS_POLICIES",
    "PACKINGS",
    "SOURCES",
    "Corpus",
    "TokenSplit",
    "TokenStream",
    "Tokenizer",
    "as_stream",
    "check_disjoint",
    "check_vocabulary",
    "load",
]
