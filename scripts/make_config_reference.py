"""Build docs/config-reference.md from what is registered: `make config-reference`. The page is not kept in git."""

from __future__ import annotations

import pathlib

from qjax.configuration.reference import reference

PAGE = pathlib.Path(__file__).resolve().parent.parent / "docs" / "config-reference.md"

if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
    print(f"written: {PAGE}")
