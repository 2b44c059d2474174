"""What a `profile.json` holds (format 2), and reading one that may come from anywhere.

Reports, cards and comparisons are made from that file alone, often not by the run or the machine
that wrote it. So its shape is checked once, here, and everything above this module trusts it: a
value that is there has the type below, a value that is not known is absent or null, numbers are
finite. Keys this version does not know are passed over, so that a newer run's file can be read.

A pair is a value and its standard error, or the ends of an interval; what is not known or was not
finite is null. Standard library only.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..estimates import LARGEST

NAME = "profile.json"
FORMAT = 2
_MOST = 512 << 20  # bytes; ten models on the whole of MMLU have a few MB
_DEPTH = 32
PAIRED = ("lost", "lost_interval", "paired_with")  # what a task has against the reference


def _number(value: Any) -> bool:
    return type(value) in (int, float) and -LARGEST <= value <= LARGEST  # nor NaN


def _pair(value: Any) -> bool:
    return _numbers(value) and len(value) == 2


def _numbers(value: Any) -> bool:
    return isinstance(value, list) and all(v is None or _number(v) for v in value)


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(v, list) and len(v) == 2 and _text(v[0]) and type(v[1]) is int for v in value
    )


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) for v in value)


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _object(value: Any) -> bool:
    return isinstance(value, dict)


Leaf = Callable[[Any], bool]
_LEAVES: dict[Leaf, str] = {
    _number: "a number of sensible size",
    _pair: "a number with its error, or two ends",
    _numbers: "a list of numbers",
    _sizes: "a list of names with a number each",
    _text: "text",
    _texts: "a list of texts",
    _flag: "true or false",
    _object: "an object",
}
# A dict names fields, each of which may be missing; `...` is any name; a list is a list of such.
_BY_POSITION = {
    "from": _number,
    "to": _number,
    "kl": _pair,
    "top1": _pair,
    "nll_lost": _pair,
    "perplexity": _pair,
}
_DOMAIN = {
    "sha256": _text,
    "chat": _flag,
    "seqlen": _number,
    "tokens": _number,
    "perplexity": _pair,
    "nll_lost": _pair,
    "nll_lost_interval": _pair,
    "kl": _pair,
    "top1": _pair,
    "topk": {...: _pair},
    "by_position": [_BY_POSITION],
    "rows": {...: _numbers},
}
_LENGTH = {
    "text": _text,
    "sha256": _text,
    "most_tokens": _number,
    "length": _number,
    "tokens": _number,
    "dynamic_ntk": _flag,
    "logn": _flag,
    "perplexity": _pair,
}
_TASK = {
    "metric": _text,
    "score": _pair,
    "n": _number,
    "shots": _number,
    "chat_template": _flag,
    "preset": _text,
    "limit": _number,
    "source": _text,
    "harness": _text,
    "model": _text,
    "questions": _numbers,
    "asked": _text,
    "mean": _text,
    "subjects": _sizes,
    "higher_is_better": _flag,
    "lost": _pair,
    "lost_interval": _pair,
    "paired_with": _text,
}
_SPEED = {
    "preset": _text,
    "context": _number,
    "new_tokens": _number,
    "batch": _number,
    "compile": _flag,
    "cache": _text,
    "kernel": _text,
    "runs": [{"prefill_s": _number, "decode_s": _number, "total_s": _number}],
    "ttft_s": _pair,
    "decode_tokens_per_s": _number,
    "decode_range": _pair,
    "slow_kernel": _text,
    "qwen_tokens_per_s": _number,
    "inter_token_ms": dict.fromkeys(("p50", "p90", "p99", "max"), _number),
    "notes": _texts,
    "bytes_per_token": _number,
    "copy_bytes_per_s": _number,
    "bandwidth_share": _number,
}
_MEMORY = {
    "what": _text,
    "context": _number,
    "new_tokens": _number,
    "cache": _text,
    "weights_bytes": _number,
    "peak_bytes": _number,
    "allocator_peak_bytes": _number,
    "process_peak_bytes": _number,
    "qwen_gib": _number,
    "kl": _pair,
    "notes": _texts,
}
_LOAD = {
    "kernel": _text,
    "slow_kernel": _text,
    "method": _text,
    "weight_bytes": _number,
    "file_bytes": _number,
    "reference": _flag,
    "weights": {...: _text},
}
_MODEL = {
    "load": _LOAD,
    "accuracy": {"domains": {...: _DOMAIN}},
    "layers": {"linears": {...: {"relative_error": _number}}},
    "long_context": {"text": _text, "rows": [_LENGTH]},
    "tasks": {...: _TASK},
    "speed": {...: _SPEED},
    "memory": {...: _MEMORY},
}
_PROFILE: dict[Any, Any] = {
    "reference": _text,
    "protocol": _object,
    "seeds": {...: _number},
    "machine": {
        "device": _text,
        "threads": _number,
        "versions": {...: _text},
        "gpu": _object,
        "driver": _text,
        "date": _text,
    },
    "models": {...: _MODEL},
    "aside": {...: _MODEL},
}


def read_profile(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The profile in a file, its shape known to be right.

    Raises:
        InputError: there is no such file, it is no JSON, not of this format, or a value in it is
            not what it has to be; the message names it.
    """
    given = Path(path)
    try:
        if (size := given.stat().st_size) > _MOST:
            raise InputError(str(path), expected=f"at most {_MOST >> 20} MiB", got=size)
        found = json.loads(given.read_bytes().decode(), parse_constant=_no_number)
    except (OSError, ValueError, RecursionError) as error:
        got = error.strerror if isinstance(error, OSError) else error
        raise InputError(
            str(path),
            expected=f"a {NAME}",
            got=got,
            cure="`qquant profile` writes one.",
        ) from error
    return checked(found, str(path))


