"""Models to damage."""

import json
import shutil

import pytest
from faults import FIXTURE, INDEX, WEIGHTS
from safetensors.numpy import load_file, save_file

from qjax import models


@pytest.fixture
def folder(tmp_path):
    """A copy of a model of two blocks, width 32."""
    target = tmp_path / "model"
    target.mkdir()
    for name in ("config.json", WEIGHTS):
        shutil.copyfile(FIXTURE / name, target / name)
    return target


@pytest.fixture
def shards(folder):
    """The copy in two shards."""
    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    (folder / WEIGHTS).unlink()
    table = {}
    for number in range(2):
        file = f"part-{number}.safetensors"
        save_file({name: tensors[name] for name in names[number::2]}, folder / file)
        table |= dict.fromkeys(names[number::2], file)
    (folder / INDEX).write_text(json.dumps({"weight_map": table}))
    return folder


@pytest.fixture(scope="module")
def small():
    """The model in memory."""
    return models.load(FIXTURE)
