"""The figure inside the page: in the colours of its theme, with points that say and lead to their run."""

from __future__ import annotations

import html
import io
import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence

from qjax.errors import InputError
from qjax.report.figure import INK, RULE, page_svg
from qjax.report.runs import Run
from qjax.report.table import number

__all__ = ["figure"]

_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_UNPRINTABLE = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f]")  # in names of folders; XML has no way to write them
_THEME = {INK: "currentColor", RULE: "var(--rule)", "#ffffff": "var(--paper)"}


def figure(runs: Sequence[Run]) -> str:
    """The figure as HTML; a sentence in its place where it cannot be drawn.

    The point of `runs[i]` is a link to `#run-i` with its numbers as title and `data-value`.
    """
    try:
        tree = ET.parse(io.BytesIO(_UNPRINTABLE.sub(b"", page_svg(runs))))
    except InputError as error:
        return f"<p>{html.escape(str(error))}</p>"
    root = tree.getroot()
    for name in ("width", "height"):  # the page's style decides
        del root.attrib[name]
    for metadata in root.findall(f"{{{_SVG}}}metadata"):
        root.remove(metadata)
    root.set("role", "group")
    root.set("aria-label", "results against bits per weight")
    for parent in list(root.iter()):
        for place, child in enumerate(parent):
            metric, of, index = child.get("id", "").partition(" of ")
            if of:
                parent[place] = _linked(child, metric, runs[int(index)], int(index))
    ET.register_namespace("", _SVG)
    ET.register_namespace("xlink", _XLINK)
    text = ET.tostring(root, encoding="unicode")
    for colour, own in _THEME.items():
        text = text.replace(colour, own)
    return f'<figure class="scroll" tabindex="0" role="region" aria-label="figure">{text}</figure>'


def _linked(mark: ET.Element, metric: str, run: Run, index: int) -> ET.Element:
    value, interval = run.number(metric), run.interval(metric)
    assert value is not None  # only what has a value has a mark
    ends = "" if interval is None else f" [{number(interval[0])}, {number(interval[1])}]"
    label = f"{run.name}: {run.results['bits_per_weight']:.3f} bits, {number(value)}{ends}"
    link = ET.Element(f"{{{_SVG}}}a", {"href": f"#run-{index}", "aria-label": label, "data-value": repr(value)})
    ET.SubElement(link, f"{{{_SVG}}}title").text = label
    del mark.attrib["id"]
    link.append(mark)
    return link
