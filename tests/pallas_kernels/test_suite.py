"""The suite for lent devices, on this machine: its checks can fail, its record is whole, it needs jax alone."""

import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import pytest

from pallas_kernels import tuned
from pallas_kernels.bench import Settings, cases, checks, lines, rooflines, run, suite, timing, tuning
from pallas_kernels.dequant_matmul import dequantize
from pallas_kernels.dequant_matmul.specs import Spec

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture
def few(monkeypatch):
    """One check of each operation."""
    chosen = {}
    for what, check in suite.checks():
        chosen.setdefault(what.split()[0], (what, check))
    monkeypatch.setattr(suite, "checks", lambda: iter(chosen.values()))
    kinds = ("viterbi", "gram", "hadamard", "scalar")
    some = lambda s, limits, own=suite.benches: [b for b in own(s, limits) if b[0].startswith(kinds)][:4]  # noqa: E731
    monkeypatch.setattr(suite, "benches", some)


@pytest.mark.slow
def test_the_record_of_a_quick_run(few, tmp_path):
    out = tmp_path / "kernels.json"
    record = run(Settings(quick=True, ring_bytes=1 << 16, out=out))
    assert json.loads(out.read_text()) == json.loads(json.dumps(record))
    assert record["failed"] == record["left_out"] == [] and len(record["checks"]) == 4
    assert all(check["implementation"] == "xla" and check["error"] < check["limit"] for check in record["checks"])
    assert any(check["error"] > 0 for check in record["checks"])
    assert record["rooflines"]["bytes_per_second"] > 1e8 and record["rooflines"]["integer_ops_per_second"] > 1e7
    products = [result for result in record["benches"] if result["op"] == "dequant_matmul"]
    assert len(products) == 1
    for result in products:
        assert result["speedup_over_dense"] == pytest.approx(
            result["dense"]["microseconds_median"] / result["kernel"]["microseconds_median"]
        )
        assert result["of_roofline"] > 0
        assert result["instructions"]["budget_per_weight"] > 0 and result["instructions"]["per_weight"]["kernel"]
    assert all(result["measured_on"].endswith(f"jax {record['jax']}") for result in record["benches"])
    headers, rows = lines(record)
    assert len(rows) == len(record["benches"]) == 4 and all(len(row) == len(headers) for row in rows)


def test_a_wrong_kernel_and_one_that_raises_are_named(monkeypatch, capsys):
    def broken():
        raise ValueError("does not lower")

    monkeypatch.setattr(suite, "checks", lambda: iter([("bad", lambda: ("xla", 0.5, 1e-5)), ("worse", broken)]))
    monkeypatch.setattr(suite, "benches", lambda *_: iter([("none", broken)]))
    record = run(Settings(quick=True))
    assert [f["what"] for f in record["failed"]] == ["bad", "worse", "none"]
    assert record["failed"][1]["reason"] == "ValueError: does not lower"
    assert "FAILED bad: xla, error 5.00e-01" in capsys.readouterr().out
    assert checks.error([1.0, jnp.nan], [1.0, 2.0]) == float("inf")


def test_what_time_forbids_is_listed(few):
    record = run(Settings(seconds=0, quick=True))
    assert len(record["left_out"]) == 8 and not record["checks"] and not record["benches"]


@pytest.mark.parametrize("code", [None, "mul1", "hyb", "e8p"])
def test_random_matrices_have_the_scale_of_weights(code):
    weight = cases.packed(Spec(2, 1, 128, 512, None, code), suite.jax.random.key(0))
    dense = dequantize(weight)
    assert bool(jnp.isfinite(dense).all()) and 0.2 < float(jnp.std(dense)) * 512**0.5 < 4


def test_operations_of_a_decoder_are_counted():
    plain = rooflines.decode_ops(cases.packed(Spec(4, 1, 128, 512), suite.jax.random.key(0)))
    assert 1 <= plain["integer_ops_per_weight"] <= 2 and plain["gather_ops_per_weight"] == 0  # a shift and a mask
    assert rooflines.row_ops(cases.packed(Spec(4, 1, 128, 512), suite.jax.random.key(0)))["integer_ops_per_weight"] == 2
    generic, rows = (
        f(cases.packed(Spec(2, 1, 128, 512, None, "3inst"), suite.jax.random.key(0)))["integer_ops_per_weight"]
        for f in (rooflines.decode_ops, rooflines.row_ops)
    )
    assert rows < generic / 2  # float16 sums and windows shared by the states that begin in them
    trellis = rooflines.decode_ops(cases.packed(Spec(2, 1, 128, 512, None, "1mad"), suite.jax.random.key(0)))
    assert trellis["integer_ops_per_weight"] > plain["integer_ops_per_weight"] + 5
    lattice = rooflines.decode_ops(cases.packed(Spec(2, 1, 128, 512, None, "e8p"), suite.jax.random.key(0)))
    assert lattice["gather_ops_per_weight"] == 1 / 8


def test_calls_of_a_timing_loop_are_counted_and_none_is_dropped():
    ticks = iter([0.0, 1.0, 10.0, 14.0, 20.0, 22.0])
    weights = [jnp.ones((4, 4)), 2 * jnp.ones((4, 4))]
    found = timing.chained(
        jnp.matmul, jnp.ones((1, 4)), weights, expected=1.0, least_seconds=6.0, repeats=2, clock=lambda: next(ticks)
    )
    assert (found.calls, found.seconds, found.median) == (6, (4 / 6, 2 / 6), 0.5) and found.compile_seconds == 1.0
    assert len(timing.ring(lambda key: key, 10, 35)) == 4


