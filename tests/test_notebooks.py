"""Every notebook runs from top to bottom, and says what its text says."""

import importlib.util
import json
import pathlib
import runpy

import pytest

from qjax.codebooks import CODEBOOKS
from qjax.rounding import ROUNDINGS

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


def codebook_geometry(names):
    assert names["inside"] == 227 and names["distinct"] == 2**16 and names["lattice"].all() and names["own"]
    assert names["steps_ok"] and names["values_ok"]
    mse = names["mse"]
    order = ["trellis, L=10", "trellis, L=8", "E8P", "D4", "Lloyd–Max", "half-integer grid", "trellis, L=6"]
    assert sorted(mse, key=mse.get) == order
    assert names["bound"] < mse["trellis, L=10"] and mse["Lloyd–Max"] == pytest.approx(0.1175, rel=0.02)


def hessian_sketches(names):
    for linear, cosine in names["cosine"].items():
        assert cosine["input"] < min(cosine["sketch_a"], cosine["sketch_b"]), linear
    small = names["small"]
    assert small["I ⊗ E[x xᵀ]"] < small["sketch, 1 step"] < small["sketch, 2 steps"] <= names["best"]


def first_pallas_kernel(names):
    assert names["error"] < 1e-5 and max(names["differences"].values()) < 1e-5
    assert names["words"].nbytes * 16 == names["dense"].nbytes


def your_own_algorithm(names):
    for book in ("half_integer", "e8p", "powers_of_two"):
        losses = [names["loss"][book, strength] for strength in (1.0, 0.5, 0.0)]
        assert losses == sorted(losses)
    assert names["loss"]["half_integer", 1.0] == pytest.approx(names["library"].proxy_loss, rel=1e-3)
    assert len(names["laws"]) == 13  # they were run: four of codebooks, nine of roundings


@pytest.fixture
def registries(monkeypatch):
    """What a notebook registers is gone at the end."""
    for registry in (CODEBOOKS, ROUNDINGS):
        monkeypatch.setattr(registry, "_table", dict(registry._table))
    monkeypatch.syspath_prepend(str(ROOT))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, capsys, figures, registries):
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
