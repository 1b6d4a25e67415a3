"""`qjax.data.load`: BOS policies, hashes, held-out windows, mixtures and errors."""

import json
import random

import numpy as np
import pytest

import qjax.data
from qjax.data import TokenStream, check_disjoint, check_vocabulary
from qjax.errors import DataError, InputError

BOS = 256


class Bytes:
    """UTF-8 bytes as tokens, and a BOS after them."""

    vocab_size = 257
    bos_id = BOS

    def encode(self, text):
        return list(text.encode())


class NoBos(Bytes):
    vocab_size = 256
    bos_id = None


@pytest.fixture
def story(tmp_path):
    """A text file whose windows are all different."""
    words = random.Random(0)
    path = tmp_path / "story.txt"
    path.write_text(" ".join(str(words.randrange(10**6)) for _ in range(600)))
    return path


def take(source="text", tokenizer=None, calibration=8, evaluation=4, length=32, **options):
    return qjax.data.load(
        source,
        tokenizer or Bytes(),
        calibration_sequences=calibration,
        evaluation_sequences=evaluation,
        length=length,
        **options,
    )


def load_files(**files):
    """`load` of separate files: its source options share their names with `take`'s numbers."""
    return qjax.data.load("text", Bytes(), calibration_sequences=None, evaluation_sequences=2, length=8, **files)


def test_windows_come_from_their_half(story):
    text = story.read_text()
    split = take(path=story, windows="first", evaluation_windows="first")
    cut = int(0.85 * len(text))
    assert bytes(split.calibration.tokens.reshape(-1).tolist()).decode() == text[: 8 * 32]
    assert bytes(split.evaluation.tokens.reshape(-1).tolist()).decode() == text[cut : cut + 4 * 32]
    assert split.calibration.tokens.dtype == np.int32 and split.calibration.tokens.shape == (8, 32)
    assert split.domains == {"text": split.evaluation}


def test_description_is_json_and_names_the_choices(story):
    split = take(path=story, bos="sequence", seed=5)
    facts = json.loads(json.dumps(split.calibration.description))
    expected = {"source": "text", "bos": "sequence", "length": 32, "stride": 31, "documents": 1, "packing": "stream"}
    assert expected.items() <= facts.items()
    assert (facts["windows"], facts["seed"], facts["side"]) == ("random", 5, "calibration")
    assert split.evaluation.description["seed"] is None  # spread evenly: no randomness


def test_hash_follows_tokens_and_seed_moves_calibration_only(story):
    one, again, other = (take(path=story, seed=seed) for seed in (0, 0, 1))
    assert one.calibration.sha256 == again.calibration.sha256 != other.calibration.sha256
    assert one.evaluation.sha256 == other.evaluation.sha256
    assert (
        TokenStream.of(np.zeros((2, 6), np.int32), {}).sha256 != TokenStream.of(np.zeros((3, 4), np.int32), {}).sha256
    )


def test_tokens_are_read_only(story):
    with pytest.raises(ValueError, match="read-only"):
        take(path=story).calibration.tokens[0, 0] = 1