@pytest.mark.parametrize(
    ("spec", "integer", "other"),
    [
        (Spec(2, 1, 1024, 512), 1 + 1 / 16, 2),  # a masked `or`, a sixteenth of a shift; a difference, a product added
        (Spec(4, 1, 1024, 512), 1 + 1 / 8, 2),
        (Spec(2, 1, 1024, 512, None, "mul1"), 4.53, 3),  # shift, mask, product, bytes; float16, conversion, product
    ],
)
def test_instructions_of_the_triton_kernel_are_counted(spec, integer, other):
    x = suite.jax.ShapeDtypeStruct((spec.batch, spec.inner), jnp.bfloat16)
    found = rooflines.kernel_ops(x, tuning.packed_shape(spec))
    assert found["integer_ops_per_weight"] == pytest.approx(integer, abs=0.01)
    assert found["other_ops_per_weight"] == other and found["gather_ops_per_weight"] == 0


def test_a_profile_without_a_gpu_is_empty():
    weights = [jnp.eye(4), jnp.eye(4)]
    timed = timing.chained(jnp.matmul, jnp.ones((1, 4)), weights, expected=1.0, least_seconds=0.0, repeats=1)
    assert timing.busy_seconds({"product": timed}) == {}


@pytest.mark.slow
def test_processes_share_the_work_and_one_record(tmp_path):
    before = {name: getattr(suite.jax.config, name) for name in suite._CACHE}
    record = run(Settings(seconds=0.0, quick=True, out=tmp_path / "kernels.json", processes=2))
    assert before == {name: getattr(suite.jax.config, name) for name in suite._CACHE}
    every = [what for what, _ in suite.checks()]
    assert set(every) <= set(record["left_out"])
    assert not record["failed"] and not record["checks"]
    assert json.loads((tmp_path / "kernels.json").read_text())["left_out"] == record["left_out"]


def test_threads_keep_the_order_and_what_was_raised():
    def quotient(n):
        return 12 // n

    for threads in (0, 1, 3):
        first, second, third = timing.in_threads([functools.partial(quotient, n) for n in (4, 0, 3)], threads)
        assert (first, third) == (3, 4) and isinstance(second, ZeroDivisionError)


def test_tuned_sizes_are_stored_and_found(tmp_path, monkeypatch):
    path = tmp_path / "tuned.json"
    tuned.store("op", {"a": {"tile": 32}}, "Some GPU", path)
    tuned.store("op", {"b": {"tile": 128}}, "Some GPU", path)
    monkeypatch.setattr(tuned, "load", lambda own=tuned.load.__wrapped__: own(path))
    assert tuned.blocks("op", "a", {"tile": 64, "warps": 4}, "Some GPU") == {"tile": 32, "warps": 4}
    assert tuned.blocks("op", "c", {"tile": 64}, "Some GPU") == tuned.blocks("op", "a", {"tile": 64}) == {"tile": 64}
    path.write_text('{"Some GPU": {"op": {"a": {"tile": 0}}}}')
    with pytest.raises(ValueError, match=r"tuned.json: blocks \{'tile': 0\} are not positive"):
        tuned.blocks("op", "a", {"tile": 64}, "Some GPU")


def test_tuning_takes_the_fastest_and_survives_what_does_not_compile(capsys):
    def prepare(blocks):
        if blocks["tile"] == 8:
            raise ValueError("too small")
        seconds = {16: 3e-6, 32: 1e-6, 64: 2e-6}
        return lambda: seconds[blocks["tile"]]  # 128: a KeyError of what was prepared, when it runs

    candidates = [{"tile": tile} for tile in (8, 16, 32, 64, 128)]
    later = timing.time.monotonic() + 1e6
    assert tuning.fastest(candidates, prepare, later, "op") == ({"tile": 32}, 1e-6)
    printed = capsys.readouterr().out
    assert "tune op {'tile': 8}: ValueError" in printed and "tune op {'tile': 128}: KeyError" in printed
    assert tuning.fastest(candidates, prepare, 0.0, "op") == ({}, float("inf"))
    seconds = {
        "a": {"mosaic_gpu": 1.0, "pallas_gpu": 2.0},
        "b": {"mosaic_gpu": 2.0, "pallas_gpu": 1.0},
        "c": {"mosaic_gpu": 1.0},
    }
    assert tuning.mosaic_first(seconds) == {"a": {"mosaic_gpu": 1}}  # of c only one is known
    assert tuning.tune(1 << 10, 0.0, later) == {}  # nothing to tune on a CPU


def test_the_script_needs_jax_alone(tmp_path):
    """Without qjax, jaxtyping and pytest: the stand-in for annotations is enough for all that the suite imports."""
    hidden = "import sys; sys.modules.update(dict.fromkeys(['qjax', 'flax', 'hydra', 'beartype', 'pytest']))\n"
    program = hidden + "import pallas_kernels.bench.__main__, jaxtyping; print(jaxtyping.__file__)"
    paths = os.pathsep.join([str(REPOSITORY / "scripts" / "stand_ins"), str(REPOSITORY)])
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "stand_ins" in done.stdout
    for name in ("gpu", "tpu"):
        assert subprocess.run(["bash", "-n", REPOSITORY / "scripts" / f"{name}_suite.sh"]).returncode == 0
    assert dataclasses.fields(Settings)
