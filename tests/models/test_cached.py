"""Decoding with a cache against whole forward passes; choice of tokens; text as it comes; chat formats."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from experiments import generate as generate_entry
from qjax.errors import InputError
from qjax.models import Tokenizer, forward, generate_batch, load
from qjax.models.kv_cache import empty_cache, step
from qjax.models.sampling import Sampling, choose
from qjax.models.tokenizers.chat import chat_prompt, stop_ids
from qjax.models.tokenizers.text_stream import TextStream
from qjax.models.transformer import embed, head, logits

FAMILIES = ["llama3", "mistral", "mixtral", "opt", "opt_post_norm", "qwen2", "qwen3"]


@pytest.mark.parametrize("family", FAMILIES)
def test_any_split_into_steps_gives_the_logits_of_the_whole(fixtures: Path, family: str):
    model = load(fixtures / family)
    config = model.config
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 12)).astype(np.int32)
    expected = np.asarray(forward(model.params, tokens, config))
    cache, outputs, start = empty_cache(config, 2, 16), [], 0
    for length in (5, 1, 1, 5):
        at = np.full(2, start, np.int32)
        x = embed(model.params["embed"], tokens[:, start : start + length], config, at)
        x, cache = step(model.params["blocks"], x, cache, at, config)
        outputs.append(np.asarray(logits(head(model.params), x, config)))
        start += length
    np.testing.assert_allclose(np.concatenate(outputs, axis=1), expected, rtol=2e-4, atol=2e-4)


@pytest.fixture(scope="module")
def model(fixtures: Path):
    return load(fixtures / "qwen3")


def test_prompts_of_different_lengths_do_not_touch_each_other(model):
    prompts = [[3, 1, 4, 1, 5, 9, 2, 6], [2], [7, 7, 7]]
    together = generate_batch(model.params, model.config, prompts, 5)
    for prompt, found in zip(prompts, together.tokens, strict=True):
        alone = generate_batch(model.params, model.config, [prompt], 5)
        np.testing.assert_array_equal(found, alone.tokens[0])
    assert together.prompt_tokens == 12 and together.steps == 4 and together.tokens_per_second > 0


def test_one_program_and_one_per_block_agree(model):
    by_block, whole = (generate_batch(model.params, model.config, [[3, 1]], 6, whole=w) for w in (False, True))
    np.testing.assert_array_equal(by_block.tokens[0], whole.tokens[0])


def test_a_sequence_that_ended_stays_ended(model):
    free = generate_batch(model.params, model.config, [[3, 1, 4], [2]], 6)
    end = int(free.tokens[0][1])
    seen = []
    found = generate_batch(
        model.params, model.config, [[3, 1, 4], [2]], 6, eos_id=end, on_tokens=lambda new, going: seen.append(going)
    )
    for row, whole in zip(found.tokens, free.tokens, strict=True):
        cut = list(whole).index(end) + 1 if end in whole else 6
        np.testing.assert_array_equal(row, whole[:cut])
    assert seen[0].all() and len(seen) == max(len(row) for row in found.tokens)


def test_samples_are_repeatable_and_their_own(model):
    sampling = Sampling(temperature=20.0, seed=5)  # the random model is very sure of itself
    prompts = [[3, 1, 4]] * 3
    first, again = (generate_batch(model.params, model.config, prompts, 8, sampling=sampling) for _ in range(2))
    for a, b in zip(first.tokens, again.tokens, strict=True):
        np.testing.assert_array_equal(a, b)
    assert len({tuple(row) for row in first.tokens}) == 3
    other = generate_batch(model.params, model.config, prompts, 8, sampling=Sampling(temperature=20.0, seed=6))
    assert tuple(other.tokens[0]) != tuple(first.tokens[0])


def frequencies(sampling, scores, draws=4000):
    keys = jax.random.split(jax.random.key(0), draws)
    found = jax.jit(jax.vmap(lambda key: choose(jnp.asarray(scores, jnp.float32), key, sampling)))(keys)
    return np.bincount(np.asarray(found), minlength=len(scores)) / draws


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"temperature": 1.0}, [0.4, 0.3, 0.2, 0.1]),
        ({"temperature": 0.5}, [16 / 30, 9 / 30, 4 / 30, 1 / 30]),
        ({"temperature": 1.0, "top_k": 2}, [4 / 7, 3 / 7, 0, 0]),
        ({"temperature": 1.0, "top_p": 0.65}, [4 / 7, 3 / 7, 0, 0]),  # 0.4 does not reach it, 0.7 does
        ({"temperature": 1.0, "top_p": 0.75}, [4 / 9, 3 / 9, 2 / 9, 0]),
        ({"temperature": 1.0, "top_p": 1e-6}, [1, 0, 0, 0]),
        ({"temperature": 1.0, "top_k": 3, "top_p": 0.7}, [4 / 7, 3 / 7, 0, 0]),  # of what top_k left: 0.44, 0.78
    ],
)
def test_frequencies_are_the_distribution(options, expected):
    order = np.array([2, 0, 3, 1])  # the likeliest is not the first
    scores = np.log(np.array([0.4, 0.3, 0.2, 0.1]))[np.argsort(order)]
    found = frequencies(Sampling(**options), scores)[order]
    np.testing.assert_allclose(found, expected, atol=5 * np.sqrt(0.25 / 4000))
    assert np.all(found[np.asarray(expected) == 0] == 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"seed": -1}, "seed is -1"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"temperature": 1e-45}, "temperature is 1e-45"),
    ],
)
def test_sampling_refusals(options, message):
    with pytest.raises(InputError, match=message):
        Sampling(**options)


@pytest.mark.parametrize(
    ("key", "value"), [("temperature", "hot"), ("top_p", "a"), ("top_k", 2.5), ("seed", True), ("max_new_tokens", "x")]
)
def test_the_program_refuses_other_types(key, value, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["generate", f"{key}={value}"])
    with pytest.raises(SystemExit) as ended:
        generate_entry.main()
    assert ended.value.code == 2
    assert f"error: {key} is {value!r}" in capsys.readouterr().err


def test_the_program_prints_the_text_as_the_library_makes_it(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    tiny = load("tiny")
    prompt = "The function returns"
    ids = tiny.tokenizer.encode(prompt)
    expected = prompt + tiny.tokenizer.decode(
        generate_batch(tiny.params, tiny.config, [ids], 6, eos_id=tiny.tokenizer.eos_id).tokens[0]
    )
    for stream in ("true", "false"):
        monkeypatch.setattr("sys.argv", ["generate", "max_new_tokens=6", f"stream={stream}", f"prompt={prompt!r}"])
        generate_entry.main()
        printed = capsys.readouterr().out
        assert printed.startswith(expected + "\n") and "new tokens/s]" in printed


def byte_tokenizer(special=()):
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(list(special))
    return Tokenizer(backend)


def test_no_half_character_is_given_out():
    tokenizer = byte_tokenizer()
    text = "naïve – 日本 🙂 end"
    stream, given = TextStream(tokenizer), []
    for token in tokenizer.encode(text):  # one byte each
        given.append(stream.add(int(token)))
    assert "".join(given) + stream.rest() == text
    assert "\ufffd" not in "".join(given) and "🙂" in given
    stream = TextStream(tokenizer)
    first = stream.add(int(tokenizer.encode("é")[0]))  # never completed
    assert first == "" and stream.rest() == "\ufffd"


def test_chat_formats():
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    expected = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    chatml = byte_tokenizer(["<|im_start|>", "<|im_end|>"])
    assert chat_prompt(messages, chatml) == expected
    assert stop_ids(chatml) == (chatml.backend.token_to_id("<|im_end|>"),)
    llama = chat_prompt(messages[1:], byte_tokenizer(["<|start_header_id|>"]))
    assert llama == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    with pytest.raises(InputError, match="no chat format that is known"):
        chat_prompt(messages, byte_tokenizer())
    with pytest.raises(InputError, match="the last one is not the assistant's"):
        chat_prompt([{"role": "assistant", "content": "Hi"}], byte_tokenizer())
    with pytest.raises(InputError, match="needs a role"):
        chat_prompt([{"role": "robot", "content": "Hi"}], byte_tokenizer())
