"""All families through all stages: Hessians, a sketch, rounding, storage, generation.

Widths are those of the other fixtures and equal among families, so that the programs of roundings are shared.
"""

import numpy as np
import pytest
from generated import generated

import qjax
from qjax import hessian
from qjax.models import forward, generate, layer_names
from qjax.models.linear import linears_of

FAMILIES = [
    *("falcon_40b", "gemma", "gemma2", "gemma3", "gpt_neox", "granite", "llama_yarn"),
    *("olmo2", "phi4_partial", "qwen2_windows", "smollm3_windows"),
]
BOOK = {"name": "trellis", "L": 8}  # few states: what is tested is the way there
RECIPES = {
    "rtn": {"codebook": "half_integer", "rounding": "nearest", "incoherence": None},
    "gptq": {"codebook": "grid", "rounding": "gptq", "incoherence": None},
    "quip_sharp": {"codebook": "e8p", "rounding": "ldlq", "incoherence": "hadamard"},
    "qtip": {"codebook": BOOK, "rounding": "ldlq", "incoherence": "hadamard"},
    "yaqa": {"codebook": BOOK, "rounding": "yaqa", "incoherence": "hadamard"},
}


@pytest.fixture(scope="module")
def tokens():
    """Sequences of a chain of tokens, so that contexts matter."""
    steps = np.random.default_rng(0).integers(1, 4, (4, 32))
    return (np.cumsum(steps, axis=1) % 64).astype(np.int32)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_stage(family, tokens, tmp_path):
    """Every method quantises every linear, and the better-informed ones lose less; an artifact computes the same."""
    model = generated(family)
    names = layer_names(model.config)
    hessians = hessian.collect(model, tokens, "sketch_b", batch=4)
    assert list(hessians) == names
    original = np.asarray(forward(model.params, tokens[:1], model.config))
    gaps = {}
    for method, recipe in RECIPES.items():
        small = qjax.quantize_model(model, tokens, qjax.Recipe(bits=2, **recipe), hessians=hessians, progress=False)
        assert [report.name for report in small.reports] == names
        found = np.asarray(forward(small.params, tokens[:1], small.config))
        gaps[method] = np.linalg.norm(found - original) / np.linalg.norm(original)
    assert all(0.01 < gap < 1.6 for gap in gaps.values()), gaps
    small.save(tmp_path / "model")
    stored = qjax.load(tmp_path / "model")
    assert stored.config == model.config
    assert all(hasattr(w, "matmul") for block in stored.params["blocks"] for w in linears_of(block).values())
    np.testing.assert_array_equal(np.asarray(forward(stored.params, tokens[:1], stored.config)), found)
    assert generate(stored.params, stored.config, [3, 5, 8], 3).shape == (3,)
