"""Every kind of file that a run leaves, with a flipped bit or cut short: made again, or refused by name."""

import gc
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

import experiments._quantize as entry
from qjax.errors import ArtifactError, QjaxError, RunError
from qjax.interchange import artifact
from qjax.job.run import run
from qjax.runtime.sealed import read_sealed, write_sealed
from qjax.training.checkpoint import Checkpoints

SMALL = ["model=tiny", "data.calibration_sequences=2", "data.evaluation_sequences=1", "data.length=16", "tracker=none"]
SMALL += ["rounding=nearest", "incoherence=none", "hessian=original", "evaluate.sanity_perplexity=null"]


def task(root):
    GlobalHydra.instance().clear()
    with initialize_config_dir(entry.CONFIGS, version_base="1.3"):
        return entry.job_of(compose("quantize", [*SMALL, f"out={root / 'run'}", f"cache={root / 'cache'}"]))


def damaged(path, how, seed=0):
    content = bytearray(path.read_bytes() or b"surplus")  # an empty file gets a content
    at = int(np.random.default_rng(seed).integers(len(content)))
    if how == "flip":
        content[at] ^= 1 << (at % 8)
    path.write_bytes(content if how == "flip" else content[:at])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    run(task(root))
    return root


def sums(root):
    return json.loads((root / "run" / "artifact" / "model.json").read_text())["sha256"]


KINDS = ["cache/hessians/**/block_0001.safetensors", "cache/teachers/*.npy", "cache/teachers/*.json"]
KINDS += ["run/layers/layers.2.mlp.up_proj.safetensors", "run/results.json"]


@pytest.mark.parametrize("how", ["flip", "cut"])
@pytest.mark.parametrize("kind", KINDS)
def test_caches_records_and_results_are_made_again(whole, tmp_path, kind, how):
    root = tmp_path / "copy"
    shutil.copytree(whole, root)
    (file,) = root.glob(kind)
    before = file.read_bytes()
    damaged(file, how)
    results = root / "run" / "results.json"
    if kind != "run/results.json":
        results.unlink()
    if kind.startswith("cache/hessians"):
        shutil.rmtree(root / "run" / "layers")  # or nobody would read them
    run(task(root))
    assert sums(root) == sums(whole)
    if kind.startswith("cache"):
        assert file.read_bytes() == before
    assert read_sealed(results)["proxy_loss_mean"] == read_sealed(whole / "run" / "results.json")["proxy_loss_mean"]


@pytest.mark.parametrize("how", ["flip", "cut"])
def test_a_damaged_fingerprint_is_refused_while_there_are_records(whole, tmp_path, how):
    root = tmp_path / "copy"
    shutil.copytree(whole, root)
    damaged(root / "run" / "fingerprint.json", how)
    (root / "run" / "results.json").unlink()
    with pytest.raises(RunError, match="holds layer records without a readable fingerprint.json"):
        run(task(root))


def test_every_file_of_an_artifact_is_checked(whole, tmp_path):
    files = [path.relative_to(whole / "run" / "artifact") for path in (whole / "run" / "artifact").rglob("*")]
    files = [name for name in files if (whole / "run" / "artifact" / name).is_file()]
    assert {"model.json", "tokenizer.json", "checksums.json"} < {str(name) for name in files}
    copy = tmp_path / "artifact"
    for number, name in enumerate(files):
        for how in ("flip", "cut"):
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(whole / "run" / "artifact", copy)
            damaged(copy / name, how, seed=number)
            if (copy / name).read_bytes() == (whole / "run" / "artifact" / name).read_bytes():
                continue  # an empty file, cut to nothing
            with pytest.raises(ArtifactError, match=pathlib.PurePath(name).name):
                artifact.load(copy)
    shutil.rmtree(copy)
    shutil.copytree(whole / "run" / "artifact", copy)
    (copy / "weights" / "surplus").write_text("")
    with pytest.raises(ArtifactError, match="'weights/surplus'. are missing or surplus"):
        artifact.load(copy)


# Orbax abandons the reads that follow a failed one; when they are collected, their event loop is closed already.
@pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")
def test_a_damaged_checkpoint_of_tuning_falls_back_to_the_one_before(tmp_path):
    state = {"a": jax.device_put(np.arange(64, dtype=np.float32)), "b": jax.device_put(np.float32(1))}
    store = Checkpoints(tmp_path / "f", "task")
    for step in (1, 2):
        store.save(step, state, {"step": step})
    store.close()
    store = Checkpoints(tmp_path / "f", "task")
    found = store.restore(state)
    assert found is not None and found[1] == {"step": 2} and np.array_equal(found[0]["a"], state["a"])
    newest = sorted(path for path in (tmp_path / "f" / "steps").iterdir() if path.is_dir())[-1]
    for file in newest.rglob("*"):
        if file.is_file() and file.stat().st_size > 8 and "d" in file.parts:
            damaged(file, "cut")
    found = store.restore(state)
    assert found is not None and found[1] == {"step": 1}
    store.close()
    gc.collect()  # here, and not in a test to come
    (tmp_path / "f" / "task.json").write_text("{")
    store = Checkpoints(tmp_path / "f", "task")
    assert store.restore(state) is None  # from the beginning
    store.close()
    with pytest.raises(RunError, match="holds the fine-tuning of another"):
        Checkpoints(tmp_path / "f", "other")


def test_sealed_objects(tmp_path):
    path = tmp_path / "x.json"
    assert write_sealed(path, {"a": 1.5, "b": [None]}) == read_sealed(path)
    path.write_text(path.read_text().replace("1.5", "2.5"))
    with pytest.raises(ArtifactError, match=r"x.json: damaged: it does not match its own SHA-256"):
        read_sealed(path)
    path.write_text("[]")
    with pytest.raises(QjaxError, match="x.json holds list, not an object"):
        read_sealed(path)
