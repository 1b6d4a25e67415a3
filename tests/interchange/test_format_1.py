"""What qjax 0.1.0 wrote before operators had descriptions of their own is read to the same matrices.

`tests/fixtures/format_1` was written by that code: records of every kind of rotation, scale and codebook with fixed and
with tuned tables, an artifact on orbax with one matrix of each version, and what both decode to.
"""

import numpy as np
import pytest

from qjax import models
from qjax.interchange import artifact
from qjax.pipeline.records import Records


@pytest.fixture(scope="module")
def folder(pytestconfig):
    return pytestconfig.rootpath / "tests" / "fixtures" / "format_1"


@pytest.fixture(scope="module")
def expected(folder):
    return dict(np.load(folder / "expected.npz"))


@pytest.mark.parametrize("name", ["plain", "rows", "groups", "input_side", "bare", "trellis"])
def test_records_are_read(folder, expected, name):
    found = Records(folder / "records", "0" * 64).load(name)
    assert found is not None and found[1].name == name and found[0].shape == found[1].shape == (12, 24)
    dense = expected[f"records/{name}"]
    np.testing.assert_allclose(np.asarray(found[0].dequantize()), dense, atol=1e-6 * np.abs(dense).max())
    assert found[1].bits_per_weight <= found[0].bits_per_weight  # tuned ones have gains besides


def test_the_artifact_is_read(folder, expected):
    stored = artifact.load(folder / "artifact")
    assert stored.fingerprint["sha256"] == str(expected["fingerprint"])
    block = stored.params["blocks"][0]
    for group, leaf in (("self_attn", "q_proj"), ("mlp", "down_proj")):
        dense = expected[f"artifact/{group}.{leaf}"]
        found = np.asarray(block[group][leaf]["weight"].dequantize())
        np.testing.assert_allclose(found, dense, atol=1e-6 * np.abs(dense).max())
    logits = np.asarray(models.forward(stored.params, np.arange(8, dtype=np.int32)[None], stored.config))
    np.testing.assert_allclose(logits, expected["artifact/logits"], atol=1e-4)
    assert stored.tokenizer.encode("a").tolist() == [1]
