"""Damage done to one file, from a seed: the same seed, the same damage."""

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

_ODD: tuple[Any, ...] = ("text", "", [1], [], {"a": 1}, {}, 3, 1.5, True)
_IN_TREE = ("delete", "wrong type", "null", "huge", "negative", "zero", "deep", "NaN", "duplicate key")
_RAW = ("not UTF-8", "truncated", "bytes flipped", "empty file", "list at the top")
_OF_TENSORS = (
    "delete", "wrong type", "null", "huge", "negative", "truncated", "header flipped", "payload flipped", "NaN in weights",
    "infinity in weights", "renamed tensor", "length of header", "empty file", "more bytes",
)  # fmt: skip


def mutate(path: Path, rng: random.Random) -> str:
    """Damage a file in place; returns what was done, in words."""
    content = path.read_bytes()
    if path.suffix == ".safetensors":
        damaged, said = _tensors(content, rng)
    elif path.suffix == ".jsonl":
        damaged, said = _lines(content, rng)
    else:
        damaged, said = _document(content, rng, is_yaml=path.suffix == ".yaml")
    path.write_bytes(damaged)
    return said


def _document(content: bytes, rng: random.Random, is_yaml: bool = False) -> tuple[bytes, str]:
    how = rng.choice((*_IN_TREE, *_IN_TREE, *_RAW))
    if how in _RAW:
        return _raw(content, how, rng), how
    tree = yaml.safe_load(content) if is_yaml else json.loads(content)
    dump: Callable[[Any], str] = yaml.safe_dump if is_yaml and how != "deep" else json.dumps
    if how == "duplicate key":
        key = rng.choice(list(tree))
        value = rng.choice(_ODD)
        if is_yaml:
            return f"{dump(tree)}\n{key}: {json.dumps(value)}\n".encode(), f"{how} {key}: {value!r}"
        return (
            f"{dump(tree).rstrip()[:-1]}, {json.dumps(key)}: {json.dumps(value)}}}".encode(),
            f"{how} {key}: {value!r}",
        )
    where, said = _change(tree, how, rng)
    return dump(tree).replace('"<deep>"', "[" * 3000 + "]" * 3000).encode(), f"{how} {where}{said}"


def _change(tree: Any, how: str, rng: random.Random) -> tuple[str, str]:
    """Change one entry somewhere in a tree of objects and lists; returns where, and to what."""
    node, path = tree, []
    while True:
        key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        path.append(str(key))
        inner = node[key]
        if not (isinstance(inner, dict | list) and inner and rng.random() < 0.7):
            break
        node = inner
    where = ".".join(path)[:80]
    if how == "delete":
        del node[key]
        return where, ""
    value: Any = {
        "null": None, "huge": rng.choice((10**9, 10**18, 10**30, 1e300)), "negative": rng.choice((-1, -5, -0.5)),
        "zero": 0, "deep": "<deep>", "NaN": float("nan"),
        "wrong type": rng.choice([v for v in _ODD if type(v) is not type(inner)]),
    }[how]  # fmt: skip
    node[key] = value
    return where, f" = {str(value)[:40]!r}"


def _raw(content: bytes, how: str, rng: random.Random) -> bytes:
    if how == "empty file":
        return b""
    if how == "list at the top":
        return b"[1, 2]\n"
    if how == "not UTF-8":
        at = rng.randrange(len(content))
        return content[:at] + b"\xff\xfe\xc3" + content[at:]
    if how == "truncated":
        return content[: rng.randrange(1, len(content))]
    return _flip(content, rng, 0, len(content))


def _flip(content: bytes, rng: random.Random, start: int, stop: int) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 4, 32))):
        changed[rng.randrange(start, stop)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _lines(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    lines = content.splitlines(keepends=True)
    at = rng.randrange(len(lines))
    lines[at], said = _document(lines[at], rng)
    lines[at] = lines[at].rstrip() + b"\n"
    return b"".join(lines), f"line {at}: {said}"


def _tensors(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    length = struct.unpack("<Q", content[:8])[0]
    header, payload = json.loads(content[8 : 8 + length]), content[8 + length :]
    how, said = rng.choice(_OF_TENSORS), ""
    if how == "truncated":
        return content[: rng.randrange(1, len(content))], how
    if how == "empty file":
        return b"", how
    if how == "more bytes":
        return content + b"\0" * 64, how
    if how == "length of header":
        return struct.pack("<Q", rng.choice((0, 1, length * 2, 2**62))) + content[8:], how
    if how == "header flipped":
        return _flip(content, rng, 8, 8 + length), how
    if how == "payload flipped":
        return _flip(content, rng, 8 + length, len(content)), how
    name = rng.choice([n for n in header if n != "__metadata__"])
    if how in ("NaN in weights", "infinity in weights"):
        begin, end = header[name]["data_offsets"]
        at = begin + 4 * rng.randrange((end - begin) // 4)
        value = struct.pack("<f", float("nan" if how.startswith("NaN") else "inf"))
        return content[: 8 + length] + payload[:at] + value + payload[at + 4 :], f"{how}: {name}"
    if how == "renamed tensor":
        header[name + "x"] = header.pop(name)
        said = f": {name}"
    else:
        where, said = _change(header, how, rng)
        said = f" {where}{said}"
    new = json.dumps(header).encode()
    return struct.pack("<Q", len(new)) + new + payload, how + said
