"""What the tests of bad input and of faults share: a small model to damage, problems, and the scripts as modules."""

import importlib.util
import json
import pathlib
import sys

import numpy as np
import pytest

import qjax
from qjax import data
from qjax.errors import ModelFileError
from qjax.linalg.kronecker import Hessian
from qjax.linalg.prng import root_key
from qjax.models import open_model

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
FIXTURE = REPOSITORY / "tests" / "fixtures" / "models" / "llama3"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def script(name):
    """`scripts/<name>.py` as a module."""
    specification = importlib.util.spec_from_file_location(name, REPOSITORY / "scripts" / f"{name}.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module
    specification.loader.exec_module(module)
    return module


def edited(folder, **changes):
    table = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in table.items() if v is not ...}))
    return folder


def with_header(path, header, body=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


def refused(where, message):
    with pytest.raises(ModelFileError, match=message):
        open_model(where)


def problem(m=16, n=32, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2 * n, n)).astype(np.float32)
    return rng.standard_normal((m, n)).astype(np.float32), x.T @ x / np.float32(len(x))


def quantize(weight, h, *, rounding="ldlq", codebook="half_integer", incoherence="hadamard", **options):
    return qjax.quantize_matrix(
        weight,
        Hessian(h, None),
        codebook=qjax.codebooks.make(codebook, 2),
        rounding=qjax.rounding.make(rounding),
        incoherence=qjax.incoherence.make(incoherence),
        key=root_key(0),
        **{"name": "l7", **options},
    )


def dense(matrix):
    return np.asarray(matrix.dequantize())


def tokens_of(tmp_path, ids, **options):
    np.save(tmp_path / "ids.npy", np.asarray(ids, np.int64))
    common = {"calibration_sequences": 2, "evaluation_sequences": 1, "length": 8, "vocab_size": 64, "split": 0.6}
    return data.load("tokens", None, path=str(tmp_path / "ids.npy"), **{**common, **options})
