"""The environment of every test: CPU unless asked otherwise, strict JAX, a compilation cache, no network."""

from __future__ import annotations

import importlib.util
import os
import pathlib
import socket
import sys
import types

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent

# Before JAX is imported, and in the environment, so that processes started by tests have the same settings.
for name, value in {
    "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": str(REPOSITORY / ".jax_cache"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    "JAX_NUMPY_DTYPE_PROMOTION": "strict",
    "JAX_NUMPY_RANK_PROMOTION": "raise",
    "MPLBACKEND": "agg",
    "WANDB_MODE": "offline",
    "WANDB_SILENT": "true",
    "HF_HUB_OFFLINE": "1",
}.items():
    os.environ.setdefault(name, value)

# Without LLVM's optimisations a test that compiles more than it computes takes half of the processor's time, and what
# is asserted holds whatever LLVM does. The mathematics goes through them as users' programs do: on Python 3.11
# Hessians, codebooks, kernels and losses, in .ci/run's second column (`make test-short`) linear algebra and roundings.
OPTIMISED = {"codebooks", "evaluate", "hessian", "pallas_kernels"}
if sys.version_info[:2] != (3, 11):
    OPTIMISED |= {"linalg", "properties", "rounding"}

import beartype  # noqa: E402
import hypothesis  # noqa: E402
import jax  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402

_beartype = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))  # an int is a float, as in PEP 484
_seen: set[types.CodeType] = set()


def _checked(callable_):
    """`callable_` with checked annotations; a function inside a function the first time that it is made.

    The hook decorates such a function whenever the outer one runs, and writing its checker takes a millisecond.
    """
    if isinstance(callable_, types.FunctionType) and "<locals>" in callable_.__qualname__:
        if callable_.__code__ in _seen:
            return callable_
        _seen.add(callable_.__code__)
    return _beartype(callable_)


# Annotations become checks, for all modules imported from here on.
sys.modules["qjax_annotations"] = types.SimpleNamespace(checked=_checked)  # the hook takes a name
jaxtyping.install_import_hook(["qjax", "pallas_kernels"], "qjax_annotations.checked")

# Derandomised everywhere: a failure of one machine is a failure of all, and CI never fails for a change it did not see.
hypothesis.settings.register_profile("qjax", deadline=None, max_examples=25, derandomize=True, print_blob=True)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=1000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "qjax"))


def _cuda_plugin() -> bool:
    return any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13))


_QUICK = "JAX_DISABLE_MOST_OPTIMIZATIONS"
_LOCAL = {"localhost", "127.0.0.1", "::1", "", None}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a device or a library that is not here."""
    backend = jax.default_backend() if any(item.get_closest_marker(m) for item in items for m in ("gpu", "tpu")) else ""
    absent = {
        "gpu": None if backend == "gpu" else "needs a CUDA device: JAX_PLATFORMS=cuda pytest -m gpu",
        "tpu": None if backend == "tpu" else "needs a TPU: JAX_PLATFORMS=tpu pytest -m tpu",
        "gpu_aot": None if _cuda_plugin() else "needs the CUDA plugin: pip install -e '.[cuda]'",
        "tpu_aot": None if importlib.util.find_spec("libtpu") else "needs libtpu: pip install -e '.[tpu]'",
    }
    for item in items:
        for marker, reason in absent.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _strict_jax():
    """Strict promotion and 32 bits at the start of every test, whatever the one before it set."""
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_enable_x64", False)


@pytest.fixture(scope="module", autouse=True)
def _optimised(request):
    """Programs of this folder, and of the processes that it starts, go through LLVM's optimisations or do not."""
    quick = not OPTIMISED.intersection(request.path.relative_to(REPOSITORY / "tests").parts)
    if os.environ.get(_QUICK, "0") != str(int(quick)):
        jax.clear_caches()  # the other kind's
        jax.config.update(_QUICK.lower(), quick)
        os.environ[_QUICK] = str(int(quick))


@pytest.fixture(scope="module", autouse=True)
def _bounded_programs():
    """Forget compiled programs before the regions that Linux lets one process map are used up."""
    yield
    from qjax.runtime.memory import forget_programs  # after the import hook

    forget_programs(share=0.25)


@pytest.fixture(scope="session", autouse=True)
def _no_network():
    """A connection or a name look-up outside this machine fails as it does without a network."""
    connect, look_up = socket.socket.connect, socket.getaddrinfo

    def guarded_connect(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in _LOCAL:
            raise OSError(101, f"tests have no network: {address}")
        return connect(self, address)

    def guarded_look_up(host, *args, **kwargs):
        if host not in _LOCAL:
            raise socket.gaierror(socket.EAI_AGAIN, f"tests have no network: {host}")
        return look_up(host, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded_connect)
        patch.setattr(socket, "getaddrinfo", guarded_look_up)
        yield


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """The folder of test data that is not part of the repository; skips where it is absent."""
    folder = pathlib.Path(os.environ.get("QJAX_SHARED_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"test data is absent: no folder {folder} (set QJAX_SHARED_DATA)")
    return folder
