"""Choice of the implementation of an operation: the first that can run on the backend, always ending in XLA.

On a GPU there are two kernels of some operations, "pallas_gpu" (Triton) and "mosaic_gpu". With `implementation=None`
Triton's runs where this jax has that backend and the kernel takes the shapes, for it runs on all GPUs since Ampere, and
for products it is two to three times faster on an H200; then Mosaic's, which needs Hopper. What
`python -m pallas_kernels.bench --tune` finds on a kind of device, kept in `tuned.json`, puts Mosaic first for that
device, code and shape: on an H200 it does for Hadamard transforms.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

import jax

__all__ = ["IMPLEMENTATIONS", "KernelError", "backend", "choose", "disabled", "runnable"]

IMPLEMENTATIONS = ("pallas_gpu", "mosaic_gpu", "pallas_tpu", "xla")
"""All names that `implementation` takes."""

_BACKENDS = {"pallas_gpu": ("gpu", "cuda"), "mosaic_gpu": ("gpu", "cuda"), "pallas_tpu": ("tpu",)}


class KernelError(ValueError):
    """A kernel cannot run what it was asked to: the message has the reason."""


def disabled() -> bool:
    """Whether `QJAX_DISABLE_KERNELS` forbids all kernels."""
    return os.environ.get("QJAX_DISABLE_KERNELS", "") not in ("", "0")


def backend() -> str:
    """The platform that computations run on unless told otherwise: "cpu", "gpu", "tpu"."""
    device = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    if device is None:
        return jax.default_backend()
    return device if isinstance(device, str) else device.platform


def runnable(kernels: Mapping[str, Callable[[], str | None]]) -> list[str]:
    """The kernels that can run here, in their order."""
    here = backend()
    return [name for name, obstacle in kernels.items() if here in _BACKENDS[name] and obstacle() is None]


def choose(op: str, implementation: str | None, kernels: Mapping[str, Callable[[], str | None]]) -> str:
    """The name of the implementation that runs.

    Args:
      op: named in messages.
      implementation: what the caller asked for; None is the first kernel that can run, else "xla".
      kernels: by name, the first choice first, a function that says why the kernel cannot run these shapes, None when
        it can.

    Raises KernelError for an unknown name and for a named kernel that cannot run. `QJAX_DISABLE_KERNELS=1` makes every
    choice "xla", named or not.
    """
    if implementation not in (None, "xla", *kernels):
        raise KernelError(f"{op} has no implementation {implementation!r}; there are {', '.join((*kernels, 'xla'))}")
    if disabled() or implementation == "xla":
        return "xla"
    here = backend()
    for name, obstacle in kernels.items():
        if implementation not in (None, name):
            continue
        reason = None
        if here not in _BACKENDS[name]:
            reason = f"it runs on {_BACKENDS[name][0]} and the backend is {here}"
        reason = reason or obstacle()
        if reason is None:
            return name
        if implementation == name:
            raise KernelError(f"{op}: {name} cannot run: {reason}; implementation=None falls back to XLA")
    return "xla"