@pytest.mark.parametrize("bos", ["none", "sequence", "document"])
def test_bos_policies(tmp_path, bos):
    texts = [f"<{i}:{'x' * (5 + i % 3)}>" for i in range(100)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    split = take("jsonl", path=path, calibration=None, evaluation=1, length=16, bos=bos, windows="first", split=0.5)
    tokens = split.calibration.tokens
    half = next(n for n in range(101) if sum(map(len, texts[: n + 1])) > 0.5 * sum(map(len, texts)))
    if bos == "document":
        expected = [t for text in texts[:half] for t in (BOS, *text.encode())]
        assert tokens.reshape(-1).tolist() == expected[: tokens.size]
    else:
        body = tokens[:, 1:] if bos == "sequence" else tokens
        assert (BOS in tokens) == (bos == "sequence") and (bos == "none" or (tokens[:, 0] == BOS).all())
        assert "\n\n".join(texts[:half]).startswith(bytes(body.reshape(-1).tolist()).decode())


def test_token_source_needs_no_tokenizer(tmp_path):
    ids = np.random.default_rng(0).integers(2, 500, 1000).astype(np.uint16)
    ids[::50] = 1
    np.save(tmp_path / "t.npy", ids)
    common = {"calibration_sequences": 10, "evaluation_sequences": 3, "length": 20, "path": tmp_path / "t.npy"}
    split = qjax.data.load("tokens", None, vocab_size=500, windows="first", **common)
    np.testing.assert_array_equal(split.calibration.tokens.reshape(-1), ids[:200])
    marked = qjax.data.load("tokens", None, vocab_size=500, bos_id=1, bos="document", **common)
    assert marked.calibration.description["documents"] == 17
    with pytest.raises(InputError, match="needs vocab_size"):
        qjax.data.load("tokens", None, **common)
    with pytest.raises(DataError, match="no token is the BOS 0"):
        qjax.data.load("tokens", None, vocab_size=500, bos_id=0, bos="document", **common)
    with pytest.raises(InputError, match="needs documents of text"):
        qjax.data.load("tokens", None, vocab_size=500, packing="document_first", **common)


def test_token_outside_the_vocabulary_is_located(tmp_path):
    ids = np.arange(400, dtype=np.int64) % 90
    ids[123] = 90
    np.save(tmp_path / "t.npy", ids)
    with pytest.raises(DataError, match="token id 90 at position 123 is outside the vocabulary of 90"):
        take("tokens", path=tmp_path / "t.npy", vocab_size=90, calibration=1, evaluation=1, length=4)
    with pytest.raises(DataError, match="token id -1 at position 1, 0"):
        check_vocabulary(np.array([[0, 0], [-1, 0]]), 5, "x")


def test_tokenizer_larger_than_the_model_is_found_out(story):
    with pytest.raises(DataError, match="outside the vocabulary of 40"):
        take(path=story, vocab_size=40)


@pytest.mark.parametrize("packing", ["document_first", "document_random"])
@pytest.mark.parametrize("bos", ["none", "sequence", "document"])
def test_one_window_per_long_document(tmp_path, packing, bos):
    texts = [chr(65 + i) * (10 if i % 2 else 40) + chr(97 + i) * 10 for i in range(20)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    split = take("jsonl", path=path, calibration=5, evaluation=2, length=32, split=0.71, packing=packing, bos=bos)
    rows = [*split.calibration.tokens, *split.evaluation.tokens]
    seen = set()
    for row in rows:
        body = bytes(int(t) for t in row if t != BOS).decode()
        owner = next(i for i, text in enumerate(texts) if body in text)
        assert owner % 2 == 0  # the short ones are skipped
        if packing == "document_first":
            assert texts[owner].startswith(body) and (row[0] == BOS) == (bos != "none")
        if bos == "sequence":
            assert row[0] == BOS
        seen.add(owner)
    assert len(seen) == 7
    assert split.calibration.description["documents"] == 14
    with pytest.raises(DataError, match="14 documents, 7 of them long enough, that is 7 windows .* needed 9"):
        take("jsonl", path=path, calibration=9, evaluation=2, length=32, split=0.71, packing=packing, bos=bos)


def test_too_short_and_empty_texts_say_what_is_needed(tmp_path):
    (tmp_path / "short.txt").write_text("hello " * 10)
    with pytest.raises(
        DataError, match=r"found 51 tokens, that is 1 windows of length 32; needed 8 windows \(256 tokens"
    ):
        take(path=tmp_path / "short.txt")
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataError, match="found 0 tokens, that is 0 windows"):
        take(path=tmp_path / "empty.txt", calibration=None)
    (tmp_path / "c.txt").write_text("hello " * 100)
    with pytest.raises(DataError, match=r"text \(evaluation\): found 0 tokens"):
        load_files(calibration=tmp_path / "c.txt", evaluation=tmp_path / "empty.txt")


def test_zero_sequences_and_bad_options(story):
    with pytest.raises(DataError, match="leaves zero calibration tokens"):
        take(path=story, calibration=0)
    with pytest.raises(DataError, match="leaves zero evaluation tokens"):
        take(path=story, evaluation=0)
    with pytest.raises(InputError, match="at least 2 tokens"):
        take(path=story, length=1)
    with pytest.raises(InputError, match="not a BOS policy; there is: none, sequence, document"):
        take(path=story, bos="always")
    with pytest.raises(InputError, match="unknown data source 'pile'"):
        take("pile")
    with pytest.raises(InputError, match="has no option colour"):
        take(path=story, colour=1)
    with pytest.raises(InputError, match="packing='tight' is unknown"):
        take(path=story, packing="tight")
    with pytest.raises(InputError, match="can be chosen as"):
        take(path=story, windows="last")
    with pytest.raises(InputError, match="the tokenizer has none"):
        take(path=story, tokenizer=NoBos(), bos="sequence")
    with pytest.raises(DataError, match="bos_id=300 is outside"):
        take(path=story, bos="sequence", bos_id=300)
    with pytest.raises(InputError, match="needs a tokenizer"):
        qjax.data.load("text", None, calibration_sequences=1, evaluation_sequences=1, length=8, path=story)


def test_same_text_in_both_halves_is_refused(tmp_path, story):
    copy = tmp_path / "copy.txt"
    copy.write_text(story.read_text())
    with pytest.raises(DataError, match="calibration and evaluation data are the same"):
        load_files(calibration=story, evaluation=copy)
    copy.write_text(story.read_text() + "!")
    with pytest.raises(DataError, match="has the same tokens as calibration window"):
        load_files(calibration=story, evaluation=copy)


def test_disjoint_check_by_hand():
    rows = np.arange(12).reshape(4, 3)
    check_disjoint(rows[:2], rows[2:], "x")
    with pytest.raises(DataError, match="evaluation window 1 has the same tokens as calibration window 0"):
        check_disjoint(rows[:2], rows[[2, 0]], "x")


def test_mixture_keeps_domains_apart(tmp_path, story):
    np.save(tmp_path / "t.npy", np.random.default_rng(1).integers(0, 250, 4000))
    parts = {
        "words": {"source": "text", "path": story, "weight": 3},
        "noise": {"source": "tokens", "path": tmp_path / "t.npy"},
    }
    split = take("mixture", calibration=16, evaluation=8, parts=parts)
    alone = take(path=story, calibration=12, evaluation=6)
    assert list(split.domains) == ["words", "noise"]
    np.testing.assert_array_equal(split.domains["words"].tokens, alone.evaluation.tokens)
    np.testing.assert_array_equal(split.evaluation.tokens[split.rows["words"]], alone.evaluation.tokens)
    assert sorted(np.concatenate(list(split.rows.values()))) == list(range(split.evaluation.sequences))
    rows = {row.tobytes() for row in split.calibration.tokens}
    assert len(rows) == 16 and {row.tobytes() for row in alone.calibration.tokens} < rows
    assert split.evaluation.tokens.shape == (8, 32)
    facts = json.loads(json.dumps(split.calibration.description))
    assert facts["weights"] == {"words": 3.0, "noise": 1.0} and facts["stride"] == 32
    assert facts["parts"]["noise"]["source"] == "tokens"


def test_mixture_errors(story):
    part = {"source": "text", "path": story}
    with pytest.raises(InputError, match="takes the one option parts"):
        take("mixture")
    with pytest.raises(InputError, match="needs numbers of sequences"):
        take("mixture", calibration=None, parts={"a": part})
    with pytest.raises(InputError, match="'b' needs a source"):
        take("mixture", parts={"a": part, "b": {"source": "mixture"}})
    with pytest.raises(InputError, match="'a' needs a source .* weight above 0"):
        take("mixture", parts={"a": {**part, "weight": 0}})
    with pytest.raises(InputError, match="'b' with weight 0.01 gets 0 calibration"):
        take("mixture", parts={"a": part, "b": {**part, "weight": 0.01}})
    # The same file with other splits: the second part's calibration text holds the first one's evaluation text.
    whole = {"a": {**part, "split": 0.5}, "b": {**part, "split": 0.9}}
    with pytest.raises(DataError, match="mixture: evaluation window"):
        take("mixture", calibration=20, evaluation=20, length=2, windows="even", parts=whole)


def test_stream_refuses_what_is_no_matrix_of_integers():
    for bad in (np.zeros(4, np.int32), np.zeros((2, 2))):
        with pytest.raises(InputError, match="needs integers"):
            TokenStream.of(bad, {})


def test_default_source_end_to_end():
    split = take("pydoc", calibration=48, evaluation=16, length=512)
    assert split.calibration.tokens.shape == (48, 512) and split.evaluation.tokens.shape == (16, 512)
