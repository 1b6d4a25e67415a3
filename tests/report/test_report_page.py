"""The page: its numbers, hostile names, and that nothing is loaded from elsewhere."""

import html.parser
import pathlib
import re

from qjax.report import Run, Skipped
from qjax.report.page import page


def made():
    results = {"bits_per_weight": 2.02, "kl_mean": 0.8317, "kl_mean_interval": [0.8, 0.9], "weight_mse_mean": 0.09}
    return Run("<script>x", pathlib.Path("a"), {"model": "m", "rounding": '"><img src=http://e>'}, results)


def test_numbers_are_those_of_the_run_and_names_are_escaped():
    text = page([made()], [Skipped(pathlib.Path("b"), "failed: <b>disk full")])
    assert re.findall(r'data-value="([^"]+)"', text) == ["0.8317", "0.09"]
    assert "<script>x" not in text and "<img" not in text and "failed: &lt;b&gt;disk full" in text
    tags = []
    parser = html.parser.HTMLParser()
    parser.handle_starttag = lambda tag, attributes: tags.append((tag, dict(attributes)))
    parser.feed(text)
    assert not {tag for tag, _ in tags} & {"link", "img", "iframe", "object"}
    assert all(not a.keys() & {"src", "srcset"} and a.get("href", "#").startswith("#") for _, a in tags)
    assert "0.8317" in text and "1 finished, 1 unfinished or failed" in text
