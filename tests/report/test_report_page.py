"""The page: its numbers, hostile names, and that nothing is loaded from elsewhere."""

import html.parser
import pathlib
import re
import sys

from qjax.report import Run, Skipped
from qjax.report.figure import INK
from qjax.report.page import page


def made(path="a"):
    results = {"bits_per_weight": 2.02, "kl_mean": 0.8317, "kl_mean_interval": [0.8, 0.9], "weight_mse_mean": 0.09}
    results |= {"seconds": {"hessians": 2.0, "quantize": 6.0}, "peak_memory_bytes": 2**31}
    return Run("<script>x", pathlib.Path(path), {"model": "m", "rounding": '"><img src=http://e>'}, results)


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
    headers = re.findall(r"<th scope=\"col\"><button>([^<]+)</button>", text)
    assert headers[:2] == ["run", "bits/weight"]
    assert "0.8317" in text and "1 finished, 1 unfinished or failed" in text


def test_the_heat_map_shows_layers_csv(tmp_path):
    rows = [("layers.0.mlp.up_proj", 0.011), ("layers.0.self_attn.q_proj", 0.5), ("layers.1.mlp.up_proj", 0.02)]
    (tmp_path / "layers.csv").write_text("name,proxy_loss\n" + "".join(f"{name},{loss}\n" for name, loss in rows))
    text = page([made(tmp_path)], [])
    assert sorted(re.findall(r'data-loss="([^"]+)"', text)) == ["0.011", "0.02", "0.5"]
    assert "layers.0.self_attn.q_proj: 0.5" in text and "0.011 to 0.5" in text
    strongest = re.search(r'fill-opacity="([^"]+)" data-loss="0.5"', text)
    weakest = re.search(r'fill-opacity="([^"]+)" data-loss="0.011"', text)
    assert strongest is not None and weakest is not None and (strongest[1], weakest[1]) == ("1.00", "0.06")
    (tmp_path / "layers.csv").write_text("name,proxy_loss\nlayers.x,1\n")  # damaged: the page does without
    assert "data-loss" not in page([made(tmp_path)], [])


def test_time_and_memory():
    text = page([made()], [])
    assert 'width:25.00%;opacity:0.76" title="hessians 2.0 s"' in text and "8 s" in text and "2.00 GiB" in text


def three_runs():
    methods = ("ldlq", "gptq", "ldlq")
    return [
        Run(f"r{i}\x01", pathlib.Path("a"), {"rounding": r}, {"bits_per_weight": 2.0, "kl_mean": 0.5 + i})
        for i, r in enumerate(methods)
    ]


def test_every_run_has_a_place_in_the_figure_that_says_its_numbers_and_leads_to_its_settings():
    text = page(three_runs(), [])
    places = re.findall(r'<a href="(#run-\d)" aria-label="([^"]+)" data-value="([^"]+)"><title>([^<]+)</title>', text)
    assert sorted(value for _, _, value, _ in places) == ["0.5", "1.5", "2.5"]
    for target, label, value, title in places:
        run = next(run for run in three_runs() if run.results["kl_mean"] == float(value))
        assert label == title and re.fullmatch(rf"{run.name}: 2\.000 bits, {value}0*", label)
        assert f'<details id="{target[1:]}"><summary>{run.name}</summary>' in text
    marks = re.findall(r'<use [^>]*x="([\d.]+)" y="([\d.]+)" [^>]*opacity: 0', text)
    assert len(set(marks)) == 3
    colours = re.findall(r"fill: (#0072b2|#d55e00)", text)  # of the roundings ldlq and gptq
    assert colours.count("#0072b2") > colours.count("#d55e00") > 0


def test_the_figure_has_the_colours_of_the_theme_and_the_same_bytes_every_time():
    text = page([made()], [])
    assert "fill: currentColor" in text and "var(--paper)" in text and INK not in text
    assert "<metadata" not in text and text == page([made()], [])


def test_without_matplotlib_a_sentence_stands_in_the_figures_place(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    text = page([made()], [])
    assert "<p>the figure needs matplotlib: pip install -e &#x27;.[plots]&#x27;" in text and "0.8317" in text
