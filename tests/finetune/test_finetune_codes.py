"""Tuning that changes codes, through the entry points: straight-through training and PV-style steps, on `tiny`."""

import json

import jax
import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

import experiments._finetune as entry
import experiments._quantize as quantize
from qjax.errors import InputError
from qjax.finetune import method_of, pv
from qjax.interchange import artifact
from qjax.job.run import run
from qjax.matrix.quantized import QuantizedMatrix

SMALL = ["data.calibration_sequences=8", "data.evaluation_sequences=4", "data.length=64"]


def composed(name, cache, *overrides):
    GlobalHydra.instance().clear()
    with initialize_config_dir(quantize.CONFIGS, version_base="1.3"):
        return compose(name, [*overrides, f"cache={cache}"])


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("codes")
    for codebook in ("half_integer", "e8p"):
        options = ["model=tiny", *SMALL, f"codebook={codebook}", "rounding=nearest", "evaluate=none", "tracker=none"]
        run(quantize.job_of(composed("quantize", folder / "cache", *options, f"out={folder}/{codebook}")))
    return folder


def tuned(folder, codebook, kind, *overrides):
    budget = ["finetune.sequences=16", "finetune.validation=4", "finetune.tokens=1024"]
    where = [f"artifact={folder}/{codebook}/artifact", f"out={folder}/{codebook}-{kind}"]
    settings = entry.plain(composed("finetune", folder / "cache", f"finetune={kind}", *budget, *where, *overrides))
    return settings, entry.run(settings)


def matrices(folder):
    leaves = jax.tree.leaves(
        artifact.load(folder / "artifact").params["blocks"], is_leaf=lambda leaf: isinstance(leaf, QuantizedMatrix)
    )
    return [leaf for leaf in leaves if isinstance(leaf, QuantizedMatrix)]


def test_straight_through_training_gives_ordinary_codes_that_are_better(bases):
    settings, results = tuned(bases, "half_integer", "qat", "finetune.validate_every=2")
    report = results["finetune"]
    assert report["validation_after"] < report["validation_before"]
    assert results["kl_mean"] < report["before"]["kl_mean"]
    before, after = matrices(bases / "half_integer"), matrices(bases / "half_integer-qat")
    changed = [np.mean(np.asarray(a.packed) != np.asarray(b.packed)) for a, b in zip(before, after, strict=True)]
    assert max(changed) > 0
    for one, other in zip(before, after, strict=True):
        assert other.spec() == one.spec() and other.stored_bits == one.stored_bits
        np.testing.assert_array_equal(np.asarray(other.scaling.unit), np.asarray(one.scaling.unit))
    assert entry.run(settings)["kl_mean"] == results["kl_mean"]


def test_straight_through_training_needs_a_scalar_codebook(bases):
    with pytest.raises(InputError, match="needs a scalar codebook; layers.0.mlp.down_proj has 'e8p'"):
        tuned(bases, "e8p", "qat")


def test_steps_of_codes_move_at_most_their_share_and_lower_the_loss(bases):
    codebook = "e8p"
    options = ["finetune.rounds=2", "finetune.batches=2", "finetune.share=0.02", "finetune.validate_every=1"]
    _, results = tuned(bases, codebook, "pv", *options)
    report = results["finetune"]
    assert report["steps"] == 4 and len(report["rounds"]) == 2
    (move,) = report["moves"]
    assert move["smoothness"] > 0 and move["loss_after"] < move["loss_before"] and move["tiles_changed"] > 0
    assert results["kl_mean"] < report["before"]["kl_mean"]
    total = 0
    for one, other in zip(matrices(bases / codebook), matrices(bases / f"{codebook}-pv"), strict=True):
        book, padded = one.codebook, one.transform.padded
        before, after = (np.asarray(book.unpack(m.packed, padded)).reshape(-1) for m in (one, other))
        total += np.sum(before != after)
        assert np.sum(before != after) <= round(0.02 * before.size) and other.spec() == one.spec()
        assert after.max() < 2 ** (book.bits * book.tile[0] * book.tile[1])
    assert total == move["tiles_changed"]
    rounds = json.loads((bases / f"{codebook}-pv" / "finetune" / "round-0" / "task.json").read_text())
    assert rounds["task"]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("finetune.rounds=1", "rounds is 1; it is a number of rounds, at least 2"),
        ("finetune.share=0", "share is 0; it is a share, greater than 0 and at most 1"),
        ("finetune.batches=0", "batches is 0; it is a number of things, at least 1"),
        ("+finetune.tau=0.1", "has no option tau"),
    ],
)
def test_bad_options(tmp_path, option, message):
    with pytest.raises(InputError, match=message):
        method_of(entry.plain(composed("finetune", tmp_path, "finetune=pv", "artifact=a", "out=b", option))["finetune"])
    good = entry.plain(composed("finetune", tmp_path, "finetune=pv", "artifact=a", "out=b"))["finetune"]
    assert isinstance(method_of(good), pv.PV)
