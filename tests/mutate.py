"""Spoils files for the fuzz targets: bytes, lines, JSON values and safetensors headers.

Every function takes its randomness as an argument, a seeded `random.Random` in `scripts/fuzz.py`
and one that hypothesis draws (and shrinks) in the tests. Standard library only.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from random import Random
from typing import Any

# What a reader of JSON may meet where it expects something else.
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 3, 7, 2**31, 2**63, 10**30, 10**9, 10**400),
    *(0.5, -0.5, 1e308, -1e-320, math.nan, math.inf, -math.inf),
    *("", "0", "-1", "4", "\x00", "a\nb", "\x1b[2J", "../x", "/etc/passwd", "\ud800", "字" * 300),
    *([], [[]], [0], [None, -1], {}, {"": {}}, {"type": "x", "factor": "y"}),
)
# What may stand in the text where nothing expects it.
SCRAPS = (
    *(b"\x00", b"\xff", b"\xef\xbb\xbf", b"\xff\xfe", b"\n\n", b'"', b"{", b"}", b"[", b"]", b","),
    *(b"null", b"NaN", b"-", b"1e999", b"9" * 5000, b"[" * 3000, b'{"a":' * 3000, b"\\ud800"),
    *(b"=", b" ", b"\r", b"A" * 300, b"\xed\xa0\x80", b"../", b"1", b"-1"),
)

Mutator = Callable[[Random, bytes], bytes]


def mutate_bytes(random: Random, data: bytes) -> bytes:
    """One to four small changes anywhere."""
    out = bytearray(data)
    for _ in range(random.randint(1, 4)):
        at = random.randint(0, len(out))
        size = random.choice((1, 1, 2, 8, 64))
        match random.randint(0, 6):
            case 0:
                out[at : at + 1] = bytes((random.randint(0, 255),))
            case 1:
                out[at:at] = random.choice(SCRAPS)
            case 2:
                del out[at : at + size]
            case 3:
                out[at:at] = out[at : at + size]
            case 4:
                out[at : at + size] = random.choice(SCRAPS)
            case 5:
                del out[at:]
            case _:
                other = random.randint(0, len(out))
                out[at:at] = out[other : other + size]
    return bytes(out)


def mutate_lines(random: Random, data: bytes) -> bytes:
    """Lines dropped, doubled, moved and spoiled."""
    lines = data.split(b"\n")
    for _ in range(random.randint(1, 3)):
        at = random.randrange(len(lines))
        match random.randint(0, 4):
            case 0 if len(lines) > 1:
                del lines[at]
            case 1:
                lines.insert(random.randint(0, len(lines)), lines[at])
            case 2:
                other = random.randrange(len(lines))
                lines[at], lines[other] = lines[other], lines[at]
            case 3:
                lines[at] = mutate_bytes(random, lines[at])
            case _:
                words = lines[at].split(b" ")
                words[random.randrange(len(words))] = random.choice(SCRAPS)
                lines[at] = b" ".join(words)
    return b"\n".join(lines)


def mutate_value(random: Random, value: Any) -> Any:
    """A JSON value with one of its parts changed, dropped, added or doubled under another name."""
    if isinstance(value, (dict, list)) and value and random.randint(0, 9):
        whole = value.copy()
        keys = list(whole) if isinstance(whole, dict) else list(range(len(whole)))
        key = random.choice(keys)
        action = random.randint(0, 11)
        if action == 0:
            del whole[key]
        elif action == 1 and isinstance(whole, dict):
            whole[str(random.choice(ODD))] = whole[key]
        elif action == 1:
            whole.append(whole[key])
        elif action == 2:
            whole[key] = whole[random.choice(keys)]
        else:
            whole[key] = mutate_value(random, whole[key])
        return whole
    if isinstance(value, int) and not random.randint(0, 2):
        return value + random.choice((-1, 1, value, -2 * value))
    if isinstance(value, str) and not random.randint(0, 2):
        spoiled = mutate_bytes(random, value.encode("utf-8", "surrogatepass"))
        return spoiled.decode("utf-8", "replace")
    return random.choice(ODD)


def mutate_json(random: Random, data: bytes) -> bytes:
    """As `mutate_value`, up to three times; now and then the text is spoiled too."""
    value = json.loads(data)
    for _ in range(random.randint(1, 3)):
        value = mutate_value(random, value)
    text = json.dumps(value).encode()
    return text if random.randint(0, 5) else mutate_bytes(random, text)


def mutate_records(random: Random, data: bytes) -> bytes:
    """JSON lines: one line's value spoiled, or the lines themselves."""
    lines = data.split(b"\n")
    full = [i for i, line in enumerate(lines) if line.strip()]
    if not full or not random.randint(0, 2):
        return mutate_lines(random, data)
    at = random.choice(full)
    lines[at] = mutate_json(random, lines[at])
    return b"\n".join(lines)


def mutate_safetensors(random: Random, data: bytes) -> bytes:
    """The header's values spoiled, its length kept true or not; sometimes the data's size too."""
    if not random.randint(0, 3):
        return mutate_bytes(random, data)
    length = int.from_bytes(data[:8], "little")
    raw, rest = mutate_json(random, data[8 : 8 + length]), data[8 + length :]
    said = random.choice((len(raw),) * 6 + (0, 1, len(raw) + 8, 10**8 + 1, 2**63, 2**64 - 1))
    if not random.randint(0, 5):
        rest = mutate_bytes(random, rest)
    return said.to_bytes(8, "little") + raw + rest


MUTATORS: dict[str, Mutator] = {
    "bytes": mutate_bytes,
    "lines": mutate_lines,
    "json": mutate_json,
    "records": mutate_records,
    "safetensors": mutate_safetensors,
}
