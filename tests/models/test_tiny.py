"""The embedded model: what ships is small, complete, as good as its record says, and writes English."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

import qjax
from qjax.data import SOURCES
from qjax.models import generate, load
from qjax.models.sampling import Sampling
from qjax.training.pretrain import held_out_loss
from qjax.training.text import windows

FOLDER = Path(qjax.__file__).parent / "models" / "tiny"


@pytest.fixture(scope="module")
def tiny():
    return load("tiny")


@pytest.fixture(scope="module")
def record():
    return json.loads((FOLDER / "training.json").read_text())


@pytest.fixture(scope="module")
def held_out(record):
    corpus = SOURCES.make("pydoc")
    return corpus.separator.join(corpus.evaluation)


def test_folder_is_complete_and_at_most_four_megabytes():
    files = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert set(files) == {"config.json", "model.safetensors", "tokenizer.json", "training.json"}
    assert sum(files.values()) <= 4_000_000


def test_weights_are_finite_bfloat16_and_counted_by_the_record(tiny, record):
    with safe_open(FOLDER / "model.safetensors", "np") as file:
        assert {str(file.get_slice(name).get_dtype()) for name in file.keys()} == {"BF16"}  # noqa: SIM118
        tensors = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
    assert all(np.isfinite(tensor.astype(np.float32)).all() for tensor in tensors)
    assert sum(tensor.size for tensor in tensors) == record["parameters"]


def test_record_names_what_is_needed_to_repeat_the_training(record):
    assert record["command"] == "python -m experiments.train_tiny"
    assert {"seed", "python", "jax", "machine", "seconds", "steps", "best_step", "tokens_seen", "config"} <= set(record)
    assert re.fullmatch("[0-9a-f]{64}", record["text"]["sha256"])
    rows = record["history"]["rows"]
    assert min(row[2] for row in rows) == next(row[2] for row in rows if row[0] == record["best_step"])
    assert not {"out", "install", "machine"} & set(record["config"])  # a path has no place in the package


def test_measured_loss_is_the_recorded_one(tiny, record, held_out):
    if hashlib.sha256(held_out.encode()).hexdigest() != record["text"]["held_out_sha256"]:
        pytest.skip("this Python's documentation topics are not the ones that the record was made with")
    ids = tiny.tokenizer.encode(held_out)
    assert len(ids) == record["text"]["held_out_tokens"]
    loss = held_out_loss(tiny.params, windows(ids, tiny.config.max_positions), tiny.config)
    assert loss == pytest.approx(record["held_out_loss"], abs=1e-4)


def test_held_out_text_of_any_python_is_predicted_far_better_than_chance(tiny, record, held_out):
    part = windows(tiny.tokenizer.encode(held_out[:8000]), tiny.config.max_positions)[:4]
    assert held_out_loss(tiny.params, part, tiny.config) < record["held_out_loss"] + 0.7


def test_tokenizer_round_trips_and_has_room_for_no_other_id(tiny):
    text = "The function returns\n    a *new* object — naïve café, 日本, \t\U0001f600."
    assert tiny.tokenizer.decode(tiny.tokenizer.encode(text)) == text
    assert tiny.tokenizer.vocab_size == tiny.config.vocab_size
    assert tiny.tokenizer.bos_id == tiny.tokenizer.eos_id == 0


def test_continuation_is_english(tiny, record):
    prompt = tiny.tokenizer.encode("The function returns")
    text = tiny.tokenizer.decode(generate(tiny.params, tiny.config, prompt, 24, eos_id=0))
    known = set(re.findall("[a-z]+", "".join(SOURCES.make("pydoc").calibration).lower()))
    words = re.findall("[a-z]+", text.lower())
    assert len(words) >= 8
    assert sum(word in known for word in words) >= 0.9 * len(words)
    recorded = next(sample for sample in record["samples"] if sample["temperature"] == 0)
    assert recorded["text"].startswith("The function returns" + text)


def test_recorded_sampling_continues_with_the_same_function(tiny, record):
    sampling = Sampling(temperature=0.7, seed=record["seed"])
    prompt = tiny.tokenizer.encode("A class is")
    new = generate(tiny.params, tiny.config, prompt, 8, eos_id=0, sampling=sampling)
    text = "A class is" + tiny.tokenizer.decode(new)
    recorded = [s["text"] for s in record["samples"] if s["temperature"] == 0.7 and s["text"].startswith("A class is")]
    assert recorded[0].startswith(text)
