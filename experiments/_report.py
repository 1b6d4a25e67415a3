"""The work behind `experiments.report`, apart from it: it imports JAX, which a typing error need not wait for."""

from __future__ import annotations

import pathlib
import sys

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from qjax import report
from qjax.report.figure import draw
from qjax.report.page import page
from qjax.report.parquet import parquet_bytes
from qjax.report.table import ordered
from qjax.report.text import left_out
from qjax.runtime.atomic import write_bytes, write_text

from ._entry import plain

__all__ = ["start"]


def show(table: report.Table) -> None:
    """Print the table: framed on a terminal, aligned text elsewhere."""
    if not sys.stdout.isatty():
        print(report.aligned(table))
        return
    framed = RichTable()
    for header, right in zip(table.headers, table.numeric, strict=True):
        framed.add_column(header, justify="right" if right else "left", overflow="fold", no_wrap=header == "run")
    for row in table.rows:
        framed.add_row(*(Text(cell) for cell in row))  # brackets are no markup
    Console().print(framed)


def start(config: DictConfig) -> None:
    """Print the comparison and, with `out`, save it as Markdown, CSV, a page and figures."""
    settings = plain(config)
    runs, skipped = report.collect(settings["runs"], unfinished=settings["out"] is not None)
    runs = ordered(runs)
    table = report.comparison(runs)
    if runs:
        show(table)
    for line in left_out(skipped):
        print(line, file=sys.stderr)
    if settings["out"] is None:
        return
    out = pathlib.Path(settings["out"])
    write_text(out / "report.csv", report.csv_text(runs))
    if settings["parquet"]:
        write_bytes(out / "report.parquet", parquet_bytes(runs))
    figures = []
    if settings["figure"] and any("kl_mean" in run.results for run in runs):
        figures = draw(runs, out)
    link = figures[0].name if figures else None
    write_text(out / "report.md", report.markdown(table, runs, skipped, link))
    write_text(out / "report.html", page(runs, skipped))
    names = ("report.md", "report.csv", "report.html", *(["report.parquet"] if settings["parquet"] else []))
    print("written: " + ", ".join(str(out / name) for name in (*names, *(f.name for f in figures))))
