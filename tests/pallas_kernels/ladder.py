"""What can be known of a kernel without its device: interpretation, lowering for it, and libtpu's compiler."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import pytest
from jax.experimental import pallas as pl
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractMesh, AxisType

__all__ = ["compiled_for_tpu", "exported", "hbm_bytes", "tpu_interpreter"]

TRITON_CALL = "__gpu$xla.gpu.triton"


_DEVICES = {"cuda": ("NVIDIA H100 80GB HBM3", 132), "tpu": ("TPU v5 lite", 1), "v6e": ("TPU v6 lite", 1)}


@contextlib.contextmanager
def _device(name: str) -> Iterator[None]:
    """Lowering asks for the kind of its device and its number of cores."""
    device = jax.sharding.AbstractDevice(*_DEVICES[name], "gpu" if name == "cuda" else "tpu")
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def exported(platform: str, function: Callable[..., Any], *arguments: Any) -> str:
    """The module that `function` lowers to for "cuda" or "tpu": fails where Pallas' lowering to that platform does."""
    check = jax.export.DisabledSafetyCheck.custom_call(TRITON_CALL)
    specs = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), arguments)
    with _device(platform):
        out = jax.export.export(jax.jit(function), platforms=[platform], disabled_checks=[check])(*specs)
    text = out.mlir_module()
    assert (TRITON_CALL if platform == "cuda" else "tpu_custom_call") in text
    return text


def tpu_interpreter(detect_races: bool = False) -> pltpu.InterpretParams:
    """TPU interpretation with the memories of a TPU, NaN wherever nothing was written."""
    return pltpu.InterpretParams(uninitialized_memory="nan", detect_races=detect_races)


@contextlib.contextmanager
def _without_cache() -> Iterator[None]:
    """No persistent compilation cache: a program for a device that is absent can be stored and not be read."""
    enabled = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        reset_cache()


def compiled_for_tpu(topology: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """`function` compiled by libtpu for the first device of a topology such as "v5e:2x2"; no TPU is needed."""
    from jax.experimental import topologies

    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    device = topologies.get_topology_desc(topology_name=topology, platform="tpu").devices[0]
    place = jax.sharding.SingleDeviceSharding(device)
    specs = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), arguments)
    with _device("v6e" if topology.startswith("v6e") else "tpu"), _without_cache():
        return jax.jit(function).trace(*specs).lower().compile()


def hbm_bytes(function: Callable[..., Any], *arguments: Any) -> int:
    """Bytes that the kernels of `function` move between device memory and chip, from their grids and block specs.

    A block moves when its index differs from that of the grid step before, the last grid axis running fastest.
    """
    total = 0
    original = pl.pallas_call

    def recorded(kernel: Any, **options: Any) -> Any:
        def call(*operands: Any) -> Any:
            nonlocal total
            specs = [*options["in_specs"], *jax.tree.leaves(options["out_specs"])]
            arrays = [*operands, *jax.tree.leaves(options["out_shape"])]
            for spec, array in zip(specs, arrays, strict=True):
                size = math.prod(n or 1 for n in spec.block_shape) * array.dtype.itemsize
                indices = (spec.index_map(*step) for step in itertools.product(*map(range, options["grid"])))
                total += size * sum(1 for _ in itertools.groupby(indices))
            return original(kernel, **options)(*operands)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pl, "pallas_call", recorded)
        jax.eval_shape(function, *arguments)
    return total
