"""Damage valid model files and read them: a typed error or a whole result, in bounded time and memory, nothing else.

    python scripts/fuzz.py --inputs 1000000 --workers 2 [--seed 1] [--reader gguf|index|tokenizer|artifact]

Four readers: a GGUF file (header, configuration, tokenizer, every tensor), a folder with a safetensors index and two
shards, `tokenizer.json` and piece lists, and an artifact. An input is a valid file with some of its bytes changed, cut
out, doubled, moved or replaced by numbers at the edges of their range, or with entries of its JSON changed.

What is wrong: an error that is no `QjaxError`, more than a second, an allocation that Python's tracer sees above twice
the size of the files and a fixed allowance, a peak of the process that one input raises by more, a file opened outside
the folder, and any use of pickle.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import gc
import json
import os
import pathlib
import pickle
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from scripts.damage import damaged, damaged_description, damaged_json  # noqa: E402

NAMES = ("gguf", "index", "tokenizer", "artifact")
SECONDS = 1.0
ALLOWANCE = 4 << 20  # of the interpreter and the libraries, independent of the input
NATIVE = 64 << 20  # of what Python's tracer does not see: threads of the storage engine with arenas of their own
LIMIT = 8 << 30  # of a process, so that the machine survives what is looked for


def in_memory() -> str | None:
    """A folder in memory where there is one: an input is written and read in a third of the time."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


class Reader:
    """A folder of valid files, the files that are damaged, and what reads them."""

    def __init__(self, name: str, folder: pathlib.Path, files: list[str], read: Callable[[], object], seal: Any = None):
        self.name, self.folder, self.read, self.seal = name, folder, read, seal
        self.valid = {file: (folder / file).read_bytes() for file in files}
        self.bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

    def inputs(self, rng: random.Random) -> Iterator[str]:
        """Damage one file after the other in place; yields its name and puts it back."""
        names = list(self.valid)
        while True:
            name = rng.choice(names)
            data = self.valid[name]
            structured = name.endswith("json") and len(data) < 50_000 and rng.random() < 0.5
            change = damaged_json if structured else damaged
            if self.seal is not None and name.endswith(".safetensors") and rng.random() < 0.7:
                change = damaged_description
            (self.folder / name).write_bytes(change(data, rng))
            sealed = self.seal is not None and name != "checksums.json" and rng.random() < 0.7
            if sealed:  # as someone would who means harm
                self.seal(self.folder)
            yield name
            (self.folder / name).write_bytes(data)
            if sealed:
                self.seal(self.folder)


def _gguf_file(path: pathlib.Path) -> None:
    import gguf
    import numpy as np

    width, middle, vocab = 32, 32, 270
    writer = gguf.GGUFWriter(path, "llama")
    for add, value in (
        (writer.add_block_count, 1),
        (writer.add_context_length, 64),
        (writer.add_embedding_length, width),
        (writer.add_feed_forward_length, middle),
        (writer.add_head_count, 4),
        (writer.add_head_count_kv, 2),
        (writer.add_layer_norm_rms_eps, 1e-5),
    ):
        add(value)
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *"abcdefgh", "ab", "abc", "de"]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_scores([-float(i) for i in range(len(pieces))])
    writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * (len(pieces) - 259)])
    rng = np.random.default_rng(0)
    shapes = {"attn_q": (width, width), "attn_k": (16, width), "attn_v": (16, width), "attn_output": (width, width)}
    shapes |= {"ffn_gate": (middle, width), "ffn_up": (middle, width), "ffn_down": (width, middle)}
    for name, shape in {"token_embd": (vocab, width), **{f"blk.0.{n}": s for n, s in shapes.items()}}.items():
        writer.add_tensor(f"{name}.weight", rng.standard_normal(shape).astype(np.float32))
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(width, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _sharded(folder: pathlib.Path) -> None:
    from safetensors.numpy import save_file

    from qjax.models import open_model

    source = REPOSITORY / "tests" / "fixtures" / "models" / "llama3"
    weights = open_model(source).weights
    names = sorted(weights.names)
    table = {}
    for index in range(2):
        file = f"model-0000{index + 1}-of-00002.safetensors"
        save_file({name: weights.read(name) for name in names[index::2]}, folder / file)
        table |= dict.fromkeys(names[index::2], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))
    shutil.copyfile(source / "config.json", folder / "config.json")


def _artifact(folder: pathlib.Path) -> None:
    import jax
    import numpy as np
    import tokenizers

    from qjax import codebooks, incoherence, models, rounding
    from qjax.interchange import artifact
    from qjax.linalg.kronecker import Hessian
    from qjax.matrix import LowRank, Sum
    from qjax.matrix.quantize import quantize_matrix

    model = models.load(REPOSITORY / "tests" / "fixtures" / "models" / "llama3")
    model.params["blocks"] = [dict(block) for block in model.params["blocks"]]
    down = model.params["blocks"][0]["mlp"]["down_proj"]["weight"]
    matrix, _ = quantize_matrix(
        np.asarray(down),
        Hessian(np.eye(down.shape[1], dtype=np.float32), None),
        codebook=codebooks.make("half_integer", 2),
        rounding=rounding.make("nearest"),
        incoherence=incoherence.make("hadamard"),
        key=jax.random.key(0),
    )
    out, inner = down.shape
    thin = LowRank(np.ones((out, 1), np.float32), np.ones((1, inner), np.float32), 0.5)
    mlp = model.params["blocks"][0]["mlp"]
    model.params["blocks"][0]["mlp"] = {**mlp, "down_proj": {"weight": Sum((matrix, thin))}}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    whole = models.Model(model.config, model.params, models.Tokenizer(backend), "fuzz", "fuzz", model.fingerprint)
    artifact.save(folder, whole, whole.params)


