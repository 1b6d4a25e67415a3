"""The artifact: its pieces are the run's records, any operator is stored, and format 1 becomes the newest unchanged."""

import dataclasses
import errno
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax import models
from qjax.errors import ArtifactError
from qjax.interchange import artifact
from qjax.matrix import LowRank, Sum
from qjax.matrix.operator import operators
from qjax.matrix.quantize import MatrixReport
from qjax.models.linear import linear_weight, replace_linears
from qjax.pipeline.finished import FinishedBlocks
from qjax.pipeline.records import Records

REPORT = {"padded": (1, 1), "bits_per_weight": 2.0, "proxy_loss": 0.1, "weight_mse": 0.1, "damping": 0.01}
REPORT |= {"scale_rms": 1.0, "dead_columns": 0, "seconds": 0.5}
LINEAR = "mlp.down_proj"


@pytest.fixture(scope="module")
def fixture(pytestconfig):
    return pytestconfig.rootpath / "tests" / "fixtures" / "format_1"


@pytest.fixture(scope="module")
def stored(fixture):
    """A model of one block with two quantised matrices, one of them tuned."""
    return artifact.load(fixture / "artifact")


def with_sum(model):
    """The same with a low-rank term beside the second matrix."""
    block = model.params["blocks"][0]
    base = linear_weight(block, LINEAR)
    rng = np.random.default_rng(0)
    b, a = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((base.shape[0], 2), (2, base.shape[1])))
    block = replace_linears(block, {LINEAR: Sum((base, LowRank(b, a, 0.25)))})
    return {**model.params, "blocks": [block]}


def recorded(folder, params):
    records = Records(folder, "1" * 64)
    for name, operator in operators(params["blocks"][0]).items():
        report = MatrixReport(name=f"layers.0.{name.removesuffix('.weight')}", shape=operator.shape, **REPORT)
        records.save(operator, report)
    return records


def same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def test_an_artifact_of_format_1_is_the_same_model_when_it_is_saved_again(fixture, stored, tmp_path):
    artifact.save(tmp_path / "artifact", stored, stored.params)
    again = artifact.load(tmp_path / "artifact")
    same(again.params, stored.params)
    # Adapters name the model that they belong to by this hash.
    assert again.fingerprint == stored.fingerprint == artifact.fingerprint(tmp_path / "artifact")
    assert again.fingerprint["sha256"] == str(np.load(fixture / "expected.npz")["fingerprint"])
    assert artifact.model_bytes(again.params) == artifact.model_bytes(stored.params)
    assert json.loads((tmp_path / "artifact" / "model.json").read_text())["format"] == "qjax-artifact-3"
    names = {"block.0", "edges", "layers.0.mlp.down_proj", "layers.0.self_attn.q_proj"}
    assert {file.stem for file in (tmp_path / "artifact" / "weights").iterdir()} == names


def test_records_are_pieces_of_the_artifact_and_what_tuning_changed_is_written_anew(stored, tmp_path):
    params = with_sum(stored)
    records = recorded(tmp_path / "layers", params)
    block = params["blocks"][0]
    query = linear_weight(block, "self_attn.q_proj")
    tuned = dataclasses.replace(query, output_gain=jnp.full(query.shape[0], 1.5, jnp.float16))
    changed = {**params, "blocks": [replace_linears(block, {"self_attn.q_proj": tuned})]}
    artifact.save(tmp_path / "artifact", stored, changed, records.folder)
    weights = tmp_path / "artifact" / "weights"
    inodes = {file.name: file.stat().st_ino for file in records.folder.iterdir()}
    linked = {file.name for file in weights.iterdir() if file.stat().st_ino == inodes.get(file.name)}
    assert linked == {"layers.0.mlp.down_proj.safetensors"}
    same(artifact.load(tmp_path / "artifact").params, changed)
    same(records.load("layers.0.self_attn.q_proj")[0], query)  # and the record is what it was


@pytest.mark.parametrize("damage", ["no links", "flipped", "cut", "gone", "another"])
def test_what_cannot_be_linked_is_written(stored, tmp_path, monkeypatch, damage):
    records = recorded(tmp_path / "layers", stored.params)
    file = records.folder / "layers.0.mlp.down_proj.safetensors"
    content = bytearray(file.read_bytes())
    if damage == "no links":

        def refused(*_):
            raise OSError(errno.EXDEV, "Invalid cross-device link")

        monkeypatch.setattr(os, "link", refused)
    elif damage == "flipped":
        content[-3] ^= 1
        file.write_bytes(content)
    elif damage == "cut":
        file.write_bytes(content[:-5])
    elif damage == "gone":
        file.unlink()
    else:
        shutil.copyfile(records.folder / "layers.0.self_attn.q_proj.safetensors", file)
    artifact.save(tmp_path / "artifact", stored, stored.params, records.folder)
    piece = tmp_path / "artifact" / "weights" / file.name
    assert not file.exists() or piece.stat().st_ino != file.stat().st_ino
    assert (piece.read_bytes() == content) == (damage == "no links")
    again = artifact.load(tmp_path / "artifact")
    same(again.params, stored.params)
    assert again.fingerprint == stored.fingerprint


