"""Comparison of finished runs: read run directories, make one table and one figure."""

from qjax.report.runs import Run, Skipped, collect
from qjax.report.table import Table, comparison
from qjax.report.text import aligned, csv_text, markdown

__all__ = ["Run", "Skipped", "Table", "aligned", "collect", "comparison", "csv_text", "markdown"]
