"""Plain lines at fixed times, and a bar on a terminal."""

from __future__ import annotations

import io

import pytest

from qjax.errors import InputError
from qjax.runtime.progress import Progress, duration


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00:00"), (59.6, "0:01:00"), (3599, "0:59:59"), (3600.4, "1:00:00"), (360000, "100:00:00")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_plain_lines_with_percent_elapsed_and_time_left():
    clock, stream = Clock(), io.StringIO()
    with Progress("quantise", 10, stream=stream, clock=clock, interval=5.0) as progress:
        for i in range(10):
            clock.now += 2.0
            progress.advance(note=f"layer {i}")
    assert stream.getvalue().splitlines() == [
        "quantise 1/10   10.0%  elapsed 0:00:02  left 0:00:18  layer 0",
        "quantise 4/10   40.0%  elapsed 0:00:08  left 0:00:12  layer 3",
        "quantise 7/10   70.0%  elapsed 0:00:14  left 0:00:06  layer 6",
        "quantise 10/10  100.0%  elapsed 0:00:20  left 0:00:00  layer 9",
    ]


def test_resumed_work_does_not_shorten_the_time_left():
    clock, stream = Clock(), io.StringIO()
    with Progress("quantise", 100, done=90, stream=stream, clock=clock) as progress:
        assert progress.seconds_left() is None
        clock.now += 4.0
        progress.advance()
        assert progress.seconds_left() == pytest.approx(36.0)
    assert stream.getvalue() == "quantise 91/100   91.0%  elapsed 0:00:04  left 0:00:36\n"


def test_the_last_state_is_written_when_the_block_ends_early():
    clock, stream = Clock(), io.StringIO()
    with Progress("x", 9, stream=stream, clock=clock) as progress:
        progress.advance()
        progress.update(5)
    assert [line.split()[1] for line in stream.getvalue().splitlines()] == ["1/9", "5/9"]


def test_no_work_at_all():
    stream = io.StringIO()
    with Progress("x", 0, stream=stream, clock=Clock()):
        pass
    assert stream.getvalue() == "x 0/0  100.0%  elapsed 0:00:00  left ?\n"


def test_a_terminal_gets_a_bar_and_no_plain_lines(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with Progress("quantise", 2, stream=stream) as progress:
        progress.advance(note="layer 0")
        progress.advance(note="layer 1")
    text = stream.getvalue()
    assert "quantise" in text
    assert "2/2" in text
    assert "layer 1" in text
    assert "elapsed" not in text


@pytest.mark.parametrize(("total", "done"), [(-1, 0), (3, 4), (3, -1)])
def test_impossible_totals(total, done):
    with pytest.raises(InputError, match="need 0 <= done <= total"):
        Progress("x", total, done=done)
