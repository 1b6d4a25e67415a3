"""Costly stories that several tests look at, told once for all workers."""

import json
import os

import pytest

from qjax.runtime.lock import FileLock


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """`once(name, tell)`: the JSON value of `tell(folder)`, from the worker that comes first; the others wait for it.

    Workers steal tests from each other, so tests of one module may be with several.
    """
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared

    def told(name, tell):
        folder = shared / name
        folder.mkdir(exist_ok=True)
        file = folder / "told.json"
        with FileLock(folder / "lock"):
            if not file.exists():
                text = json.dumps(tell(folder))
                file.write_text(text)
        return json.loads(file.read_text())

    return told
