"""Every family with every option that it has, against transformers, and with a cache against itself."""

import numpy as np
import pytest
from generated import CASES, TOKENS, expected, generated

from qjax.models import forward
from qjax.models.checkpoints.weights import tensor_shapes
from qjax.models.kv_cache import empty_cache, step
from qjax.models.transformer import embed, head, logits


@pytest.mark.parametrize("case", CASES)
def test_names_and_logits_are_those_of_transformers(case):
    config, names, reference = expected(case)
    assert set(tensor_shapes(config)) == names
    found = np.asarray(forward(generated(case).params, TOKENS, config))[:, ::3]
    assert np.abs(found - reference).max() < 2e-5 * max(1.0, np.abs(reference).max())


@pytest.mark.parametrize("case", [case for case in CASES if case not in ("llama_dynamic", "phi3_longrope_long")])
def test_steps_with_a_cache_give_the_logits_of_the_whole(case):
    """The two left out scale by the length, which is the number of slots of a cache."""
    model = generated(case)
    config, tokens = model.config, TOKENS[:, :12]
    whole = np.asarray(forward(model.params, tokens, config))
    cache, outputs, start = empty_cache(config, 1, 16), [], 0
    for length in (7, 1, 4):
        at = np.full(1, start, np.int32)
        x = embed(model.params["embed"], tokens[:, start : start + length], config, at)
        x, cache = step(model.params["blocks"], x, cache, at, config)
        outputs.append(np.asarray(logits(head(model.params), x, config)))
        start += length
    np.testing.assert_allclose(np.concatenate(outputs, axis=1), whole, rtol=2e-4, atol=2e-4)
