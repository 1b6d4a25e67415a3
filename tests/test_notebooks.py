"""Every notebook runs from top to bottom, and says what its text says."""

import pathlib
import runpy

import pytest

NOTEBOOKS = sorted((pathlib.Path(__file__).parent.parent / "notebooks").glob("*.py"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, capsys):
    names = runpy.run_path(str(path))
    assert capsys.readouterr().out
    if path.stem == "compare_rounding":  # feedback makes the weights worse and the outputs better
        nearest, ldlq = (names["reports"][rounding, "half_integer"] for rounding in ("nearest", "ldlq"))
        assert ldlq.proxy_loss < nearest.proxy_loss and ldlq.weight_mse > nearest.weight_mse
        assert names["reports"]["ldlq", "e8p"].proxy_loss < ldlq.proxy_loss
