"""The page: its numbers, hostile names, and that nothing is loaded from elsewhere."""

import html.parser
import pathlib
import re

from qjax.report import Run, Skipped
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


def test_methods_are_told_apart_and_near_points_stand_side_by_side():
    runs = [
        Run(
            f"r{i}", pathlib.Path("a"), {"rounding": r, "codebook": "e8p"}, {"bits_per_weight": 2.0, "kl_mean": 0.5 + i}
        )
        for i, r in enumerate(["ldlq", "gptq", "ldlq"])
    ]
    text = page(runs, [])
    places = re.findall(r'translate\(([\d.]+) [\d.]+\)" style="fill:(var\(--c\d\))" data-value', text)
    assert len({x for x, _ in places}) == 3 and sorted(colour for _, colour in places).count("var(--c0)") in (1, 2)
    assert text.count("ldlq · e8p</li>") == text.count("gptq · e8p</li>") == 1
