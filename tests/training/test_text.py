"""The training text and its tokenizer."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from qjax.errors import DataError, InputError
from qjax.training.text import END_OF_TEXT, TrainingText, docstrings, documentation, train_tokenizer


def test_held_out_text_is_the_last_part_of_the_topics_and_not_in_the_training_text():
    from pydoc_data.topics import topics

    whole = "\n\n".join(topics[key] for key in sorted(topics))
    training, held_out = documentation()
    assert (training, held_out) == (whole[: int(0.85 * len(whole))], whole[int(0.85 * len(whole)) :])


def test_docstrings_are_sorted_unique_and_without_tests(tmp_path):
    long = "A sentence that is long enough to be taken as English text."
    files = {
        "b.py": f'"""{long}"""\ndef f():\n    """{long}"""\n',
        "a/m.py": f'def g():\n    """G. {long}"""\nclass C:\n    """C. {long}"""\n    def h():\n        """short"""\n',
        "test/t.py": f'"""T. {long}"""',
        "config-3.11-linux/c.py": f'"""X. {long}"""',
        "template.py": "def {name}(: not Python",
    }
    for name, source in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(source)
    assert docstrings(tmp_path) == [f"G. {long}\n\nC. {long}", long]


def test_a_folder_without_docstrings_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"text\.docstrings=false"):
        docstrings(tmp_path)


@pytest.fixture(scope="module")
def small_tokenizer() -> Tokenizer:
    return train_tokenizer(["the function returns the value of the argument " * 20], 280)


@given(st.text(alphabet=st.characters(exclude_categories=("Cs",))))
@settings(max_examples=50, deadline=None)
def test_tokenizer_round_trips_any_text(small_tokenizer, text):
    ids = small_tokenizer.encode(text.replace(END_OF_TEXT, "")).ids
    assert small_tokenizer.decode(ids) == text.replace(END_OF_TEXT, "")


def test_tokenizer_is_deterministic_and_stream_marks_documents(small_tokenizer):
    again = train_tokenizer(["the function returns the value of the argument " * 20], 280)
    assert again.to_str() == small_tokenizer.to_str()
    text = TrainingText(("the value", "the argument"), "held out")
    stream = text.stream(small_tokenizer)
    assert np.count_nonzero(stream == 0) == 2
    assert stream[0] == 0
    assert small_tokenizer.decode(stream.tolist()) == "the valuethe argument"


def test_vocabularies_that_cannot_be_are_refused():
    with pytest.raises(InputError, match="at least 257"):
        train_tokenizer(["text"], 256)
    with pytest.raises(DataError, match=r"lower model\.vocab_size"):
        train_tokenizer(["text"], 2048)
