"""`python -m pallas_kernels.bench`: 0 when every check held, 1 otherwise."""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Sequence

from pallas_kernels.bench.suite import Settings, lines, run

__all__ = ["main"]


def _part(text: str) -> tuple[int, int]:
    i, count = text.split("/")
    return int(i), int(count)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the arguments ask for and print the table."""
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.bench", description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, default=None, help="write JSON here")
    parser.add_argument("--seconds", type=float, default=Settings.seconds, help="after which no new case begins")
    parser.add_argument("--ring-mib", type=int, default=Settings.ring_bytes >> 20, help="weights of a timing loop")
    parser.add_argument("--quick", action="store_true", help="small shapes, as a check of the suite itself")
    parser.add_argument("--tune", action="store_true", help="try block sizes; writes tuned.json beside --out")
    parser.add_argument("--processes", type=int, default=1, help="check and compile side by side in so many processes")
    parser.add_argument("--part", type=_part, default=None, metavar="I/N", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
    settings = Settings(
        options.seconds,
        options.quick,
        options.tune,
        options.ring_mib << 20,
        options.out,
        options.processes,
        options.part,
    )
    record = run(settings)
    if settings.part is not None:
        return 0  # the process that started this one has its record
    headers, rows = lines(record)
    widths = [max(len(row[i]) for row in (headers, *rows)) for i in range(len(headers))]
    for row in (headers, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    for failure in record["failed"]:
        print(f"FAILED {failure['what']}: {failure['reason']}", file=sys.stderr)
    if record["left_out"]:
        print(f"no time for {len(record['left_out'])} cases; more with --seconds", file=sys.stderr)
    return int(bool(record["failed"]))


if __name__ == "__main__":
    sys.exit(main())
