"""Tokenizers from tokenizer.json, piece lists and GGUF metadata, against independent encoders and stored tokens."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from qjax.errors import DataError, InputError, ModelFileError
from qjax.models import Tokenizer, open_model
from qjax.models.tokenizers.tokenizer import read_tokenizer_json
from qjax.models.tokenizers.vocabularies import gguf_tokenizer, read_piece_list, sentencepiece_bpe
from qjax.models.tokenizers.vocabulary_files import read_vocabulary_files


def byte_symbols() -> dict[int, str]:
    """GPT-2's printable character of every byte: printable ones stand for themselves, the others follow 255."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {byte: chr(byte) for byte in kept}
    rest = (byte for byte in range(256) if byte not in table)
    return table | {byte: chr(256 + i) for i, byte in enumerate(rest)}


def byte_level_metadata(pre: str = "smollm") -> dict:
    symbols = list(byte_symbols().values())
    merges = ["Ġ t", "h e", "Ġt he", "1 2", "c a", "ca t", "Ċ Ċ"]
    pieces = ["<|end|>", "<user>", *symbols, *[merge.replace(" ", "") for merge in merges]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.token_type": np.asarray([3, 4] + [1] * (len(pieces) - 2), np.int32),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 0,
    }


def pieces_of(tokenizer: Tokenizer, text: str) -> list[str]:
    return [tokenizer.backend.id_to_token(int(i)) for i in tokenizer.encode(text)]


def test_byte_level_bpe_with_individual_digits():
    tokenizer = gguf_tokenizer(byte_level_metadata(), "a.gguf")
    assert pieces_of(tokenizer, "cat the 12") == ["cat", "Ġthe", "Ġ", "1", "2"]
    assert pieces_of(tokenizer, "<|end|><user>\n\n") == ["<|end|>", "<user>", "ĊĊ"]
    assert tokenizer.decode(tokenizer.encode("<|end|>cat")) == "cat"
    assert tokenizer.decode(tokenizer.encode("<|end|>cat"), skip_special=False) == "<|end|>cat"
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.adds_bos) == (0, 0, False)
    assert tokenizer.encode("cat").dtype == np.int32


@pytest.mark.parametrize(("pre", "twelve"), [("gpt-2", ["12"]), ("llama-bpe", ["12"]), ("qwen2", ["1", "2"])])
def test_digits_of_other_splits(pre: str, twelve: list[str]):
    assert pieces_of(gguf_tokenizer(byte_level_metadata(pre), "a.gguf"), "12") == twelve


@given(st.text(max_size=40))
@settings(max_examples=100, deadline=None)
def test_byte_level_round_trip(text: str):
    tokenizer = gguf_tokenizer(byte_level_metadata(), "a.gguf")
    assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == text


def greedy_merges(text: str, pieces: list[str], scores: list[float], control: set[int]) -> list[int]:
    """SentencePiece BPE by definition: while any neighbours join to a piece, join the best-scored, leftmost pair."""
    rank = {piece: i for i, piece in enumerate(pieces) if i not in control}
    symbols = list(text)
    while True:
        joins = [(-scores[rank[a + b]], at) for at, (a, b) in enumerate(itertools.pairwise(symbols)) if a + b in rank]
        if not joins:
            break
        at = min(joins)[1]
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    ids: list[int] = []
    for symbol in symbols:
        ids += [rank[symbol]] if symbol in rank else [pieces.index(f"<0x{byte:02X}>") for byte in symbol.encode()]
    return ids


PIECES = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)], "▁a", "ab", "▁ab", "ba", "aba", *"▁abc"]
SCORES = [-float(i) for i in range(len(PIECES))]


@given(st.text(alphabet="abc é日", max_size=14))
@settings(max_examples=200, deadline=None)
def test_sentencepiece_merges_follow_the_definition(text: str):
    backend = sentencepiece_bpe(PIECES, SCORES, special=(0, 1, 2), unknown=0)
    expected = greedy_merges("▁" + text.replace(" ", "▁"), PIECES, SCORES, {0, 1, 2}) if text else []
    assert backend.encode(text, add_special_tokens=False).ids == expected
    assert backend.decode(expected) == text


