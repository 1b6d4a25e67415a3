"""What can be known of a kernel without its device: interpretation, lowering for it, and libtpu's compiler."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractMesh, AxisType

__all__ = [
    "compiled_for_gpu",
    "compiled_for_tpu",
    "exported",
    "gpu_interpreter",
    "hbm_bytes",
    "mosaic_bytes",
    "races_found",
    "tpu_interpreter",
]

TRITON_CALL = "__gpu$xla.gpu.triton"
MOSAIC_CALL = "mosaic_gpu_v2"

_DEVICES = {"cuda": ("NVIDIA H100 80GB HBM3", 132), "tpu": ("TPU v5 lite", 1), "v6e": ("TPU v6 lite", 1)}


@contextlib.contextmanager
def _device(name: str) -> Iterator[None]:
    """Lowering asks for the kind of its device and its number of cores."""
    device = jax.sharding.AbstractDevice(*_DEVICES[name], "gpu" if name == "cuda" else "tpu")
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def exported(platform: str, function: Callable[..., Any], *arguments: Any, call: str | None = None) -> str:
    """The module that `function` lowers to for "cuda" or "tpu": fails where Pallas' lowering to that platform does.

    `call` is what the kernel is called by, Triton's or the TPU's unless told otherwise.
    """
    check = jax.export.DisabledSafetyCheck.custom_call(TRITON_CALL)
    specs = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), arguments)
    with _device(platform):
        out = jax.export.export(jax.jit(function), platforms=[platform], disabled_checks=[check])(*specs)
    text = out.mlir_module()
    assert (call or (TRITON_CALL if platform == "cuda" else "tpu_custom_call")) in text
    return text


def tpu_interpreter(detect_races: bool = False) -> pltpu.InterpretParams:
    """TPU interpretation with the memories of a TPU, NaN wherever nothing was written."""
    return pltpu.InterpretParams(uninitialized_memory="nan", detect_races=detect_races)


def races_found(interpreter: Any) -> bool:
    """Whether the last kernel run by an interpreter that detects races had one: of itself it only prints that."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as of_tpu
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as of_gpu

    assert interpreter.detect_races
    state = of_tpu.races if isinstance(interpreter, pltpu.InterpretParams) else of_gpu.get_races()
    assert state is not None
    return state.races_found


def gpu_interpreter(detect_races: bool = False) -> Any:
    """Interpretation of Mosaic GPU kernels with the memories, copies and barriers of a GPU, NaN where unwritten."""
    try:
        from jax.experimental.pallas.mosaic_gpu import InterpretGPUParams  # public from jax 0.11
    except ImportError:
        from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
    return InterpretGPUParams(uninitialized_memory="nan", detect_races=detect_races)


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


_H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 } core_count: 132 fpus_per_core: 128 threads_per_warp: 32
  threads_per_block_limit: 1024 threads_per_core_limit: 2048 registers_per_core_limit: 65536
  registers_per_block_limit: 65536 shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472 l2_cache_size: 52428800 memory_bandwidth: 3352320000000 clock_rate_ghz: 1.98
  device_memory_size: 84929347584 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
}
runtime_version { major: 13 }
dnn_version_info { major: 9 minor: 7 }
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
"""
"""What XLA's compiler asks of a GPU."""


