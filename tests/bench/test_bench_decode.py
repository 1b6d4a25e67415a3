"""The decoding benchmark: its records, its table, its refusals."""

import jax
import numpy as np
import pytest

from qjax import codebooks, incoherence, models, rounding
from qjax.bench import decode
from qjax.errors import InputError
from qjax.hessian import collect
from qjax.interchange import artifact
from qjax.matrix.quantize import quantize_matrix
from qjax.models.linear import linears_of, replace_linears


@pytest.mark.parametrize(("bits", "code"), [(4, None), (2, "mul1"), (2, "e8p")])
def test_a_record_of_products(bits, code):
    record = decode.matvec((32, 64), bits, code, repeats=2)
    assert record["bytes"]["dense"] == 4 * 32 * 64 and record["speedup"] > 0
    assert all(0 < seconds < 5 for seconds in record["seconds_per_product"].values())
    headers, rows = decode.lines([record])
    assert len(rows[0]) == len(headers) and rows[0][0].endswith("32x64")


@pytest.mark.slow
def test_a_record_of_a_model(tmp_path):
    model = models.load("tiny")
    hessians = collect(model, np.arange(64, dtype=np.int32).reshape(2, 32) % 50)
    blocks, transform = [], incoherence.make("hadamard")
    for index, parameters in enumerate(model.params["blocks"]):
        matrices = {}
        for linear, weight in linears_of(parameters).items():
            name = f"layers.{index}.{linear}"
            matrices[linear], _ = quantize_matrix(
                weight,
                hessians[name],
                codebook=codebooks.make("half_integer", 2),
                rounding=rounding.make("nearest"),
                incoherence=transform,
                key=jax.random.key(0),
                name=name,
            )
        blocks.append(replace_linears(parameters, matrices))
    artifact.save(tmp_path / "a", model, {**model.params, "blocks": blocks})
    record = decode.model(str(tmp_path / "a"), "tiny", tokens=3, repeats=1)
    assert record["packed_matrices"] == 7 * len(blocks)
    assert record["bytes"]["packed"] < record["bytes"]["dense"] / 4
    assert all(rate > 0 for rate in record["tokens_per_second"].values())
    assert decode.lines([record])[1][0][0] == "tiny, 3 tokens"


def test_what_is_asked_is_said_with_both_of_its_parts():
    bytes_of = {"packed": 20, "dense": 100}
    model = {"what": "a model", "speedup": 1.2, "asked": {"speedup": 1.0, "memory": 0.25}, "bytes": bytes_of}
    slow, large = {**model, "speedup": 0.9}, {**model, "bytes": {"packed": 30, "dense": 100}}
    product = {"what": "a matrix", "speedup": 1.6, "asked": {"speedup": 1.5}, "bytes": bytes_of}
    found = decode.verdict([model, slow, large, product, {**product, "asked": None}])
    assert [line.endswith(": reached") for line in found] == [True, False, False, True]
    assert "1.20 times the speed of dense float32 (asked: at least 1.0), 0.200 of its weights' bytes" in found[0]


def test_refusals():
    with pytest.raises(InputError, match="repeats is 0"):
        decode.matvec((32, 64), 2, None, repeats=0)
    with pytest.raises(InputError, match="tokens is 0"):
        decode.model("nowhere", "tiny", tokens=0)