def test_a_sum_is_stored_and_computes_as_the_dense_model(stored, tmp_path):
    params = with_sum(stored)
    artifact.save(tmp_path / "artifact", stored, params)
    again = artifact.load(tmp_path / "artifact").params
    same(again, params)
    block = params["blocks"][0]
    low = linear_weight(block, LINEAR).terms[1]
    assert artifact.model_bytes(params) == artifact.model_bytes(stored.params) + low.stored_bits // 8
    dense = {name.removesuffix(".weight"): np.asarray(o.dequantize()) for name, o in operators(block).items()}
    plain = {**params, "blocks": [replace_linears(block, dense)]}
    tokens = np.arange(8, dtype=np.int32)[None]
    logits = (np.asarray(models.forward(own, tokens, stored.config)) for own in (again, plain))
    np.testing.assert_allclose(*logits, atol=2e-4)


def test_blocks_with_any_operator_are_read_from_their_records(stored, tmp_path):
    params = with_sum(stored)
    records = recorded(tmp_path / "layers", params)
    blocks = FinishedBlocks(records, budget=0)
    blocks.append(params["blocks"][0])
    same(blocks[0], params["blocks"][0])
    artifact.save(tmp_path / "artifact", stored, {**params, "blocks": blocks}, records.folder)
    same(artifact.load(tmp_path / "artifact").params, params)


def test_dense_leaves_keep_their_dtype(stored, tmp_path):
    params = {**stored.params, "embed": jnp.asarray(stored.params["embed"], jnp.bfloat16)}
    artifact.save(tmp_path / "artifact", stored, params)
    same(artifact.load(tmp_path / "artifact").params, params)


def rewritten(folder, name, change):
    """A piece with another description, in a folder that was sealed again."""
    from qjax.runtime.atomic import read_safetensors, write_safetensors

    file = folder / "weights" / f"{name}.safetensors"
    arrays, metadata = read_safetensors(file)
    write_safetensors(file, arrays, {**metadata, "spec": json.dumps(change(json.loads(metadata["spec"])))})
    artifact.seal(folder)


def test_an_unknown_operator_or_format_is_named_with_the_version_that_wrote_it(stored, tmp_path):
    records = recorded(tmp_path / "layers", stored.params)
    artifact.save(tmp_path / "artifact", stored, stored.params, records.folder)

    def unknown(description):
        return {**description, "version": "9.1.0", "operator": {**description["operator"], "kind": "sparse"}}

    rewritten(tmp_path / "artifact", "layers.0.mlp.down_proj", unknown)
    message = r"blocks/0/mlp/down_proj/weight: was written by qjax 9\.1\.0, .*unknown operator 'sparse'; there is"
    with pytest.raises(ArtifactError, match=message):
        artifact.load(tmp_path / "artifact")
    shutil.copyfile(
        tmp_path / "artifact" / "weights" / "layers.0.mlp.down_proj.safetensors",
        records.folder / "layers.0.mlp.down_proj.safetensors",
    )
    with pytest.raises(ArtifactError, match=r"layers\.0\.mlp\.down_proj\.safetensors: was written by qjax 9\.1\.0"):
        records.load("layers.0.mlp.down_proj")
    file = tmp_path / "artifact" / "model.json"
    manifest = {**json.loads(file.read_text()), "format": "qjax-artifact-9", "version": "9.1.0"}
    file.write_text(json.dumps(manifest))
    artifact.seal(tmp_path / "artifact")
    with pytest.raises(ArtifactError, match=r"format 'qjax-artifact-9', written by qjax 9\.1\.0; this qjax reads"):
        artifact.load(tmp_path / "artifact")


def test_operators_of_the_manifest_name_no_files_elsewhere(stored, tmp_path):
    artifact.save(tmp_path / "artifact", stored, stored.params)
    file = tmp_path / "artifact" / "model.json"
    manifest = json.loads(file.read_text())
    for place in ("../../x", "/etc/passwd", 3, "blocks/0/mlp/up_proj/weight"):
        file.write_text(json.dumps({**manifest, "operators": [*manifest["operators"][:1], place]}))
        artifact.seal(tmp_path / "artifact")
        with pytest.raises(ArtifactError):
            artifact.load(tmp_path / "artifact")
