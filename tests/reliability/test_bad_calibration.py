"""Bad text, tokens and Hessians: cases 19 to 27 of the 36 that must give a clear error or a documented recovery."""

import shutil

import numpy as np
import pytest
from faults import FIXTURE, dense, problem, quantize, tokens_of

import qjax
from qjax import hessian, models
from qjax.errors import ArtifactError, DataError, InputError, ModelFileError, NumericsError
from qjax.hessian.moments import block_hessians
from qjax.hessian.store import HessianStore
from qjax.job import warnings
from qjax.models import open_model


def test_case_19_no_text_and_too_little(tmp_path):
    with pytest.raises(DataError, match="needed 2 windows .16 tokens.; ask for fewer sequences"):
        tokens_of(tmp_path, [])
    with pytest.raises(DataError, match="found 24 tokens, that is 3 windows of length 8; needed 9 windows"):
        tokens_of(tmp_path, np.arange(40) % 64, calibration_sequences=9)
    with pytest.raises(DataError, match="zero calibration tokens"):
        tokens_of(tmp_path, np.arange(40) % 64, calibration_sequences=0)


def test_a_trellis_of_few_states_whose_values_have_a_mean_is_warned_about():
    books = [qjax.codebooks.make("trellis", 2, L=6, code=code) for code in ("1mad", "3inst", "mul1", "lut")]
    first, second = warnings.codebook_warnings([*books, books[0], qjax.codebooks.make("half_integer", 2)])
    assert "code=1mad with codebook.L=6: its 64 values have a mean of -0.45 of their RMS" in first and "3inst" in second
    assert warnings.codebook_warnings([qjax.codebooks.make("trellis", 2, L=8, code="1mad")]) == []


def test_case_20_fewer_tokens_than_inputs_are_warned_about_and_damped(tmp_path):
    config = open_model(FIXTURE).config
    few = tokens_of(tmp_path, np.arange(40) % 64).calibration
    assert warnings.run_warnings(config, few, None, "none")[-1].startswith(
        "the calibration text has 16 tokens, fewer than the 44 inputs of the widest matrix: its Hessian has at most"
    )
    enough = tokens_of(tmp_path, np.arange(400) % 61, calibration_sequences=6).calibration
    assert not [line for line in warnings.run_warnings(config, enough, None, "none") if "calibration" in line]
    weight, _ = problem()
    x = np.random.default_rng(1).standard_normal((4, 32)).astype(np.float32)
    matrix, report = quantize(weight, x.T @ x / 4, damping=0.0)
    assert report.damping > 0 and np.isfinite(dense(matrix)).all()


def test_case_21_dead_input_channels():
    weight, h = problem()
    h[3], h[:, 3] = 0, 0
    matrix, report = quantize(weight, h)
    assert report.dead_columns == 1 and np.isfinite(dense(matrix)).all() and report.damping == pytest.approx(0.01)


def test_case_22_token_ids_outside_the_vocabulary(tmp_path):
    with pytest.raises(DataError, match="token id 64 at position 4 is outside the vocabulary of 64"):
        tokens_of(tmp_path, [1, 2, 3, 4, 64, *range(60)])


def test_case_23_wrong_or_absent_tokenizer_and_missing_bos(folder, tmp_path):
    with pytest.raises(ModelFileError, match="has no tokenizer.json, so text cannot be encoded"):
        open_model(folder).tokenizer.encode("a")
    model = models.load(folder)
    tokens = tokens_of(tmp_path, np.arange(60) % 64).evaluation
    states = np.zeros((*tokens.tokens.shape, 32), np.float32)  # says every token is as likely: perplexity 64
    warnings.check_reference(model, states, tokens, 1, 64.01)
    warnings.check_reference(model, states, tokens, 1, None)
    with pytest.raises(DataError, match=r"perplexity 64 on .* above evaluate.sanity_perplexity=63.*BOS"):
        warnings.check_reference(model, states, tokens, 1, 63)
    expects = models.Tokenizer(None, bos_id=1, adds_bos=True)
    assert "data.bos=sequence" in warnings.run_warnings(model.config, tokens, expects, "none")[-1]
    assert "data.bos" not in " ".join(warnings.run_warnings(model.config, tokens, expects, "sequence"))


def test_case_24_padding_does_not_enter_the_hessian(small):
    """Windows are never padded; a last batch that is filled up counts its real sequences only."""
    tokens = np.random.default_rng(0).integers(0, 64, (3, 8)).astype(np.int32)
    padded, exact = (hessian.collect(small, tokens, batch=batch) for batch in (2, 3))
    for name, h in exact.items():
        assert padded[name].tokens == h.tokens == 24
        np.testing.assert_allclose(padded[name].input, h.input, rtol=1e-5, atol=1e-6 * np.abs(h.input).max())


def test_case_25_activations_that_are_not_finite_name_layer_and_sequence(small):
    x = np.random.default_rng(0).standard_normal((5, 8, 32)).astype(np.float32)
    x[3, 2, 1] = np.nan
    with pytest.raises(NumericsError, match=r"layers.1.self_attn.q_proj: its inputs .* first in sequence 3; drop"):
        block_hessians(small.params["blocks"][1], x, small.config, index=1, batch=2)


def test_case_26_hessians_that_cannot_be(tmp_path, small):
    weight, h = problem()
    for change, message in {
        (0, 1): "not symmetric: .0, 1. and its mirror differ",
        (2, 2): "1 negative values on its diagonal",
    }.items():
        bad = h.copy()
        bad[change] = -50
        with pytest.raises(NumericsError, match=message):
            quantize(weight, bad)
    indefinite = h.copy()
    indefinite[0, 1] = indefinite[1, 0] = 1e6
    with pytest.raises(NumericsError, match="could not be factored with damping up to"):
        quantize(weight, indefinite)
    with pytest.raises(InputError, match=r"the Hessian has shape \(31, 31\).*another layer or model"):
        quantize(weight, h[:31, :31])
    store, tokens = HessianStore(tmp_path), np.random.default_rng(0).integers(0, 64, (2, 8)).astype(np.int32)
    load = store.collect("key", small.config, small.params, tokens, batch=2)
    first = load(0)
    shutil.copyfile(store._file("key", 0), store._file("key", 1))  # another layer's file, whole and of the same sizes
    assert store.load("key", 1) is None and store.load("key", 0) is not None
    with pytest.raises(ArtifactError, match="vanished or was damaged"):
        load(1)
    assert np.array_equal(store.load("key", 0)["self_attn.q_proj"].input, first["self_attn.q_proj"].input)


def test_case_27_stored_hessians_do_not_depend_on_the_signs():
    """Hessians are kept in the layer's own basis; the signs of the seed are applied when a matrix is quantised."""
    weight, h = problem()
    seeds = [quantize(weight, h, name=name) for name in ("a", "b")]
    assert not np.array_equal(dense(seeds[0][0]), dense(seeds[1][0]))
    plain = quantize(weight, h, rounding="nearest")[1].proxy_loss
    for matrix, report in seeds:
        error = (weight - dense(matrix)).astype(np.float64)
        direct = np.sum((error @ h) * error) / np.sum((weight @ h.astype(np.float64)) * weight)
        assert report.proxy_loss == pytest.approx(direct, rel=1e-4) and direct < plain
