"""Eight devices give what one gives: Hessians, sketches, codes; and exchange no more than they must."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow  # compiles some forty programs
SCRIPT = pathlib.Path(__file__).with_name("on_eight_devices.py")
# In the last place of float32, as fractions of the largest entry: the order of the sums differs.
CLOSE = 1e-6


@pytest.fixture(scope="module")
def found(once):
    return once("eight", tell)


def tell(folder):
    file = folder / "found.json"
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-W", "error", str(SCRIPT), str(file)], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    return json.loads(file.read_text())


def test_the_mesh_has_eight_devices_and_no_more(found):
    assert found["devices"] == [8, 8]
    assert "mesh.data=3 mesh.model=4 asks for 12 devices and there are 8" in found["too many"]


def test_hessians_are_those_of_one_device(found):
    assert found["moments"].keys() == {"1x1", "3x1", "4x2", "8x1"}
    assert found["moments"]["1x1"] == 0  # the same program
    assert max(found["moments"].values()) <= CLOSE and found["two streams"] <= CLOSE
    assert found["moments tokens"]
    assert found["outputs"] <= 1e-5  # activations of order 1, computed in another batch


def test_hessians_are_symmetric_to_the_last_bit(found):
    assert found["symmetric"].keys() == {"1x1", "3x1", "4x2", "8x1", "two streams", "sketch_a", "sketch_b"}
    assert all(found["symmetric"].values())


def test_the_same_mesh_gives_the_same_bits(found):
    assert found["moments twice"]


def test_adding_exchanges_nothing_and_every_factor_is_reduced_once(found):
    """Read from the compiled programs."""
    assert found["adding moments"] == found["adding a sketch"] == found["forward"] == []
    small = ["all-reduce", "u32[8]"]  # the first sequence that is not finite, of all sites
    sites = [["all-reduce", f"f32[{n},{n}]"] for n in (32, 32, 32, 48)]
    assert sorted(found["reducing moments"]) == sorted([*sites, *sites, small])
    shapes = [(32, 32), (16, 32), (16, 32), (32, 32), (48, 32), (48, 32), (32, 48)]
    factors = [["all-reduce", f"f32[{n},{n}]"] for shape in shapes for n in shape]
    assert sorted(found["reducing a sketch"]) == sorted([*factors, ["all-reduce", "u32[7]"]])


@pytest.mark.parametrize("name", ["sketch_a", "sketch_b"])
def test_sketches_are_those_of_one_device(found, name):
    """Also a test of the labels: one that depends on the device would change whole gradients."""
    assert found[name] <= 2e-5  # gradients of activations that differ in their last bits


def test_all_devices_fail_for_a_value_that_is_not_finite(found):
    assert "layers.1.self_attn.q_proj: its inputs" in found["not finite"]
    assert "first in sequence 5" in found["not finite"]


@pytest.mark.parametrize("name", ["ldlq", "gptq", "quip_sharp", "qtip", "stochastic"])
def test_codes_do_not_depend_on_where_rows_are_rounded(found, name):
    """Codes, scales and signs bit for bit; what is reported up to the order of a sum."""
    assert found[f"rows {name}"] == {"identical": True, "reports": {}}


def test_yaqa_over_devices_is_yaqa_on_one(found):
    assert found["yaqa"] and found["yaqa reports"]
