"""Models whose tensors follow from their names, as scripts/make_reference_logits.py makes them."""

import functools
import json
import pathlib
import zlib

import jax
import numpy as np

from qjax.models import Model, Tokenizer
from qjax.models.checkpoints.hf_config import parse_config
from qjax.models.checkpoints.weights import read_block, read_edges, tensor_shapes

FIXTURE = pathlib.Path(__file__).parent.parent / "fixtures" / "models" / "families.npz"
_FILE = np.load(FIXTURE)
CASES = sorted({name.split("/")[0] for name in _FILE.files if "/" in name})
TOKENS = _FILE["tokens"]


def values_of(name, shape):
    """The values of a tensor by its name."""
    noise = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    if len(shape) == 1:
        return 0.5 * noise if name.endswith("bias") else 1 + 0.2 * noise
    return noise if "embed" in name else noise * np.float32(1.5 / shape[-1] ** 0.5)


class Generated:
    """A `WeightSource` of such tensors."""

    files, description, quantised = (), "generated", False

    def __init__(self, config):
        self.shapes = tensor_shapes(config)
        self.names = frozenset(self.shapes)

    def shape(self, name):
        return self.shapes[name]

    def dtype(self, name):
        return "F32"

    def nbytes(self, name):
        return 4 * int(np.prod(self.shapes[name]))

    def readable(self, name):
        return True

    def read(self, name):
        return values_of(name, self.shapes[name])


def expected(case):
    """(configuration, names of the saved tensors, logits of every third position) by transformers."""
    config = parse_config(json.loads(str(_FILE[f"{case}/config"])))
    return config, set(_FILE[f"{case}/names"].tolist()), _FILE[f"{case}/logits"]


@functools.cache
def generated(case):
    """The model of a case."""
    config, _, _ = expected(case)
    source = Generated(config)
    params = jax.device_put(read_edges(source, config))
    params["blocks"] = [jax.device_put(read_block(source, config, index)) for index in range(config.num_layers)]
    return Model(config, params, Tokenizer(None), case, "generated", {"sha256": case})
