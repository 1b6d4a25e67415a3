"""Real processes over gloo: the run of one process, killed and continued by another number of them, in one folder."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import safetensors.numpy

from qjax.interchange import artifact

pytestmark = pytest.mark.slow
MODEL = pathlib.Path(__file__).parents[1] / "fixtures" / "models" / "llama3"
SETTINGS = [
    "model=hf",
    f"model.source={MODEL}",
    "data=tokens",
    "hessian=original",
    "rounding=ldlq",
    "codebook=half_integer",
    "bits=2",
    "incoherence=none",
    "tracker=none",
    "evaluate.sanity_perplexity=null",  # random weights
    "data.calibration_sequences=10",
    "data.evaluation_sequences=2",
    "data.length=16",
    "hessian.batch=2",
]
PATIENCE = ["distributed.start_s=200", "distributed.heartbeat_s=10"]
TUNING = [
    "mesh=all",
    "finetune=e2e",
    "finetune.tokens=256",
    "finetune.sequences=8",
    "finetune.validation=2",
    "finetune.batch=2",
    "finetune.validate_every=2",
    "finetune.checkpoint_every=2",
]


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(out, cache, processes, *overrides):
    """`processes` of experiments.quantize that form a group (one: a plain run)."""
    mesh = ["mesh=all"] if processes > 1 else []
    return group("quantize", processes, 1, *SETTINGS, f"out={out}", f"cache={cache}", *overrides, *mesh)


def group(program, processes, devices, *words):
    """`processes` with `devices` each that run `experiments.<program> <words>`, as a group where there are several."""
    port = free_port()
    together = [f"distributed.coordinator=127.0.0.1:{port}", f"distributed.processes={processes}", *PATIENCE]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    return [
        subprocess.Popen(
            [sys.executable, "-m", f"experiments.{program}", *words]
            + ([*together, f"distributed.process={index}"] if processes > 1 else []),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        for index in range(processes)
    ]


def ended(processes, timeout=300):
    """(exit codes, outputs)."""
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], outputs


def codes(out):
    """The arrays of all records, in the order of their names."""
    files = sorted((pathlib.Path(out) / "layers").glob("*.safetensors"))
    return {file.name: safetensors.numpy.load_file(file) for file in files}


def same(a, b):
    assert a.keys() == b.keys() and a
    for name, arrays in a.items():
        assert arrays.keys() == b[name].keys()
        for key, array in arrays.items():
            np.testing.assert_array_equal(array, b[name][key], err_msg=f"{name} {key}")


def hessians(cache):
    """The stored Hessians, by block."""
    (folder,) = (path for path in (pathlib.Path(cache) / "hessians").iterdir() if path.is_dir())
    return {file.name: safetensors.numpy.load_file(file) for file in sorted(folder.glob("block_*.safetensors"))}


def wait_for(condition, processes, timeout=300):
    """Until `condition()` holds or a process ends."""
    deadline = time.monotonic() + timeout
    while not condition() and all(process.poll() is None for process in processes):
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.02)
    return condition()


@pytest.fixture(scope="module")
def story(once):
    return once("processes", tell)


def tell(folder):
    """One process from start to end; four, one of them killed; two that go on; one with the Hessians of the four."""
    np.save(folder / "tokens.npy", np.random.default_rng(0).integers(0, 64, 400).astype(np.int32))
    data = f"data.path={folder / 'tokens.npy'}"
    alone, cache, out = folder / "alone", folder / "cache", folder / "out"
    found = {"folder": str(folder)}
    found["alone"] = ended(start(alone / "run", alone / "cache", 1, data))

    four = start(out, cache, 4, data)
    found["began"] = wait_for(lambda: any((out / "layers").glob("layers.0.*.safetensors")), four)
    four[2].send_signal(signal.SIGKILL)
    found["four"] = ended(four)
    found["finished early"] = (out / "results.json").exists()
    found["two"] = ended(start(out, cache, 2, data))
    found["reference"] = ended(start(folder / "reference", cache, 1, data))
    return found


def test_the_end_of_one_process_ends_all_and_says_so(story):
    codes, outputs = story["four"]
    assert story["began"], outputs
    assert codes[2] == -signal.SIGKILL and all(code != 0 for code in codes), (codes, outputs)
    assert not story["finished early"]
    for index in (0, 1, 3):
        # the broken connection, or JAX's own end of a process whose peer shows no sign of life
        lost = "another process is gone or cannot be reached" in outputs[index]
        assert lost or "indicates that another task died" in outputs[index], outputs[index]
        assert "the same command, in any number of processes, continues" in outputs[index]


def test_another_number_of_processes_goes_on_to_the_codes_of_one(story):
    """From the same Hessians, which the four had stored: bit for bit."""
    for name in ("two", "reference"):
        assert set(story[name][0]) == {0}, story[name]
    folder = pathlib.Path(story["folder"])
    out, reference = folder / "out", folder / "reference"
    same(codes(out), codes(reference))
    results = [json.loads((folder / "results.json").read_text()) for folder in (out, reference)]
    for key in ("proxy_loss_mean", "kl_mean", "perplexity", "bits_per_weight"):
        assert results[0][key] == pytest.approx(results[1][key], rel=1e-6), key
    assert (results[0]["device"]["processes"], results[1]["device"]["processes"]) == (2, 1)


def test_hessians_of_four_processes_are_those_of_one(story):
    folder = pathlib.Path(story["folder"])
    one, four = hessians(folder / "alone" / "cache"), hessians(folder / "cache")
    assert one.keys() == four.keys() and len(one) == 2
    for name, sites in one.items():
        for site, triangle in sites.items():
            assert np.max(np.abs(four[name][site] - triangle)) <= 1e-6 * np.max(np.abs(triangle)), (name, site)


def test_one_process_speaks(story):
    codes, (leader, other) = story["two"]
    assert codes == [0, 0]
    assert "bits per weight" in leader and "bits per weight" not in other and "quantise" not in other


def test_tuning_and_tensor_parallel_evaluation_of_two_processes_are_those_of_two_devices(tmp_path):
    """Parameters and batches shared out among processes, one of which is killed; then a model cut into two parts."""
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(0, 64, 2000).astype(np.int32))
    words = [*SETTINGS, f"data.path={tmp_path / 'tokens.npy'}", *TUNING]
    for name, processes in (("one", 1), ("two", 2)):
        out, own = tmp_path / name, [*words, f"out={tmp_path / name}", f"cache={tmp_path / name}-cache"]
        if processes == 2:
            killed = group("quantize", processes, 1, *own)
            assert wait_for(lambda out=out: (out / "finetune" / "steps" / "2").exists(), killed)
            killed[1].send_signal(signal.SIGKILL)
            ended(killed)
            assert not (out / "results.json").exists()
        codes, outputs = ended(group("quantize", processes, 2 // processes, *own))
        assert set(codes) == {0}, outputs
    one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two"))
    assert one["finetune"]["history"] == two["finetune"]["history"] and one["kl_mean"] == two["kl_mean"]
    assert one["finetune"]["validation_after"] < one["finetune"]["validation_before"]
    ours, theirs = (artifact.load(tmp_path / name / "artifact") for name in ("two", "one"))
    assert ours.fingerprint == theirs.fingerprint
    words = [f"artifact={tmp_path / 'two' / 'artifact'}", f"cache={tmp_path / 'e'}", f"out={tmp_path / 'e.json'}"]
    codes, outputs = ended(group("evaluate", 2, 1, *words, "mesh.data=1", "mesh.model=2"))
    assert set(codes) == {0}, outputs
    assert "kl_mean" in outputs[0] and "kl_mean" not in outputs[1]
    evaluated = json.loads((tmp_path / "e.json").read_text())
    for key in ("kl_mean", "perplexity", "perplexity_reference"):
        assert evaluated[key] == pytest.approx(two[key], rel=1e-5), key