def readers(folder: pathlib.Path, only: str | None = None) -> list[Reader]:
    """The four readers on small valid files below `folder`."""
    from qjax.interchange import artifact
    from qjax.models import open_model
    from qjax.models.tokenizers.tokenizer import read_tokenizer_json
    from qjax.models.tokenizers.vocabularies import read_piece_list

    def everything(path: pathlib.Path) -> None:
        weights = open_model(path).weights
        for name in sorted(weights.names):
            weights.read(name)

    made: list[Reader] = []
    for name in NAMES:
        if only not in (None, name):
            continue
        place = folder / name
        if name != "artifact":
            place.mkdir(parents=True)
        if name == "gguf":
            _gguf_file(place / "m.gguf")
            made.append(Reader(name, place, ["m.gguf"], lambda place=place: everything(place / "m.gguf")))
        elif name == "index":
            _sharded(place)
            files = ["model.safetensors.index.json", "config.json"]
            files += [path.name for path in sorted(place.glob("*.safetensors"))]
            made.append(Reader(name, place, files, lambda place=place: everything(place)))
        elif name == "tokenizer":
            import tokenizers

            bpe = tokenizers.models.BPE({"a": 0, "b": 1, "ab": 2, "<s>": 3}, [("a", "b")])
            backend = tokenizers.Tokenizer(bpe)
            backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
            backend.decoder = tokenizers.decoders.ByteLevel()
            backend.add_special_tokens(["<s>"])
            (place / "tokenizer.json").write_text(backend.to_str(pretty=True))
            pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *"abcdefgh", "ab", "abc"]
            (place / "vocab.json").write_text(json.dumps(pieces))

            def both(place: pathlib.Path = place) -> None:
                special = {"bos_id": 1, "eos_id": 2}
                for tokenizer in (
                    read_piece_list(place / "vocab.json", special),
                    read_tokenizer_json(place / "tokenizer.json", special),
                ):
                    tokenizer.decode(tokenizer.encode("ab c"))

            made.append(Reader(name, place, ["tokenizer.json", "vocab.json"], both))
        else:
            folder.mkdir(parents=True, exist_ok=True)
            _artifact(place)
            files = [str(path.relative_to(place)) for path in sorted(place.rglob("*")) if path.is_file()]
            made.append(Reader(name, place, files, lambda place=place: artifact.load(place), artifact.seal))
    return made


class Watch:
    """Files opened outside the allowed folders while it is on, and pickle made to fail."""

    def __init__(self) -> None:
        self.allowed: tuple[str, ...] = ()
        self.outside: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.allowed:
            return
        if event == "pickle.find_class":
            self.outside.append(f"pickle {arguments}")
        elif event == "open" and isinstance(arguments[0], str | bytes):
            path = os.path.realpath(os.fsdecode(arguments[0]))
            if not path.startswith(self.allowed):
                self.outside.append(path)


def _poisoned(*arguments: object, **options: object) -> Any:
    raise AssertionError("pickle was used on an input")


def _peak_of_reading_again(reader: Reader) -> int:
    """What one more reading allocates: a library's first use of something (an import, a table) is not the input's."""
    base = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    with contextlib.suppress(Exception):  # it was judged the first time
        reader.read()
    return tracemalloc.get_traced_memory()[1] - base


