"""Embedding and head by rules: what they save, what computes with them, and what is refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import qjax
from qjax.errors import InputError
from qjax.hessian.head import head_hessian
from qjax.interchange import artifact
from qjax.job.tuning import whole_model_bytes
from qjax.linalg.prng import root_key
from qjax.matrix import Lookup
from qjax.matrix.kernel_layout import pack_model
from qjax.matrix.operator import is_operator
from qjax.models.checkpoints.weights import leaf_shapes
from qjax.models.config import ModelConfig
from qjax.models.edges import edge_matrices, edge_operators, edge_weight, with_edges
from qjax.models.families import FAMILIES
from qjax.models.families.opt import OPTConfig
from qjax.models.generate import generate
from qjax.models.loading import Model
from qjax.models.tokenizers.tokenizer import Tokenizer
from qjax.models.transformer import forward
from qjax.pipeline.quantize_model import quantize_model
from qjax.pipeline.records import Records
from qjax.runtime.mesh import MeshSettings
from qjax.tensor_parallel.placement import _edge_spec, distribute

SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "num_heads": 2}
SIZES |= {"num_kv_heads": 2, "head_dim": 16, "max_positions": 64}
LLAMA = ModelConfig("LlamaForCausalLM", **SIZES)
BIASES = {"qkv_bias": True, "attention_bias": True, "mlp_bias": True}
OPT = OPTConfig("OPTForCausalLM", **SIZES, **BIASES, embedding_size=16, tie_embeddings=True)
GROUPS = {"method": "minmax", "granularity": "group", "group_size": 16}
RULE = {"pattern": "^(embed|head)$", "bits": 4, "codebook": {"name": "grid"}, "incoherence": "none", "scale": GROUPS}
RULE |= {"rounding": "gptq"}
SKIP = {"pattern": "layers", "skip": True}  # nothing of the blocks: the tests below are about what lies outside


def random_model(config, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    params = {"norm": {}, "blocks": [{} for _ in range(config.num_layers)]}
    for path, shape in leaf_shapes(config).items():
        *parents, last = path.split("/")
        node = params
        for key in parents:
            node = node[int(key)] if isinstance(node, list) else node.setdefault(key, {})
        values = rng.standard_normal(shape) * (0.3 if len(shape) == 2 else 0.1) + (len(shape) == 1)
        node[last] = jnp.asarray(values.astype(np.float32)).astype(dtype)
    fingerprint = {"sha256": f"{seed:064x}"}
    return Model(config, params, Tokenizer(None, missing="none"), "random", "random", fingerprint)


def tied(config=LLAMA):
    return dataclasses.replace(config, tie_embeddings=True)


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(1).integers(0, SIZES["vocab_size"], (6, 16)).astype(np.int32)


def rounded(model, tokens, *rules, **options):
    return qjax.quantize_model(model, tokens, qjax.Recipe(rules=(*rules, SKIP), **options), progress=False)


def dense(params):
    return jax.tree.map(lambda leaf: leaf.dequantize() if is_operator(leaf) else leaf, params, is_leaf=is_operator)


@pytest.mark.parametrize("config", [LLAMA, tied(), OPT], ids=["llama", "tied", "opt"])
def test_the_model_computes_with_the_decoded_matrices(config, tokens, tmp_path):
    model = random_model(config)
    found = rounded(model, tokens, RULE | {"bits": 8})
    names = list(edge_operators(found.params))
    assert names == ["embed"] if config.tie_embeddings else names == ["embed", "head"]
    assert [report.name for report in found.reports] == names and all(0 < r.proxy_loss < 1e-4 for r in found.reports)
    logits = forward(found.params, tokens, config)
    np.testing.assert_allclose(logits, forward(dense(found.params), tokens, config), rtol=1e-4, atol=1e-4)
    original = forward(model.params, tokens, config)
    assert 0 < float(jnp.mean(jnp.square(logits - original)) / jnp.mean(jnp.square(original))) < 1e-3
    assert whole_model_bytes(found.params) < whole_model_bytes(model.params)
    assert found.bits_per_weight == pytest.approx(8 + 24 / 16, abs=0.1)
    found.save(tmp_path / "artifact")
    again = qjax.load(tmp_path / "artifact")
    assert again.fingerprint == found.fingerprint and [r.name for r in again.reports] == names
    np.testing.assert_array_equal(forward(again.params, tokens, config), logits)


@pytest.mark.parametrize("config", [LLAMA, tied()], ids=["llama", "tied"])
def test_cached_steps_and_packed_inference_continue_as_whole_sequences_do(config, tokens):
    model = random_model(config)
    params = rounded(model, tokens, RULE).params
    text = np.zeros(11, np.int32)  # what follows a position does not reach it
    text[:5] = tokens[0, :5]
    for place in range(5, 11):
        text[place] = np.argmax(forward(params, text[None], config)[0, place - 1])
    np.testing.assert_array_equal(generate(params, config, tokens[0, :5], 6), text[5:])
    np.testing.assert_array_equal(generate(pack_model(params), config, tokens[0, :5], 6), text[5:])


def test_without_a_rule_that_names_them_they_stay(tokens):
    model = random_model(LLAMA)
    rules = [{"pattern": r"layers\..*([qko]_proj|mlp)", "skip": True}, {"pattern": ".", "bits": 3}]
    found = qjax.quantize_model(model, tokens, qjax.Recipe(rules=rules, rounding="nearest"), progress=False)
    assert {report.name for report in found.reports} == {f"layers.{i}.self_attn.v_proj" for i in range(2)}
    assert found.params["embed"] is model.params["embed"] and found.params["head"] is model.params["head"]


def test_the_heads_hessian_is_the_second_moment_of_its_inputs(tokens):
    model = random_model(LLAMA)
    solved = {**model.params, "head": jnp.eye(SIZES["hidden_size"])}  # logits are then the head's inputs
    inputs = np.asarray(forward(solved, tokens, LLAMA), np.float64).reshape(-1, SIZES["hidden_size"])
    found = head_hessian(LLAMA, model.params, tokens, batch=4)
    np.testing.assert_allclose(found.input, inputs.T @ inputs / len(inputs), rtol=1e-4, atol=1e-5)
    assert found.tokens == tokens.size


def test_gptq_of_the_head_beats_plain_rounding_on_the_logits(tokens):
    model = random_model(LLAMA)
    loss = {}
    for rounding in ("nearest", "gptq"):
        rule = RULE | {"pattern": "^head$", "bits": 2, "rounding": rounding}
        found = rounded(model, tokens, rule)
        assert list(edge_operators(found.params)) == ["head"]
        error = forward(found.params, tokens, LLAMA) - forward(model.params, tokens, LLAMA)
        loss[rounding] = float(jnp.mean(jnp.square(error)))
    assert loss["gptq"] < 0.9 * loss["nearest"]


@pytest.mark.parametrize("stream", ["sequential", "corrected", "original"])
def test_the_quantised_stream_begins_with_the_quantised_embedding(stream, tokens, tmp_path):
    """Hessians of block 0 in the quantised stream are those of a model whose embedding is the decoded one."""
    model = random_model(LLAMA)
    rules = (RULE | {"pattern": "embed", "bits": 2}, {"pattern": r"layers\.1|[kvo]_proj|mlp", "skip": True})
    recipe = {"rounding": "gptq", "codebook": "grid", "incoherence": None, "bits": 3, "hessian": stream}
    found = qjax.quantize_model(model, tokens, qjax.Recipe(rules=rules, **recipe), progress=False)
    query = found.params["blocks"][0]["self_attn"]["q_proj"]["weight"]
    other = dataclasses.replace(model, params=dense({**found.params, "blocks": model.params["blocks"]}))
    changed = qjax.quantize_model(other, tokens, qjax.Recipe(rules=rules[1:], **recipe), progress=False)
    same = changed.params["blocks"][0]["self_attn"]["q_proj"]["weight"]
    if stream == "sequential":
        np.testing.assert_array_equal(query.packed, same.packed)
    elif stream == "original":
        assert not np.array_equal(query.packed, same.packed)
    reports = {report.name: report for report in found.reports}
    assert (reports["layers.0.self_attn.q_proj"].correction > 1e-4) == (stream == "corrected")


def test_a_run_goes_on_with_the_records_of_embedding_and_head(tokens, tmp_path):
    model, recipe = random_model(LLAMA), qjax.Recipe(rules=(RULE, SKIP))
    records, calls = Records(tmp_path, "1" * 64), []
    options = {"seed": 0, "records": records, "on_layer": lambda report, found: calls.append((report.name, found))}
    first = quantize_model(LLAMA, model.params, tokens, recipe, **options)
    (tmp_path / "head.safetensors").unlink()
    before = (tmp_path / "embed.safetensors").stat().st_mtime_ns
    again = quantize_model(LLAMA, model.params, tokens, recipe, **options)
    assert calls == [("embed", False), ("head", False), ("embed", True), ("head", False)]
    assert (tmp_path / "embed.safetensors").stat().st_mtime_ns == before
    assert artifact.identity(again.params) == artifact.identity(first.params)
    artifact.save(tmp_path / "artifact", model, again.params, records.folder)  # and they are its pieces
    for name in ("embed", "head"):
        piece = tmp_path / "artifact" / "weights" / f"{name}.safetensors"
        assert piece.stat().st_ino == (tmp_path / f"{name}.safetensors").stat().st_ino


def test_a_model_in_bfloat16_stays_in_bfloat16_and_is_stored_so(tokens, tmp_path):
    model = random_model(LLAMA, jnp.bfloat16)
    found = rounded(model, tokens, RULE)
    assert isinstance(found.params["embed"], Lookup)
    assert jax.eval_shape(lambda p: qjax.models.embed(p, tokens, LLAMA), found.params["embed"]).dtype == jnp.bfloat16
    wide = dataclasses.replace(model, params=jax.tree.map(lambda leaf: leaf.astype(jnp.float32), model.params))
    assert whole_model_bytes(wide.params) == whole_model_bytes(model.params)
    artifact.save(tmp_path / "a", wide, wide.params)
    again = artifact.load(tmp_path / "a")
    assert again.fingerprint == artifact.identity(wide.params)  # what is in memory has not changed
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(again.params))
    np.testing.assert_array_equal(again.params["embed"], wide.params["embed"])
    stored = sum(file.stat().st_size for file in (tmp_path / "a" / "weights").iterdir())
    assert stored < 1.3 * whole_model_bytes(wide.params)


def test_artifacts_of_format_2_are_read(tokens, tmp_path, monkeypatch):
    model = random_model(LLAMA, seed=3)
    with monkeypatch.context() as before:
        before.setattr("qjax.interchange.weights.narrowest", lambda array: {"": array})
        before.setattr(artifact, "FORMAT", "qjax-artifact-2")
        artifact.save(tmp_path / "a", model, model.params)
    about = json.loads((tmp_path / "a" / "model.json").read_text())
    assert about["format"] == "qjax-artifact-2"
    again = artifact.load(tmp_path / "a")
    assert again.fingerprint == artifact.identity(model.params)


def test_on_a_mesh_they_are_whole_on_every_device(tokens):
    model = random_model(LLAMA)
    params = rounded(model, tokens, RULE).params
    spread = distribute(params, LLAMA, MeshSettings().make(), packed=False)
    assert jax.tree.structure(spread["embed"]) == jax.tree.structure(params["embed"])
    np.testing.assert_allclose(forward(spread, tokens, LLAMA), forward(params, tokens, LLAMA), atol=1e-4)
    specs = jax.tree_util.tree_map_with_path(lambda path, leaf: _edge_spec("head", path, leaf, count=2), params["head"])
    assert set(jax.tree.leaves(specs, is_leaf=lambda spec: isinstance(spec, P))) == {P()}


@pytest.mark.parametrize("architecture", sorted(FAMILIES))
def test_every_family_looks_its_embedding_up_in_an_operator(architecture):
    """Through `qjax.models.linear.rows`; a family that indexes the table itself cannot have it quantised."""
    kind = FAMILIES.make(architecture).Config
    own = {"architecture": architecture, **SIZES, "embedding_size": SIZES["hidden_size"]}
    config = kind(**{field.name: own[field.name] for field in dataclasses.fields(kind) if field.name in own})
    params, edge = random_model(config).params, edge_matrices(config)["embed"]
    options = {"codebook": ("grid", 8), "rounding": "nearest", "incoherence": None, "key": 0}
    table, _ = qjax.quantize_matrix(edge_weight(params, edge), np.eye(edge.shape[1], dtype=np.float32), **options)
    index = np.array([[3, 95, 0]], np.int32)
    found = qjax.models.embed(with_edges(params, {"embed": table}, config)["embed"], index, config)
    dense_table = with_edges(params, {"embed": table.dequantize()}, config)["embed"]
    np.testing.assert_allclose(found, qjax.models.embed(dense_table, index, config), atol=1e-5)


TIED, UNTIED = edge_matrices(tied()), edge_matrices(LLAMA)
HEAD = RULE | {"pattern": "head", "bits": 8}


def test_one_matrix_has_one_rule():
    embed = RULE | {"pattern": "embed"}
    assert list(qjax.Recipe(rules=[HEAD]).edges(TIED)) == ["embed"]  # the head's rule is for both
    assert list(qjax.Recipe(rules=[embed, RULE]).edges(TIED)) == ["embed"]
    assert {name: plan.codebook.bits for name, plan in qjax.Recipe(rules=[HEAD, embed]).edges(UNTIED).items()} == {
        "embed": 4,
        "head": 8,
    }
    for rules in ([embed, HEAD], [{"pattern": "embed", "skip": True}, HEAD]):
        with pytest.raises(InputError, match=r"'embed' and 'head' say different things of one matrix.*give one rule"):
            qjax.Recipe(rules=rules).edges(TIED)
    assert qjax.Recipe(rules=[{"pattern": "embed|head", "skip": True}]).edges(TIED) == {}


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ({"pattern": "embed", "bits": 4}, "incoherence=hadamard mixes them; put incoherence: none"),
        (RULE | {"codebook": {"name": "trellis"}}, "codes 16 rows together; put codebook: {name: grid}"),
    ],
)
def test_an_embedding_whose_rows_cannot_be_looked_up_is_refused(rule, words):
    with pytest.raises(InputError, match=words):
        qjax.Recipe(rules=[rule]).edges(UNTIED)


def test_tuning_beside_them_is_refused(tokens):
    with pytest.raises(InputError, match="quantises the embedding or the head, and finetune is 'e2e'"):
        qjax.Recipe(rules=[RULE], finetune="e2e", hessian="original")
    model = random_model(LLAMA)
    params = rounded(model, tokens, RULE).params
    from qjax.data.stream import TokenStream
    from qjax.finetune import method_of
    from qjax.pipeline.options import named_options
    from qjax.pipeline.tuning import tuned

    method = method_of(named_options("finetune", "e2e"))
    with pytest.raises(InputError, match="embed and head of this model is quantised"):
        tuned(model, params, TokenStream.of(tokens, {}), method, seed=0)


def test_the_keys_are_those_of_the_names():
    """A matrix outside of the blocks draws its signs from its own name, as layers do."""
    model = random_model(LLAMA)
    own = np.random.default_rng(4).integers(0, 96, (4, 16)).astype(np.int32)
    rule = {"pattern": "head", "bits": 4, "codebook": {"name": "grid"}}
    found = rounded(model, own, rule, rounding="nearest").params["head"]
    hessian = head_hessian(LLAMA, model.params, own, batch=4)
    options = {"codebook": ("grid", 4), "rounding": "nearest", "incoherence": "hadamard", "name": "head"}
    alone, _ = qjax.quantize_matrix(model.params["head"], hessian, key=root_key(0), **options)
    np.testing.assert_array_equal(found.packed, alone.packed)
    assert with_edges(model.params, {"head": found}, LLAMA)["head"] is found
