"""What the figure shows, and that it is drawn."""

import itertools
import math
import pathlib
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qjax.errors import InputError
from qjax.report import Run
from qjax.report.figure import _drawn, _style, draw
from qjax.report.series import WEIGHT_ERROR, label_positions, limits, series, ticks, varied_bits


def run(rounding, bits, kl=0.9, perplexity=30.0, **settings):
    results = {
        "bits_per_weight": bits + 0.02,
        "perplexity": perplexity,
        "perplexity_interval": [0.9 * perplexity, 1.1 * perplexity],
        "perplexity_reference": 12.48,
        "kl_mean": kl,
        "kl_mean_interval": [0.9 * kl, 1.1 * kl],
    }
    name = f"{rounding}-{bits}"
    return Run(name, pathlib.Path(name), {"model": "m", "rounding": rounding, "bits": bits, **settings}, results)


def sweep():
    scales = {"gptq": 9, "ldlq": 8}
    return [run(name, bits, kl * 4.0**-bits, 12.48 + kl) for name, kl in scales.items() for bits in (2, 3, 4)]


def test_runs_that_differ_in_bits_are_one_series():
    assert varied_bits(sweep())
    made = series(sweep())
    assert [(s.label, s.rounding) for s in made] == [("gptq", "gptq"), ("ldlq", "ldlq")]
    assert [point.bits for point in made[0].points["kl_mean"]] == [2.02, 3.02, 4.02]
    assert made[1].points["kl_mean"][0].interval == pytest.approx((0.45, 0.55))


def test_every_other_setting_separates_series_and_is_in_the_label():
    books = [("ldlq", "d4"), ("ldlq", "e8p"), ("gptq", "d4")]
    made = series([run(name, 2, codebook=book) for name, book in books])
    assert sorted(s.label for s in made) == ["gptq, d4", "ldlq, d4", "ldlq, e8p"]
    by_option = series([run("ldlq", 2, **{"rounding.block": b}) for b in (None, 8)])
    assert sorted(s.label for s in by_option) == ["block 8", "block –"]


def test_infinite_and_absent_values_are_left_out():
    hopeless = run("nearest", 2, perplexity=math.inf)
    assert series([hopeless])[0].points["perplexity"] == () and len(series([hopeless])[0].points["kl_mean"]) == 1


@given(st.lists(st.floats(0, 1), max_size=12), st.floats(0.001, 0.2))
def test_labels_keep_their_distance_and_their_order(wanted, gap):
    placed = label_positions(wanted, gap)
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    heights = [placed[i] for i in order]
    assert all(b - a >= gap * (1 - 1e-6) for a, b in itertools.pairwise(heights))
    apart = sorted(wanted)
    if all(b - a > gap for a, b in itertools.pairwise(apart)):
        assert placed == pytest.approx(wanted)


@given(st.floats(1e-4, 1e6), st.floats(1.01, 1e8))
def test_ticks_lie_inside_the_axis_and_are_few(low, factor):
    low, high = limits([low, low * factor], 0.05)
    assert high / low >= 2
    places = ticks(low, high)
    assert 3 <= len(places) <= 15 and all(low <= tick <= high for tick in places)
    assert places == sorted(set(places))


@pytest.mark.parametrize(
    "runs",
    [
        sweep(),
        [run("nearest", 2, 8.1, 45273.0), run("ldlq", 2)],
        [run("nearest", 2, 8.1, math.inf), run("ldlq", 2), run("ldlq", 3)],
        [run("nearest", 2, 8.1, math.inf), run("ldlq", 2)],
        [run("unheard of", 2)],
    ],
    ids=["curves", "dots", "curves beyond the axis", "dots beyond the axis", "one run"],
)
def test_both_files_are_drawn(tmp_path, runs):
    png, svg = draw(runs, tmp_path / "new")
    assert png.read_bytes().startswith(b"\x89PNG\r\n") and png.stat().st_size > 10_000
    assert "<svg" in svg.read_text()[:1000]
    assert [path.name for path in (png, svg)] == ["figure.png", "figure.svg"]


def test_the_same_runs_give_the_same_bytes(tmp_path):
    first, second = draw(sweep(), tmp_path / "a"), draw(sweep(), tmp_path / "b")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_the_bound_of_the_weights_error_is_drawn_at_two_to_the_minus_two_bits(tmp_path):
    def with_error(bits):
        made = run("ldlq", bits)
        return Run(made.name, made.path, made.settings, {**made.results, "weight_mse_mean": 0.2 * 4.0 ** (2 - bits)})

    with _style():
        (axes,) = _drawn([with_error(2), with_error(4)], [WEIGHT_ERROR]).axes
        bound = next(line for line in axes.lines if line.get_linestyle() == "--" and len(line.get_xdata()) == 2)
        assert list(bound.get_ydata()) == pytest.approx([2.0 ** (-2 * 2.02), 2.0 ** (-2 * 4.02)])
        (axes,) = _drawn([with_error(2)], [WEIGHT_ERROR]).axes
        assert any(text.get_text() == "bound 0.06079" for text in axes.texts)


def test_runs_without_evaluation_have_no_figure(tmp_path):
    with pytest.raises(InputError, match="none was evaluated"):
        draw([Run("a", tmp_path, {}, {"bits_per_weight": 2.0})], tmp_path)


def test_without_matplotlib_the_message_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"the figure needs matplotlib: pip install -e '\.\[plots\]'"):
        draw(sweep(), tmp_path)


def test_runs_that_differ_in_many_settings_go_by_their_directory():
    first = run("gptq", 2, codebook="d4", stream="original", damping=0.01)
    second = run("ldlq", 2, codebook="e8p", stream="quantized", damping=0.1)
    assert sorted(s.label for s in series([first, second], join_bits=False)) == ["gptq-2", "ldlq-2"]
