"""Hugging Face datasets with the protocols of the papers, where the library `datasets` and a network are there."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from qjax.data.corpus import SOURCES, Corpus, cut_documents
from qjax.errors import DataError, InputError, listed, missing_extra
from qjax.registry import Count, Part

__all__ = ["PROTOCOLS", "Protocol", "hf"]

# open(path, name, split, data_files) -> rows; the same for the library and for a stand-in in tests.
Opener = Callable[[str, str | None, str, str | None], Iterable[Mapping[str, Any]]]


@dataclasses.dataclass(frozen=True)
class Protocol:
    """A paper's source of calibration and evaluation text, and the way its windows are cut.

    Attributes:
      path: the dataset's name on the hub.
      name: its configuration, or None.
      calibration: split (and file) of the calibration rows.
      evaluation: split (and file) of the evaluation rows, or None: the last rows of the calibration split.
      packing: "stream" (rows joined by blank lines), "document_first" or "document_random" (a window of every row that
        is long enough).
    """

    path: str
    name: str | None
    calibration: tuple[str, str | None]
    evaluation: tuple[str, str | None] | None
    packing: str


# GPTQ's loaders (also QuIP's, and everybody's evaluation) for the first two; QuIP# and YAQA for the third.
PROTOCOLS: dict[str, Protocol] = {
    "wikitext2": Protocol("Salesforce/wikitext", "wikitext-2-raw-v1", ("train", None), ("test", None), "stream"),
    "c4": Protocol(
        "allenai/c4",
        None,
        ("train", "en/c4-train.00000-of-01024.json.gz"),
        ("validation", "en/c4-validation.00000-of-00008.json.gz"),
        "document_random",
    ),
    "redpajama": Protocol("togethercomputer/RedPajama-Data-1T-Sample", None, ("train", None), None, "document_first"),
}


@SOURCES.register("hf")
def hf(
    protocol: str,
    field: str = "text",
    limit: Count = 20_000,
    split: Part = 0.85,
    opener: Opener | None = None,
) -> Corpus:
    """Rows of a dataset: at most `limit` of each split, in the dataset's order.

    Args:
      protocol: "wikitext2", "c4" or "redpajama".
      field: the column of a document's text.
      limit: rows that are read of each split.
      split: where the dataset has one split only, the share of its characters (whole rows) that is calibration.
      opener: opens the rows, in place of the library.

    Raises
    InputError for an unknown protocol and DataError without the library, the network, or text in `field`.
    Source: the data loaders of GPTQ (arXiv:2210.17323) and the calibration sections of QuIP# (arXiv:2402.04396).
    """
    if protocol not in PROTOCOLS:
        raise InputError(f"data source 'hf' has no protocol {protocol!r}; there is: {listed(PROTOCOLS)}")
    plan = PROTOCOLS[protocol]
    open_rows = opener or _open_with_datasets

    def rows(where: tuple[str, str | None]) -> tuple[str, ...]:
        side, files = where
        return tuple(_texts(open_rows(plan.path, plan.name, side, files), field, limit, plan.path))

    calibration = rows(plan.calibration)
    if plan.evaluation is None:
        calibration, evaluation = cut_documents(calibration, split)
    else:
        evaluation = rows(plan.evaluation)
    description = {"source": "hf", "protocol": protocol, "dataset": plan.path, "limit": limit}
    return Corpus(calibration, evaluation, description, packing=plan.packing)


def _texts(rows: Iterable[Mapping[str, Any]], field: str, limit: int, path: str) -> Iterable[str]:
    for index, row in enumerate(itertools.islice(rows, limit)):
        if not isinstance(row.get(field), str):
            raise DataError(f"{path}, row {index}: no text in field {field!r}; the row has {listed(row)}")
        yield row[field]


def _open_with_datasets(path: str, name: str | None, split: str, files: str | None) -> Iterable[Mapping[str, Any]]:
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise DataError(
            f"{path}: {missing_extra('hf', 'datasets')}, or use data=pydoc, which needs no download"
        ) from None
    data_files = None if files is None else {split: files}
    try:
        yield from datasets.load_dataset(path, name, split=split, data_files=data_files, streaming=True)
    except OSError as error:  # requests' and huggingface_hub's connection errors are OSErrors
        raise DataError(
            f"{path}: cannot be fetched ({error}); connect to a network, or use data=pydoc, which needs no download"
        ) from error