def test_sentencepiece_from_gguf_metadata():
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": PIECES,
        "tokenizer.ggml.scores": np.asarray(SCORES, np.float32),
        "tokenizer.ggml.token_type": np.asarray([2, 3, 3] + [6] * 256 + [1] * (len(PIECES) - 259), np.int32),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    tokenizer = gguf_tokenizer(metadata, "a.gguf")
    assert pieces_of(tokenizer, "ab caba") == ["▁ab", "▁", "c", "aba"]
    assert tokenizer.adds_bos and tokenizer.eos_id == 2
    plain = gguf_tokenizer(metadata | {"tokenizer.ggml.add_space_prefix": False}, "a.gguf")
    assert pieces_of(plain, "ab") == ["ab"]


def test_stories_encode_to_their_stored_tokens(stories: Path):
    tokenizer = open_model(stories).tokenizer
    ids = np.load(stories / "tinystories_tokens.npy").astype(np.int32)
    starts = np.flatnonzero(ids == tokenizer.bos_id)
    for begin, end in itertools.pairwise(starts[:61]):
        story = ids[begin + 1 : end]
        np.testing.assert_array_equal(tokenizer.encode(tokenizer.decode(story)), story)
    assert tokenizer.adds_bos and tokenizer.vocab_size == 512


@pytest.fixture
def word_level(tmp_path: Path) -> Path:
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "a": 1, "?": 2}, unk_token="?"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    backend.enable_truncation(2)
    path = tmp_path / "tokenizer.json"
    backend.save(str(path))
    return path


def test_tokenizer_json(word_level: Path):
    tokenizer = read_tokenizer_json(word_level, {"bos_id": 0, "eos_id": None})
    np.testing.assert_array_equal(tokenizer.encode("a a b a"), [1, 1, 2, 1])  # no BOS, no truncation
    assert tokenizer.adds_bos and tokenizer.vocab_size == 3 and tokenizer.eos_id is None
    assert not read_tokenizer_json(word_level, {"bos_id": 1, "eos_id": None}).adds_bos


def test_fingerprints_tell_tokenizers_apart(word_level: Path):
    first = read_tokenizer_json(word_level, {"bos_id": 0, "eos_id": 0}).fingerprint
    assert first == read_tokenizer_json(word_level, {"bos_id": 0, "eos_id": 0}).fingerprint
    assert first != read_tokenizer_json(word_level, {"bos_id": 0, "eos_id": 1}).fingerprint
    assert first != gguf_tokenizer(byte_level_metadata(), "a.gguf").fingerprint
    assert len(first) == 64


@pytest.mark.parametrize("content", ["{", "{}", '{"model": {"type": "Other"}}', "version https://git-lfs.x/spec/v1\n"])
def test_damaged_tokenizer_json(tmp_path: Path, content: str):
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(ModelFileError, match=r"tokenizer\.json"):
        read_tokenizer_json(path, {})


@pytest.mark.parametrize("content", ["{", '{"a": 0}', '["a"]', "[" + ", ".join(["1"] * 300) + "]"])
def test_vocabulary_of_another_kind(tmp_path: Path, content: str):
    path = tmp_path / "vocab.json"
    path.write_text(content)
    with pytest.raises(ModelFileError, match=r"vocab\.json"):
        read_piece_list(path, {})


def test_vocabulary_with_a_piece_twice(tmp_path: Path):
    path = tmp_path / "vocab.json"
    path.write_text(json.dumps([*PIECES, "ab"]))
    with pytest.raises(ModelFileError, match="a piece twice"):
        read_piece_list(path, {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.model": "bert"}, "tokenizer model 'bert'"),
        ({"tokenizer.ggml.merges": []}, "merges is missing"),
        ({"tokenizer.ggml.merges": ["ab"]}, "not a pair"),
        ({"tokenizer.ggml.merges": ["x yz"]}, "merges do not fit"),
        ({"tokenizer.ggml.token_type": np.ones(3, np.int32)}, "token_type must hold"),
        ({"tokenizer.ggml.bos_token_id": 10**6}, "bos_token_id is 1000000"),
    ],
)
def test_bad_gguf_tokenizers(change: dict, message: str):
    with pytest.raises(ModelFileError, match=message):
        gguf_tokenizer(byte_level_metadata() | change, "a.gguf")


def test_an_unknown_pre_tokenizer_blocks_only_what_needs_text():
    tokenizer = gguf_tokenizer(byte_level_metadata() | {"tokenizer.ggml.pre": "other"}, "a.gguf")
    with pytest.raises(ModelFileError, match="a.gguf: the pre-tokenizer 'other' is not known.*smollm.*Pass token ids"):
        tokenizer.encode("text")


