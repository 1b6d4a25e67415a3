"""Durable files: what a reader can find after failures and kills."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading

import hypothesis.extra.numpy as hnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from qjax.errors import ArtifactError, InputError, RunError
from qjax.runtime import atomic, durable

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]


def leftovers(folder: pathlib.Path) -> list[pathlib.Path]:
    return list(folder.rglob("*.qjax-tmp"))


def test_written_text_and_json_come_back_with_their_digest(tmp_path):
    file = tmp_path / "new" / "folder" / "a.json"
    value = {"b": [1, 2.5, None], "a": "σ"}
    digest = atomic.write_json(file, value)
    assert digest == hashlib.sha256(file.read_bytes()).hexdigest()
    assert atomic.read_json(file, digest) == value
    assert atomic.write_text(file, "σ") == hashlib.sha256("σ".encode()).hexdigest()
    assert atomic.read_text(file) == "σ"
    assert os.listdir(file.parent) == ["a.json"]


def test_file_mode_follows_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        atomic.write_bytes(tmp_path / "a", b"1")
    finally:
        os.umask(old)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_order_is_flush_fsync_rename_fsync_of_the_folder(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace

    def logged_fsync(descriptor):
        path = pathlib.Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        calls.append(("fsync", "folder" if path.is_dir() else path.read_bytes()))
        fsync(descriptor)

    def logged_replace(source, target):
        calls.append(("replace", pathlib.Path(target).name))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(os, "replace", logged_replace)
    atomic.write_bytes(tmp_path / "a", b"content")
    assert calls == [("fsync", b"content"), ("replace", "a"), ("fsync", "folder")]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT])
@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_a_failing_disk_keeps_the_old_content_and_is_explained(tmp_path, monkeypatch, code, where):
    file = tmp_path / "a"
    atomic.write_bytes(file, b"old")

    def fail(*args):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, where, fail)
    with pytest.raises(RunError, match=r"a: could not write 3 bytes \(\d+ bytes are free\): .+"):
        atomic.write_bytes(file, b"new")
    assert file.read_bytes() == b"old"
    assert not leftovers(tmp_path)


def test_a_real_write_error_in_the_middle_of_a_large_file(tmp_path):
    """A process may write 64 KiB per file; the kernel refuses the rest with EFBIG."""
    program = """
import resource, sys, numpy as np
from qjax.errors import RunError
from qjax.runtime.atomic import write_bytes, write_safetensors
write_bytes(sys.argv[1], b"old")
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
try:
    write_safetensors(sys.argv[1], {"x": np.zeros(1 << 20, np.uint8)})
except RunError as error:
    print(error)
"""
    file = tmp_path / "a"
    done = subprocess.run(
        [sys.executable, "-c", program, file], capture_output=True, text=True, check=True, cwd=REPOSITORY
    )
    assert "a: could not write 1048" in done.stdout
    assert "ulimit -f" in done.stdout
    assert file.read_bytes() == b"old"
    assert not leftovers(tmp_path)


def test_an_error_that_the_user_cannot_help_is_not_disguised(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(errno.EINVAL, "strange")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="strange"):
        atomic.write_bytes(tmp_path / "a", b"new")
    assert not leftovers(tmp_path)


def test_a_file_where_a_folder_should_be(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match="a part of the path is a file"):
        atomic.write_bytes(tmp_path / "file" / "a", b"")
    with pytest.raises(RunError, match="it is a folder"):
        atomic.write_bytes(tmp_path, b"")


def test_an_exception_in_the_block_leaves_nothing(tmp_path):
    def interrupted():
        with durable.open_atomic(tmp_path / "a") as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not list(tmp_path.iterdir())


def test_a_killed_writer_leaves_a_file_that_is_recognised_and_removed(tmp_path):
    program = """
import sys, time
from qjax.runtime.durable import open_atomic
with open_atomic(sys.argv[1]) as file:
    file.write(b"half"); file.flush()
    print("writing", flush=True)
    time.sleep(60)
