"""Cutting documents in two and reading files."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qjax.data.corpus import cut_characters, cut_documents, digest, read_utf8, utf8_lines
from qjax.errors import DataError, InputError

DOCUMENTS = st.lists(st.text("ab\n", max_size=6), min_size=1, max_size=8)


@given(DOCUMENTS, st.floats(0.001, 0.999))
def test_character_cut_is_a_cut_of_the_joined_text(documents, split):
    joined = "\n\n".join(documents)
    first, second = cut_characters(documents, split)
    assert "\n\n".join(first) == joined[: int(split * len(joined))]
    assert "\n\n".join(second) == joined[int(split * len(joined)) :]


@given(st.lists(st.text("ab", max_size=6), min_size=2, max_size=8), st.floats(0.001, 0.999))
def test_document_cut_keeps_documents_whole(documents, split):
    first, second = cut_documents(documents, split)
    assert [*first, *second] == documents
    assert first and second


def test_document_cut_respects_the_fraction():
    first, second = cut_documents(["a" * 10] * 10, 0.7)
    assert (len(first), len(second)) == (7, 3)


@pytest.mark.parametrize("split", [0.0, 1.0, -0.5, 2.0, float("nan")])
def test_split_outside_the_unit_interval_is_refused(split):
    with pytest.raises(InputError, match="above 0 and below 1"):
        cut_characters(["abc"], split)


def test_digest_sees_document_borders():
    assert digest(("ab", "c")) != digest(("a", "bc"))


def test_not_utf8_names_file_and_byte(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes("caf\u00e9".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.txt: not UTF-8, byte offset 3 holds 0xe9"):
        read_utf8(path)


def test_lines_stream_and_count_bytes_over_all_lines(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_bytes("\ufeffgr\u00fcn\u2028x\nzwei\n".encode() + b"dr\xffi\n")
    lines = utf8_lines(path)
    assert [next(lines), next(lines)] == ["gr\u00fcn\u2028x\n", "zwei\n"]
    with pytest.raises(DataError, match=f"byte offset {path.read_bytes().index(255)} holds 0xff"):
        next(lines)


def test_missing_file_and_directory_are_named(tmp_path):
    with pytest.raises(DataError, match=r"absent\.txt: there is no such file"):
        read_utf8(tmp_path / "absent.txt")
    with pytest.raises(DataError, match="cannot be read"):
        read_utf8(tmp_path)


def test_byte_order_mark_is_not_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    assert read_utf8(tmp_path / "a.txt") == "hello"