@pytest.mark.parametrize(
    ("name", "like"),
    [("deepseek-r1-qwen", "qwen2"), ("llama-v3", "llama-bpe"), ("olmo", "gpt-2"), ("dbrx", "smaug-bpe")],
)
def test_pre_tokenizers_of_one_kind_split_alike(name: str, like: str):
    text = "I've 12345 abc\n\n  de f"
    one, other = (gguf_tokenizer(byte_level_metadata() | {"tokenizer.ggml.pre": n}, "a.gguf") for n in (name, like))
    assert one.encode(text).tolist() == other.encode(text).tolist() and one.adds_bos == other.adds_bos


def test_model_without_a_tokenizer_refuses_text(fixtures: Path):
    tokenizer = open_model(fixtures / "llama3").tokenizer
    for use in (lambda: tokenizer.encode("text"), lambda: tokenizer.decode([1])):
        with pytest.raises(ModelFileError, match=r"no tokenizer\.json"):
            use()
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 2, 0)


def test_bad_text_and_ids(word_level: Path):
    tokenizer = read_tokenizer_json(word_level, {})
    with pytest.raises(DataError, match="surrogate at character 1"):
        tokenizer.encode("a\ud800")
    for ids in ([3], [-1], np.asarray([1, 9])):
        with pytest.raises(InputError, match="the vocabulary has 3"):
            tokenizer.decode(ids)
    assert tokenizer.decode([]) == ""


@pytest.fixture
def vocabulary_files(tmp_path: Path) -> Path:
    """A folder with vocab.json and merges.txt, as the package's own trainer writes them."""
    trained = tokenizers.ByteLevelBPETokenizer()
    trained.train_from_iterator(["the list of the lists", "a list is a list 123"], vocab_size=280, min_frequency=1)
    trained.save_model(str(tmp_path))
    return tmp_path


def test_vocab_and_merges_are_byte_level_bpe(vocabulary_files: Path):
    size = len(json.loads((vocabulary_files / "vocab.json").read_text()))
    added = {str(size): {"content": "</s>", "special": True}}
    config = {"tokenizer_class": "GPT2TokenizerFast", "add_bos_token": True, "added_tokens_decoder": added}
    (vocabulary_files / "tokenizer_config.json").write_text(json.dumps(config))
    found = read_vocabulary_files(vocabulary_files, {"bos_id": size, "eos_id": size})
    oracle = tokenizers.ByteLevelBPETokenizer(
        str(vocabulary_files / "vocab.json"), str(vocabulary_files / "merges.txt")
    )
    for text in ("the lists 12", "é\n  tab\t!", "isn't a list"):
        assert found.encode(text).tolist() == oracle.encode(text).ids
        assert found.decode(found.encode(text)) == text
    assert found.encode("a</s>").tolist() == [*oracle.encode("a").ids, size] and found.adds_bos


def test_a_split_that_is_not_known_blocks_only_what_needs_text(vocabulary_files: Path):
    (vocabulary_files / "tokenizer_config.json").write_text('{"tokenizer_class": "CodeGenTokenizer"}')
    tokenizer = read_vocabulary_files(vocabulary_files, {"bos_id": 1})
    with pytest.raises(ModelFileError, match="merges.txt of a CodeGenTokenizer, .*GPT2Tokenizer, Qwen2Tokenizer"):
        tokenizer.encode("text")
    (vocabulary_files / "tokenizer_config.json").unlink()
    (vocabulary_files / "vocab.json").write_text('{"a": 0, "b": 2}')
    with pytest.raises(ModelFileError, match="its ids are not 0 to 1"):
        read_vocabulary_files(vocabulary_files, {})


def test_runs_of_spaces_of_a_users_own_are_pieces_and_no_new_ids():
    """As in Gemma's files, where "   " stands for the piece of three escaped spaces."""
    pieces = [*PIECES, "  ", "   ", "\n\n"]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": np.asarray([*SCORES, -1e3, -1e3, -1e3], np.float32),
        "tokenizer.ggml.token_type": np.asarray([2, 3, 3] + [6] * 256 + [1] * (len(PIECES) - 259) + [4] * 3, np.int32),
        "tokenizer.ggml.add_space_prefix": False,
    }
    tokenizer = gguf_tokenizer(metadata, "a.gguf")
    assert tokenizer.vocab_size == len(pieces)
    two, three, lines = (len(PIECES) + i for i in range(3))
    a, b = pieces.index("a"), pieces.index("b")
    assert tokenizer.encode("a   b").tolist() == [a, three, b]
    assert tokenizer.encode("  b\n\na").tolist() == [two, b, lines, a]
    assert tokenizer.decode(tokenizer.encode("a   b\n\n  a")) == "a   b\n\n  a"