"""
    target = tmp_path / "deep" / "a"
    writer = subprocess.Popen([sys.executable, "-c", program, target], stdout=subprocess.PIPE, cwd=REPOSITORY)
    assert writer.stdout is not None
    assert writer.stdout.readline() == b"writing\n"
    assert durable.remove_leftovers(tmp_path) == []  # a living process is writing it
    assert len(leftovers(tmp_path)) == 1
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    writer.stdout.close()
    assert not target.exists()
    assert len(durable.remove_leftovers(tmp_path)) == 1
    assert not leftovers(tmp_path)


def test_readers_beside_a_writer_see_whole_files_only(tmp_path):
    file = tmp_path / "a"
    contents = [bytes([i]) * (1000 + i) for i in range(30)]
    atomic.write_bytes(file, contents[0])
    stop, seen = threading.Event(), []

    def read():
        while not stop.is_set():
            seen.append(atomic.read_bytes(file))

    reader = threading.Thread(target=read)
    reader.start()
    for content in contents:
        atomic.write_bytes(file, content)
    stop.set()
    reader.join()
    assert set(seen) <= set(contents)


@pytest.mark.parametrize(
    ("content", "read", "message"),
    [
        (None, atomic.read_bytes, "there is no such file"),
        (b"x", lambda file: atomic.read_bytes(file, "0" * 64), "damaged: its SHA-256 is"),
        (b"\xff", atomic.read_text, "is not UTF-8 text"),
        (b'{"a": 1', atomic.read_json, "is not JSON"),
    ],
)
def test_unusable_files_are_named(tmp_path, content, read, message):
    file = tmp_path / "some_file"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ArtifactError, match=f"some_file: {message}"):
        read(file)


def test_json_refuses_nan(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        atomic.write_json(tmp_path / "a", {"x": float("nan")})
    assert not list(tmp_path.iterdir())


DTYPES = [np.bool_, np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32, np.uint64, np.int64]
DTYPES += [np.float16, np.float32, np.float64]


@given(
    arrays=st.dictionaries(
        st.text(max_size=8).filter(lambda name: name != "__metadata__"),
        st.sampled_from(DTYPES).flatmap(lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, min_side=0))),
        max_size=4,
    ),
    metadata=st.dictionaries(st.text(max_size=8).filter(lambda key: key != "sha256"), st.text(max_size=20), max_size=4),
)
def test_safetensors_round_trip_agrees_with_the_reference_reader(tmp_path_factory, arrays, metadata):
    file = tmp_path_factory.mktemp("s") / "a.safetensors"
    digest = atomic.write_safetensors(file, arrays, metadata)
    for loaded in (atomic.read_safetensors(file, digest)[0], safetensors.numpy.load_file(file)):
        assert loaded.keys() == arrays.keys()
        for name, array in arrays.items():
            assert loaded[name].dtype == array.dtype
            assert loaded[name].shape == array.shape
            assert loaded[name].tobytes() == np.ascontiguousarray(array).tobytes()
    assert atomic.read_safetensors(file)[1] == metadata


def test_safetensors_bytes_do_not_depend_on_the_order_or_layout(tmp_path):
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    bf16 = np.arange(3).astype(ml_dtypes.bfloat16)
    one = atomic.write_safetensors(tmp_path / "1", {"x": x, "y": bf16}, {"a": "1", "b": "2"})
    two = atomic.write_safetensors(tmp_path / "2", {"y": bf16, "x": np.asfortranarray(x)}, {"b": "2", "a": "1"})
    assert one == two
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    assert atomic.read_safetensors(tmp_path / "1")[0]["y"].dtype == ml_dtypes.bfloat16


def test_safetensors_every_flipped_bit_is_found(tmp_path):
    file = tmp_path / "record.safetensors"
    atomic.write_safetensors(file, {"x": np.arange(5, dtype=np.uint16)}, {"report": '{"loss": 0.25}'})
    good = file.read_bytes()
    for position in range(len(good)):
        damaged = bytearray(good)
        damaged[position] ^= 1
        file.write_bytes(damaged)
        try:
            atomic.read_safetensors(file)
        except ArtifactError as error:
            assert "record.safetensors" in str(error)  # noqa: PT017 - the padding may be flipped unnoticed
        else:
            header = 8 + int.from_bytes(good[:8], "little")
            assert good[position:header].strip() == b""


@pytest.mark.parametrize("keep", [0, 4, 8, 50, -1])
def test_safetensors_truncated_files_are_found(tmp_path, keep):
    file = tmp_path / "record.safetensors"
    atomic.write_safetensors(file, {"x": np.arange(5)})
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ArtifactError, match=r"record.safetensors: truncated or not a safetensors file"):
        atomic.read_safetensors(file)


def test_safetensors_bad_arguments(tmp_path):
    file = tmp_path / "record.safetensors"
    with pytest.raises(InputError, match="array 'x' has dtype complex64"):
        atomic.write_safetensors(file, {"x": np.zeros(2, np.complex64)})
    with pytest.raises(InputError, match="metadata entry 'sha256'"):
        atomic.write_safetensors(file, {}, {"sha256": ""})
    with pytest.raises(ArtifactError, match="there is no such file"):
        atomic.read_safetensors(file)
    safetensors.numpy.save_file({"x": np.zeros(2)}, file)
    with pytest.raises(ArtifactError, match="has no checksum"):
        atomic.read_safetensors(file)
    atomic.write_safetensors(file, {"x": np.zeros(2)})
    with pytest.raises(ArtifactError, match="it is another file"):
        atomic.read_safetensors(file, "0" * 64)


def test_json_numbers_survive_exactly(tmp_path):
    values = np.random.default_rng(0).normal(size=50).tolist()
    atomic.write_json(tmp_path / "a", values)
    assert json.loads((tmp_path / "a").read_text()) == values
