"""What can be known of a kernel without its device: interpretation, lowering for it, and libtpu's compiler."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractMesh, AxisType

__all__ = ["compiled_for_tpu", "exported", "tpu_interpreter"]

TRITON_CALL = "__gpu$xla.gpu.triton"


@contextlib.contextmanager
def _abstract_gpu() -> Iterator[None]:
    """Lowering for CUDA asks which GPU it is for; jax from 0.11 on insists."""
    device = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu")
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def exported(platform: str, function: Callable[..., Any], *arguments: Any) -> str:
    """The module that `function` lowers to for "cuda" or "tpu": fails where Pallas' lowering to that platform does."""
    check = jax.export.DisabledSafetyCheck.custom_call(TRITON_CALL)
    specs = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arguments]
    with _abstract_gpu() if platform == "cuda" else contextlib.nullcontext():
        out = jax.export.export(jax.jit(function), platforms=[platform], disabled_checks=[check])(*specs)
    text = out.mlir_module()
    assert (TRITON_CALL if platform == "cuda" else "tpu_custom_call") in text
    return text


def tpu_interpreter(detect_races: bool = False) -> pltpu.InterpretParams:
    """TPU interpretation with the memories of a TPU, NaN wherever nothing was written."""
    return pltpu.InterpretParams(uninitialized_memory="nan", detect_races=detect_races)


def compiled_for_tpu(topology: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """`function` compiled by libtpu for the first device of a topology such as "v5e:2x2"; no TPU is needed."""
    from jax.experimental import topologies

    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    device = topologies.get_topology_desc(topology_name=topology, platform="tpu").devices[0]
    place = jax.sharding.SingleDeviceSharding(device)
    specs = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place) for a in arguments]
    return jax.jit(function).trace(*specs).lower().compile()
