"""Sketches on disk: killed and continued to the same bytes, prefixes, budgets, damaged checkpoints."""

import json

import numpy as np
import pytest

from qjax import hessian
from qjax.errors import ArtifactError, InputError
from qjax.hessian import HessianStore, Sketch, sketch_store
from qjax.hessian.sketch_collect import block_bytes, ranges
from qjax.hessian.sketch_store import collect_into
from qjax.models.linear import linears_of
from qjax.runtime.atomic import read_safetensors, write_safetensors

LINEARS = (
    *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)


class Killed(Exception):
    pass


def collect(store, model, tokens, sketch, key="k", budget=1e9, die_after=None, checkpoint=1e-9, prefixes=None):
    def progress(done, total):
        assert 0 < done <= total
        if die_after is not None and done >= die_after:
            raise Killed

    moments = None
    if sketch.estimator == "sketch_a":
        moments = store.collect("moments", model.config, model.params, tokens, batch=2)
    return collect_into(
        store,
        key,
        model.config,
        model.params,
        tokens,
        sketch,
        batch=2,
        budget=budget,
        checkpoint=checkpoint,
        moments=moments,
        prefixes=prefixes,
        progress=progress,
    )


def files(store, key="k"):
    return {file.name: file.read_bytes() for file in sorted((store.path / key).glob("*.safetensors"))}


@pytest.mark.parametrize("sketch", [Sketch(), Sketch(rounds=2), Sketch("sketch_a", rounds=3)], ids=lambda s: s.text())
def test_a_killed_collection_ends_in_the_same_bytes(model, tokens, tmp_path, sketch):
    whole, killed = HessianStore(tmp_path / "a"), HessianStore(tmp_path / "b")
    load = collect(whole, model, tokens, sketch)
    found = hessian.collect(model, tokens, sketch.estimator, batch=2, rounds=sketch.rounds)
    for name in LINEARS:
        np.testing.assert_array_equal(load(1)[name].output, found[f"layers.1.{name}"].output)
        np.testing.assert_array_equal(load(1)[name].input, found[f"layers.1.{name}"].input)
    for die_after in range(4, 2 * len(tokens), 4):
        try:
            collect(killed, model, tokens, sketch, die_after=die_after)
            break
        except Killed:
            continue
    else:
        collect(killed, model, tokens, sketch)
    assert files(killed) == files(whole) and len(files(whole)) == 2
    assert sorted(p.name for p in (killed.path / "k").iterdir()) == ["block_0000.safetensors", "block_0001.safetensors"]


def test_one_pass_also_stores_the_sketches_of_its_prefixes(model, tokens, tmp_path):
    whole, alone = HessianStore(tmp_path / "a"), HessianStore(tmp_path / "b")
    with pytest.raises(Killed):  # after the first prefix is stored and before the second
        collect(whole, model, tokens, Sketch(), die_after=3, prefixes={2: "two", 4: "four"})
    collect(whole, model, tokens, Sketch(), prefixes={2: "two", 4: "four"})
    for key, size in (("two", 2), ("four", 4)):
        collect(alone, model, tokens[:size], Sketch(), key=key)
        assert files(whole, key) == files(alone, key) and len(files(whole, key)) == 2
    collect(alone, model, tokens, Sketch())
    assert files(whole) == files(alone)
    first = whole.path / "two" / "block_0001.safetensors"
    kept = first.read_bytes()
    first.unlink()  # what was stored and is gone is collected again
    collect(whole, model, tokens, Sketch(), prefixes={2: "two", 4: "four"})
    assert first.read_bytes() == kept


@pytest.mark.parametrize(
    ("sketch", "size", "message"),
    [
        (Sketch(), 3, "hessian.prefixes has 3; with 5 sequences in batches of 2 it takes multiples of 2 below 5"),
        (Sketch(), 6, "below 5"),
        (Sketch(rounds=2), 2, "only one pass of sketch_b has the sums of its prefixes"),
        (Sketch("sketch_a", rounds=2), 2, "only one pass of sketch_b"),
    ],
)
def test_prefixes_that_no_sums_belong_to(model, tokens, tmp_path, sketch, size, message):
    with pytest.raises(InputError, match=message):
        collect(HessianStore(tmp_path), model, tokens[:5], sketch, prefixes={size: "p"})


def test_a_small_budget_repeats_the_pass_for_fewer_blocks(model, tokens, tmp_path):
    assert ranges(model.config, 1) == [range(1, 2), range(1)]
    assert ranges(model.config, 2 * block_bytes(model.config)) == [range(2)]
    large, small = HessianStore(tmp_path / "a"), HessianStore(tmp_path / "b")
    collect(large, model, tokens, Sketch())
    collect(small, model, tokens, Sketch(), budget=1)
    assert files(small) == files(large)


@pytest.fixture
def stores(model, tokens, tmp_path):
    """(a store with the whole sketch, one whose collection was killed)."""
    whole, killed = HessianStore(tmp_path / "a"), HessianStore(tmp_path / "b")
    collect(whole, model, tokens, Sketch())
    with pytest.raises(Killed):
        collect(killed, model, tokens, Sketch(), die_after=6)
    return whole, killed


def test_a_damaged_checkpoint_is_not_used(model, tokens, stores):
    whole, killed = stores
    (damaged,) = killed.path.glob("k/partial/*/block_0001.safetensors")
    content = bytearray(damaged.read_bytes())
    content[-5] ^= 1
    damaged.write_bytes(content)
    collect(killed, model, tokens, Sketch())
    assert files(killed) == files(whole)


def test_a_checkpoint_of_an_older_version_is_not_used(model, tokens, stores):
    """One that said -1 where no sequence was bad ended the run with an OverflowError."""
    whole, killed = stores
    (older,) = killed.path.glob("k/partial/*/block_0001.safetensors")
    arrays, metadata = read_safetensors(older)
    none = json.dumps(dict.fromkeys(json.loads(metadata.pop("bad")), -1))
    write_safetensors(older, arrays, {"bad": none})
    with pytest.raises(ArtifactError, match=r"block_0001.safetensors: .* -1.*expected whole numbers up to 4294967295"):
        sketch_store._load(older)
    collect(killed, model, tokens, Sketch())
    assert files(killed) == files(whole)


def test_factors_are_stored_as_triangles(model, tokens, tmp_path):
    store = HessianStore(tmp_path)
    collect(store, model, tokens, Sketch())
    shapes = [weight.shape for block in model.params["blocks"] for weight in linears_of(block).values()]
    triangles = sum(4 * (m * (m + 1) // 2 + n * (n + 1) // 2) for m, n in shapes)
    assert sum(len(content) for content in files(store).values()) < 1.2 * triangles
