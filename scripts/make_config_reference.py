"""Make docs/config-reference.md from configs/: `python scripts/make_config_reference.py` (`--check` only compares)."""

from __future__ import annotations

import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
CONFIGS, PAGE = ROOT / "configs", ROOT / "docs" / "config-reference.md"
_HEAD = """# Config reference

Made from `configs/` by `python scripts/make_config_reference.py`; do not edit. The comments are those of the files.
A group is chosen by `group=option` and its values are set by `group.key=value`; `--help` of an entry point prints
the composed whole.
"""


def described(path: pathlib.Path) -> str:
    """A file as a fenced block, without the part that only concerns Hydra itself."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line == "hydra:":
            break
        lines.append(line)
    return "```yaml\n" + "\n".join(lines).rstrip() + "\n```\n"


def reference() -> str:
    """The whole page."""
    parts = [_HEAD, "## Entry points\n"]
    for path in sorted(CONFIGS.glob("*.yaml")):
        parts += [f"### {path.stem}\n", described(path)]
    for group in sorted(path for path in CONFIGS.iterdir() if path.is_dir() and any(path.glob("*.yaml"))):
        parts.append(f"## {group.name}=\n")
        for path in sorted(group.glob("*.yaml")):
            parts += [f"### {group.name}={path.stem}\n", described(path)]
    return "\n".join(parts)


def main() -> int:
    """Write the page, or with --check compare; the status is 1 when it was out of date."""
    text = reference()
    current = PAGE.exists() and PAGE.read_text(encoding="utf-8") == text
    if "--check" in sys.argv[1:]:
        print("up to date" if current else f"{PAGE.relative_to(ROOT)} is out of date")
        return int(not current)
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(text, encoding="utf-8")
    print(f"written: {PAGE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