def compiled_for_gpu(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function` compiled for an H100 down to machine code, Triton's kernels and Mosaic's; no GPU is needed."""
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(
        topology_name="h100", platform="cuda", target_config=_H100, topology="1x1x1"
    )
    place = jax.sharding.SingleDeviceSharding(topology.devices[0])
    checks = [jax.export.DisabledSafetyCheck.custom_call(name) for name in (TRITON_CALL, MOSAIC_CALL)]
    specs = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), arguments)
    with _device("cuda"):
        lowered = jax.export.export(jax.jit(function), platforms=["cuda"], disabled_checks=checks)(*specs)
    specs = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), arguments)
    with _without_cache():
        return jax.jit(lowered.call).trace(*specs).lower(lowering_platforms=("cuda",)).compile()


def hbm_bytes(function: Callable[..., Any], *arguments: Any) -> int:
    """Bytes that the kernels of `function` move between device memory and chip, from their grids and block specs.

    A block moves when its index differs from that of the grid step before, the last grid axis running fastest.
    """
    total = 0

    def recorded(kernel: Any, **options: Any) -> Any:
        def call(*operands: Any) -> Any:
            nonlocal total
            specs = [*options["in_specs"], *jax.tree.leaves(options["out_specs"])]
            arrays = [*operands, *jax.tree.leaves(options["out_shape"])]
            for spec, array in zip(specs, arrays, strict=True):
                size = math.prod(n or 1 for n in spec.block_shape) * array.dtype.itemsize
                indices = (spec.index_map(*step) for step in itertools.product(*map(range, options["grid"])))
                total += size * sum(1 for _ in itertools.groupby(indices))
            # what the kernel computes is for other tests: its body is not traced
            return jax.tree.map(lambda own: jnp.zeros(own.shape, own.dtype), options["out_shape"])

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pl, "pallas_call", recorded)
        jax.eval_shape(function, *arguments)
    return total


_SHARED_OPERAND = 1 << 20
"""Bytes of an operand that stays in a GPU's second cache after its first reading, tens of times as large."""


def mosaic_bytes(function: Callable[..., Any], *arguments: Any, uniform: bool = False) -> int:
    """Bytes that the Mosaic GPU kernel of `function` moves between device memory and chip.

    The kernel's body runs as plain Python once for every program of the grid, on references that only have shapes: what
    it and its pipelines copy is added up. An operand of at most 1 MiB counts once, however many programs read it.
    `uniform`: all programs do the same, so that one is run and multiplied.
    """
    read: dict[Any, int] = {}
    written = 0

    def reference(name: Any, shape: Any, dtype: Any) -> Any:
        own = mock.MagicMock(shape=tuple(shape), dtype=dtype, label=name)
        own.at.__getitem__.return_value = own  # a slice of it is itself: sizes are taken from the other side of a copy
        own.__getitem__.return_value = jnp.zeros(shape, dtype)
        return own

    def copied_in(source: Any, shape: Any) -> None:
        size = math.prod(n or 1 for n in shape) * jnp.dtype(source.dtype).itemsize
        read[source.label] = read.get(source.label, 0) + size

    def copied_out(source: Any, _: Any) -> None:
        nonlocal written
        written += math.prod(source.shape) * jnp.dtype(source.dtype).itemsize

    def pipeline(_: Any, grid: Any, in_specs: Any, **__: Any) -> Any:
        def run(*operands: Any) -> None:
            for spec, operand in zip(in_specs, operands, strict=True):
                for _ in range(math.prod(grid)):  # every step fetches every block
                    copied_in(operand, spec.block_shape)

        return run

    def kernel(body: Any, out_type: Any, grid: Any, grid_names: Any, scratch_types: Any, **_: Any) -> Any:
        def call(*operands: Any) -> Any:
            nonlocal written
            ins = [reference(i, a.shape, a.dtype) for i, a in enumerate(operands)]
            scratch = {
                name: reference(name, getattr(t, "shape", ()), getattr(t, "dtype", jnp.int32))
                for name, t in scratch_types.items()
            }
            out = reference("out", out_type.shape, out_type.dtype)
            programs = list(itertools.product(*map(range, grid)))
            for at in programs[:1] if uniform else programs:
                names = dict(zip(grid_names, at, strict=True))
                with pytest.MonkeyPatch.context() as inner:
                    inner.setattr(jax.lax, "axis_index", lambda name, names=names: names[name])
                    inner.setattr(jax.lax, "axis_size", lambda name: grid[grid_names.index(name)])
                    inner.setattr(jax.lax, "fori_loop", _python_loop)
                    inner.setattr(jax.lax, "div", lambda a, b: a // b)
                    body(*ins, out, **scratch)
            times = len(programs) if uniform else 1
            written *= times
            for label, operand in enumerate(operands):
                size = operand.size * operand.dtype.itemsize
                own = times * read.get(label, 0)
                read[label] = size if own > size and size <= _SHARED_OPERAND else own
            return jnp.zeros(out_type.shape, out_type.dtype)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plgpu, "kernel", kernel)
        patch.setattr(plgpu, "emit_pipeline", pipeline)
        patch.setattr(plgpu, "copy_gmem_to_smem", lambda source, target, _: copied_in(source, target.shape))
        patch.setattr(plgpu, "copy_smem_to_gmem", copied_out)
        for name in ("commit_smem", "wait_smem_to_gmem", "wgmma", "wgmma_wait", "barrier_wait"):
            patch.setattr(plgpu, name, lambda *_, **__: None)
        patch.setattr(pl, "run_scoped", lambda f, acc: f(reference("accumulator", acc.shape, jnp.float32)))
        jax.eval_shape(function, *arguments)
    return sum(read.values()) + written


def _python_loop(start: int, stop: Any, body: Callable[..., Any], carry: Any) -> Any:
    for i in range(int(start), int(stop)):
        carry = body(i, carry)
    return carry
