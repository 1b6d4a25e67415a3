"""Damage to valid files: bytes changed, cut out, doubled or moved, and entries of their JSON changed."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

__all__ = ["damaged", "damaged_description", "damaged_json"]

_EDGES = [0, 1, 2, 7, 8, 31, 32, 127, 128, 255, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**63 - 1, 2**64 - 1]
_VALUES = [None, True, False, -1, 0, 1, 2, 2**31, 2**63, 2**64, 1e308, 1.5, "", "a", "../x", "/etc/x", [], {}, [0]]
_TOKENS = [
    b'"',
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"null",
    b"\\u0000",
    b"\xff",
    b"1e999",
    b"-1",
    b"../",
    b"/etc/passwd",
]


def damaged(data: bytes, rng: random.Random) -> bytes:
    """One to four changes of `data`; the beginning, where headers are, is changed more often."""
    piece = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        size = len(piece)
        if not size:
            break
        reach = size if rng.random() < 0.4 else min(size, rng.choice((16, 64, 512, 4096)))
        at = rng.randrange(reach)
        match rng.randrange(8):
            case 0:
                piece[at] ^= 1 << rng.randrange(8)
            case 1:
                piece[at] = rng.randrange(256)
            case 2:
                width = rng.choice((1, 2, 4, 8))
                piece[at : at + width] = (rng.choice(_EDGES) % 256**width).to_bytes(width, "little")
            case 3:
                del piece[at:]
            case 4:
                del piece[at : at + rng.randrange(1, 40)]
            case 5:
                end = at + rng.randrange(1, 40)
                piece[at:at] = piece[at:end]
            case 6:
                piece[at:at] = rng.choice(_TOKENS)
            case _:
                other = rng.randrange(size)
                count = rng.randrange(1, 16)
                piece[at : at + count] = piece[other : other + count]
    return bytes(piece)


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, dict):
        for key in value:
            yield value, key
            yield from _places(value[key])
    elif isinstance(value, list):
        for key in range(min(len(value), 8)):
            yield value, key
            yield from _places(value[key])


def damaged_json(data: bytes, rng: random.Random) -> bytes:
    """A JSON file with one to three of its entries replaced, removed or renamed."""
    value = json.loads(data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        places = list(_places(value))
        if not places:
            break
        holder, key = rng.choice(places)
        match rng.randrange(3):
            case 0:
                holder[key] = rng.choice(_VALUES)
            case 1:
                del holder[key]
            case _:
                holder[key] = rng.choice(places)[0] if rng.random() < 0.1 else rng.choice(_VALUES)
        try:
            json.dumps(value)
        except ValueError:  # it holds itself now
            return data
    return json.dumps(value).encode()


def damaged_description(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file whose operator's description is changed as JSON is, the tensors left as they are."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    about = header.get("__metadata__", {})
    if "spec" not in about:
        return damaged(data, rng)
    about["spec"] = damaged_json(about["spec"].encode(), rng).decode()
    encoded = json.dumps(header).encode()
    return len(encoded).to_bytes(8, "little") + encoded + data[end:]