def _no_number(text: str) -> float:
    raise ValueError(f"{text}, which is no JSON")


def checked(found: Any, where: str = NAME) -> dict[str, Any]:
    """`found`, once its shape is known to be right; `where` names it in an error.

    Raises:
        InputError: see `read_profile`.
    """
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise InputError(
            where,
            expected=f"a profile of format {FORMAT}",
            got=f"format {found.get('format')!r}" if isinstance(found, dict) else "something else",
            cure="Measure again with this version of qquant.",
        )
    for key, kind, got in _wrong(found, _PROFILE, ""):
        raise InputError(f"{where}: {key}", expected=kind, got=type(got).__name__)
    try:  # half a surrogate pair or an infinity (1e999) could not be written
        json.dumps(found, ensure_ascii=False, allow_nan=False).encode()
        depth = _depth(found)
    except (ValueError, RecursionError) as error:
        expected = "finite numbers, and text in UTF-8"
        raise InputError(where, expected=expected, got=error) from error
    if depth > _DEPTH:
        raise InputError(where, expected=f"at most {_DEPTH} levels", got=depth)
    for part in ("protocol", "machine", "models"):
        if not isinstance(found.get(part), dict):
            raise InputError(f"{where}: {part}", expected="an object", got="none")
    return found


def _wrong(value: Any, shape: Any, where: str) -> Iterator[tuple[str, str, Any]]:
    """`(key, what it has to be, what is there)` of everything that is something else."""
    if value is None:
        return
    if callable(shape):
        if not shape(value):
            yield where, _LEAVES[shape], value
    elif isinstance(shape, list):
        if not isinstance(value, list):
            yield where, "a list", value
            return
        for number, item in enumerate(value):
            if not isinstance(item, dict):
                yield f"{where}[{number}]", "an object", item
            yield from _wrong(item, shape[0], f"{where}[{number}]")
    elif not isinstance(value, dict):
        yield where, "an object", value
    else:
        for key, item in value.items():
            inner = shape.get(key, shape.get(...))
            if inner is None:
                continue
            name = f"{where}.{key}" if where else key
            if item is None and ... in shape:
                yield name, "not null", item
            yield from _wrong(item, inner, name)


def known(found: Mapping[str, Any]) -> dict[str, Any]:
    """The profile without what is null in its models (pairs without a value, unknown figures) and
    without losses against another than the reference.

    What is made of a profile goes by this, so that "is there" and "is known" are the same.
    """
    models, reference = _known(found["models"]), found.get("reference")
    theirs = (of(models, reference, "tasks") if reference else None) or {}
    for entry in models.values():
        for task, got in (of(entry, "tasks") or {}).items():
            if got.get("paired_with") != reference or task not in theirs:
                for key in PAIRED:
                    got.pop(key, None)
    return {**found, "models": models}


def _known(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {key: _known(item) for key, item in value.items()}
        return {key: item for key, item in kept.items() if item is not None}
    if isinstance(value, list):
        if len(value) == 2 and value[0] is None:
            return None
        return [_known(item) if isinstance(item, dict) else item for item in value]
    return value


def _depth(value: Any) -> int:
    level, depth = [value], 0
    while level and depth <= _DEPTH:
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inner += item.values()
            elif isinstance(item, list) and any(isinstance(v, (dict, list)) for v in item):
                inner += item
        level, depth = inner, depth + 1
    return depth


def of(entry: Mapping[str, Any], *path: str) -> Any:
    """The value at `path`, or None where any of it is missing or null."""
    value: Any = entry
    for key in path:
        if not isinstance(value, Mapping):
            return None
        value = value.get(key)
    return value
