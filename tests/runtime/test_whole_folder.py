"""Folders that appear whole: what a reader can find after failures and kills."""

from __future__ import annotations

import errno
import os
import pathlib
import signal
import subprocess
import sys

import pytest

from qjax.errors import RunError
from qjax.runtime.durable import WholeFolder

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]


def written(path: pathlib.Path, text: str) -> None:
    with WholeFolder(path) as staging:
        (staging / "deep").mkdir()
        (staging / "deep" / "a").write_text(text)


def content(path: pathlib.Path) -> str:
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]  # nothing is left over
    return (path / "deep" / "a").read_text()


def test_a_folder_is_made_and_replaced(tmp_path):
    path = tmp_path / "new" / "model"
    for text in ("old", "new"):
        written(path, text)
        assert content(path) == text


def test_every_file_is_on_the_disk_before_the_folder_has_its_name(tmp_path, monkeypatch):
    fsync, replace, calls = os.fsync, os.replace, []

    def logged_fsync(descriptor):
        calls.append(pathlib.Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def logged_replace(source, target):
        calls.append(f"{pathlib.Path(source).name} to {pathlib.Path(target).name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(os, "replace", logged_replace)
    written(tmp_path / "model", "x")
    assert sorted(calls[:-2]) == ["a", "deep", "model.tmp"]
    assert calls[-2:] == ["model.tmp to model", tmp_path.name]


def test_an_error_in_the_block_keeps_the_old_folder(tmp_path):
    written(tmp_path / "model", "old")
    with pytest.raises(ZeroDivisionError), WholeFolder(tmp_path / "model"):
        raise ZeroDivisionError
    assert content(tmp_path / "model") == "old"


def test_a_rename_that_fails_keeps_the_old_folder(tmp_path, monkeypatch):
    written(tmp_path / "model", "old")
    replace = os.replace

    def fail(source, target):
        if str(source).endswith(".tmp"):
            raise OSError(errno.EIO, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="Input/output error"):
        written(tmp_path / "model", "new")
    assert content(tmp_path / "model") == "old"


def test_a_process_killed_between_the_renames_leaves_the_old_folder_to_be_found(tmp_path):
    written(tmp_path / "model", "old")
    folder = WholeFolder(tmp_path / "model")
    os.replace(folder.path, folder.retired)  # as of a killed process, which leaves `staging` too
    folder.staging.mkdir()
    with pytest.raises(ZeroDivisionError), WholeFolder(tmp_path / "model"):
        raise ZeroDivisionError
    assert content(tmp_path / "model") == "old"


def test_a_living_writer_is_not_disturbed_and_a_dead_one_is_no_hindrance(tmp_path):
    program = """
import sys, time
from qjax.runtime.durable import WholeFolder
with WholeFolder(sys.argv[1]) as staging:
    (staging / "half").write_text("x")
    print("writing", flush=True)
    time.sleep(60)
"""
    path = tmp_path / "model"
    writer = subprocess.Popen([sys.executable, "-c", program, path], stdout=subprocess.PIPE, cwd=REPOSITORY)
    assert writer.stdout is not None
    assert writer.stdout.readline() == b"writing\n"
    with pytest.raises(RunError, match="another process is writing it"):
        written(path, "new")
    assert (tmp_path / "model.tmp" / "half").exists()
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    writer.stdout.close()
    assert not path.exists()
    written(path, "new")
    assert content(path) == "new"
