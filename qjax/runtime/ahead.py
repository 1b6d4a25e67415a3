"""Programs that are compiled ahead: in threads of their own, while the main thread computes something else.

XLA lets go of Python's lock while it compiles, and what a run will need is known from shapes before it is needed:

    with compiling():
        ahead(program, *arguments, **options)  # as the call will be, with `jax.ShapeDtypeStruct` for arrays to come
        …
        call(program, *arguments, **options)  # waits for what was begun, so that it is not compiled twice

A program is the same whenever it is compiled, so no result depends on this module. JAX keeps what `lower().compile()`
made for the call that follows; a call that nothing was begun for, or whose arguments are not those announced, compiles
for itself.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
import os
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import jax
import numpy as np

__all__ = ["WAITED", "abstract", "ahead", "call", "compiling", "possible", "waited"]

WAITED = "/qjax/compile/waited"
"""The monitoring event of the seconds that a call waited for a program that was begun ahead."""

_THREADS = 2  # a compilation has threads of its own; two keep as many cores busy, and hold the memory of two
_log = logging.getLogger("qjax")
T = TypeVar("T")


class _Begun:
    """The programs that were begun and not yet waited for."""

    def __init__(self, threads: int):
        self.executor = ThreadPoolExecutor(threads, thread_name_prefix="qjax-compile") if threads else None
        self.futures: dict[Hashable, Future[None]] = {}
        self.seen: set[Hashable] = set()
        self.lock = threading.Lock()


_begun: contextvars.ContextVar[_Begun | None] = contextvars.ContextVar("qjax_begun", default=None)


@contextlib.contextmanager
def compiling(threads: int | None = None) -> Iterator[None]:
    """While open, `ahead` begins programs; inside another one it is that one.

    At the end what has not begun is dropped, what has is left to finish. Without a second core, and in a run of several
    processes, which must meet in their programs in one order, nothing is begun ahead.
    """
    threads = (_THREADS if _cores() > 1 and jax.process_count() == 1 else 0) if threads is None else threads
    if _begun.get() is not None:
        yield
        return
    begun = _Begun(threads)
    token = _begun.set(begun)
    try:
        yield
    finally:
        _begun.reset(token)
        if begun.executor is not None:
            begun.executor.shutdown(wait=False, cancel_futures=True)


def possible() -> bool:
    """Whether `ahead` begins programs here."""
    begun = _begun.get()
    return begun is not None and begun.executor is not None


def ahead(program: Any, *arguments: Any, **options: Any) -> None:
    """Begin to compile the call `program(*arguments, **options)` of a function under `jax.jit`, once.

    Arrays may be given as `jax.ShapeDtypeStruct`. An error is left to the call itself, which meets it again.
    """
    begun = _begun.get()
    if begun is None or begun.executor is None:
        return
    key = _key(program, arguments, options)
    with begun.lock:
        if key in begun.seen:
            return
        begun.seen.add(key)
        begun.futures[key] = begun.executor.submit(_compiled, program, abstract(arguments), abstract(options))


def waited(program: Any, *arguments: Any, **options: Any) -> None:
    """Wait until what was begun ahead for this call, if anything, is compiled."""
    begun = _begun.get()
    if begun is None or not begun.futures:
        return
    with begun.lock:
        future = begun.futures.pop(_key(program, arguments, options), None)
    if future is None or future.cancel():  # what waits behind others is sooner compiled here
        return
    start = time.perf_counter()
    future.result()
    jax.monitoring.record_event_duration_secs(WAITED, time.perf_counter() - start)


def call(program: Callable[..., T], *arguments: Any, **options: Any) -> T:
    """`program(*arguments, **options)`, after what was begun ahead for it."""
    waited(program, *arguments, **options)
    return program(*arguments, **options)


def abstract(tree: Any) -> Any:
    """A tree with its arrays as shapes; what is no array stays."""

    def shaped(leaf: Any) -> Any:
        if isinstance(leaf, jax.ShapeDtypeStruct) or not _is_array(leaf):
            return leaf
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, weak_type=getattr(leaf, "weak_type", False))

    return jax.tree.map(shaped, tree)


def _compiled(program: Any, arguments: Any, options: Any) -> None:
    try:
        program.lower(*arguments, **options).compile()
    except Exception as error:
        _log.info(
            "compiling %s ahead failed: %s: %s", getattr(program, "__name__", program), type(error).__name__, error
        )


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


def _key(program: Callable[..., Any], arguments: Any, options: Any) -> Hashable:
    """What two calls have in common that run one program."""
    leaves, structure = jax.tree.flatten((arguments, options))
    return program, structure, tuple((leaf.shape, str(leaf.dtype)) if _is_array(leaf) else leaf for leaf in leaves)