def _peak_of_the_process() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def fuzz(reader: Reader, inputs: int, seed: int, watch: Watch, seconds: float = float("inf")) -> dict[str, Any]:
    """Read up to `inputs` damaged inputs; returns counts and what was wrong."""
    from qjax.errors import QjaxError

    rng = random.Random(f"{reader.name} {seed}")
    reader.read()  # imports and compilations are not the input's
    system = [sys.prefix, sys.base_prefix, str(REPOSITORY), "/proc", "/sys", "/dev"]
    watch.allowed = (os.path.realpath(reader.folder), *map(os.path.realpath, system))
    kept = pickle.load, pickle.loads
    pickle.load = pickle.loads = _poisoned  # type: ignore[assignment]
    counts = {"inputs": 0, "refused": 0, "read": 0, "slowest": 0.0, "largest": 0}
    wrong: list[str] = []
    begun = time.monotonic()
    tracemalloc.start()
    try:
        for name in reader.inputs(rng):
            if counts["inputs"] >= inputs or time.monotonic() - begun > seconds:
                break
            counts["inputs"] += 1
            if counts["inputs"] % 2000 == 0:
                gc.collect()
            base = tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
            before, resident = time.process_time(), _peak_of_the_process()
            where = f"{reader.name}, input {counts['inputs']} ({name})"
            try:
                reader.read()
                counts["read"] += 1
            except QjaxError:
                counts["refused"] += 1
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                wrong.append(f"{where}: {type(error).__name__}: {str(error)[:200]}")
            spent, peak = time.process_time() - before, tracemalloc.get_traced_memory()[1] - base
            counts["slowest"] = max(counts["slowest"], spent)
            if spent > SECONDS:
                wrong.append(f"{where}: {spent:.2f} s")
            if peak > 2 * reader.bytes + ALLOWANCE:
                peak = _peak_of_reading_again(reader)
            if peak > 2 * reader.bytes + ALLOWANCE:
                wrong.append(f"{where}: {peak} bytes allocated, the files have {reader.bytes}")
            counts["largest"] = max(counts["largest"], peak)
            if (raised := _peak_of_the_process() - resident) > 2 * reader.bytes + NATIVE:
                wrong.append(f"{where}: raised the peak of the process by {raised} bytes")
            if watch.outside:
                wrong.append(f"{where}: opened {watch.outside[:3]}")
                watch.outside.clear()
            if len(wrong) >= 20:
                break
    finally:
        tracemalloc.stop()
        watch.allowed = ()
        pickle.load, pickle.loads = kept
        for file, data in reader.valid.items():
            (reader.folder / file).write_bytes(data)
    return {**counts, "seconds": time.monotonic() - begun, "wrong": wrong}


# Inputs per second on one idle core differ by as much; shares of equal size would leave one core with the artifacts.
PIECE = 25_000


def told(reader: Reader, found: dict[str, Any]) -> None:
    """Print what one round of a reader gave."""
    print(
        f"{reader.name}: {found['inputs']} inputs ({found['refused']} refused, {found['read']} read) in "
        f"{found['seconds']:.0f} s; slowest {found['slowest']:.3f} s, "
        f"largest {found['largest'] / 2**20:.1f} MiB of files of {reader.bytes / 2**20:.2f} MiB; "
        f"{len(found['wrong'])} wrong",
        flush=True,
    )
    for line in found["wrong"]:
        print(f"  {line}", flush=True)


def side_by_side(names: list[str], inputs: int, seed: int, workers: int, seconds: float) -> int:
    """Pieces of every reader's share in processes of their own, `workers` at a time; how many processes failed.

    A process that has not answered long after its piece should be done counts as a hang.
    """
    share, rest = divmod(inputs, len(names))
    pieces = [
        (name, seed + 1_000_003 * number, min(PIECE, share + (index < rest) - start))
        for index, name in enumerate(names)
        for number, start in enumerate(range(0, share + (index < rest), PIECE))
    ]

    def one(piece: tuple[str, int, int]) -> bool:
        name, own_seed, count = piece
        folder = tempfile.mkdtemp(dir=in_memory())
        command = [sys.executable, __file__, "--reader", name, "--inputs", str(count), "--seed", str(own_seed)]
        command += ["--seconds", str(seconds), "--folder", folder]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=120 + count * SECONDS, check=False)
        except subprocess.TimeoutExpired:
            print(f"{name}, seed {own_seed}: a hang: no end after {120 + count * SECONDS:.0f} s: {folder}", flush=True)
            return False
        print(done.stdout.rstrip(), flush=True)
        if done.returncode not in (0, 1):  # it crashed
            print(f"{name}, seed {own_seed}: ended by {done.returncode} at {folder}: {done.stderr[-2000:]}", flush=True)
        else:
            shutil.rmtree(folder)
        return done.returncode == 0

    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        fine = list(pool.map(one, sorted(pieces, key=lambda piece: piece[0] != "artifact")))  # the slowest first
    print(f"{sum(count for _, _, count in pieces)} inputs, {fine.count(False)} of {len(fine)} processes failed")
    return fine.count(False)


def main() -> int:
    """Run what the command line asks for; 1 when something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=10_000, help="over all readers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reader", choices=NAMES, default=None)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="for every reader, or piece with --workers")
    parser.add_argument("--workers", type=int, default=1, help="processes at a time, 25,000 inputs each")
    parser.add_argument("--folder", default=None, help=argparse.SUPPRESS)  # empty, and left as it is after a crash
    options = parser.parse_args()
    if options.workers > 1:
        names = list(NAMES) if options.reader is None else [options.reader]
        return int(side_by_side(names, options.inputs, options.seed, options.workers, options.seconds) > 0)
    bad, watch = 0, Watch()
    resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    with contextlib.ExitStack() as stack:
        folder = options.folder or stack.enter_context(tempfile.TemporaryDirectory(dir=in_memory()))
        made = readers(pathlib.Path(folder) / "files", options.reader)
        share, rest = divmod(options.inputs, len(made))
        for index, reader in enumerate(made):
            found = fuzz(reader, share + (index < rest), options.seed, watch, options.seconds)
            bad += len(found["wrong"])
            told(reader, found)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
