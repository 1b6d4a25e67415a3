"""Every notebook runs from top to bottom, and says what its text says."""

import importlib.util
import json
import pathlib
import runpy

import pytest

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.py"))


@pytest.fixture
def figures(monkeypatch):
    """Figures are drawn, not shown, and closed at the end; nothing without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        yield
        return
    import matplotlib.pyplot as plt

    monkeypatch.setattr(plt, "show", lambda: None)
    yield
    plt.close("all")


def incoherence(names):
    name, mu = names["name"], names["mu"]
    assert mu[name][0] > 1.5 * mu[name][1]  # the worst matrix gains
    assert max(after for _, after in mu.values()) < 1.5 * names["expected"]  # all look like Gaussians
    assert names["share"]["after"] < names["share"]["before"] / 3 and names["mu_h"]["after"] < names["mu_h"]["before"]
    assert names["errors"]["hadamard"] < 0.8 * names["errors"]["none"]


def ldlq_by_hand(names):
    assert names["same_ldlq"] and names["same_gptq"] and names["identity_holds"]
    assert names["losses"]["ldlq"] < names["losses"]["nearest"]


def compare_rounding(names):
    # feedback makes the weights worse and the outputs better
    nearest, ldlq = (names["reports"][rounding, "half_integer"] for rounding in ("nearest", "ldlq"))
    assert ldlq.proxy_loss < nearest.proxy_loss and ldlq.weight_mse > nearest.weight_mse
    assert names["reports"]["ldlq", "e8p"].proxy_loss < ldlq.proxy_loss


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, capsys, figures):
    names = runpy.run_path(str(path))
    assert capsys.readouterr().out
    globals()[path.stem](names)


def maker():
    return runpy.run_path(str(ROOT / "scripts" / "make_notebooks.py"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_pairs_agree(path):
    pair = path.with_suffix(".ipynb")
    assert pair.exists() and pair.read_text(encoding="utf-8") == maker()["rendered"](path), (
        "python scripts/make_notebooks.py"
    )


def test_a_notebook_has_the_cells_of_its_file():
    text = "# ---\n# header\n# ---\n\n# %% [markdown]\n# # Title\n#\n# Text\n\n# %%\nx = 1\n\ny = 2\n"
    made = maker()["notebook"](text)
    assert [(cell["cell_type"], "".join(cell["source"])) for cell in made["cells"]] == [
        ("markdown", "# Title\n\nText"),
        ("code", "x = 1\n\ny = 2"),
    ]
    assert made["nbformat"] == 4 and json.dumps(made)
    with pytest.raises(ValueError, match="line 2"):
        maker()["notebook"]("# %% [markdown]\nx = 1\n")


def test_there_is_no_notebook_without_a_source():
    assert {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")} == {path.stem for path in NOTEBOOKS}
