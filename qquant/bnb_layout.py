"""What a bitsandbytes directory says about itself, and how its tensors are named: no torch needed.

A linear `NAME` with N outputs and K inputs is stored, as bitsandbytes' own state dict has it and
transformers' loader looks for it, as

    4 bits  NAME.weight               two codes to a byte, the first one high, rows one after the
                                      other: uint8 [N·K/2, 1] (or another storage dtype, fewer rows)
            NAME.weight.absmax        float32 [ceil(N·K/64)], the scale of each run of 64 weights
            NAME.weight.quant_map     float32 [16], the value of each code
            NAME.weight.quant_state.bitsandbytes__nf4 (or fp4)
                                      uint8, JSON text: quant_type, blocksize, dtype, shape
      and with double quantization, where absmax is uint8:
            NAME.weight.nested_absmax     float32 [ceil(blocks/256)]
            NAME.weight.nested_quant_map  float32 [256]; nested_offset and so on in the JSON
    8 bits  NAME.weight int8 [N, K], NAME.SCB float32 [N] (the largest magnitude of each row),
            NAME.weight_format uint8, a scalar 0 (plain rows)

    4 bits  w = quant_map[code] · absmax           8 bits  w = weight · SCB / 127
            absmax = nested_quant_map[code] · nested_absmax + nested_offset, when doubly quantized

One thing differs from what bitsandbytes writes: with double quantization the JSON holds a mean that
is known only once the weight has been read, so its text is padded with spaces to a fixed length
(the shards' headers are written before any weight is read). JSON ignores them, so readers do.

The config's keys are those of transformers' `BitsAndBytesConfig.to_dict()`, which a test holds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from .bnb_spec import BLOCK, METHODS, NESTED_BLOCK, STORAGES, BnbSpec
from .errors import CheckpointError
from .headers import TensorInfo

METHOD = "bitsandbytes"
FLOATS = ("float32", "bfloat16", "float16")
_STATE = "weight.quant_state.bitsandbytes__"
_PART = re.compile(
    r"^(.+)\.(weight\.(?:absmax|quant_map|nested_absmax|nested_quant_map"
    r"|quant_state\.bitsandbytes__(?:nf4|fp4))|SCB|weight_format)$"
)
_FLOAT_WIDTH = 24  # the longest float32 as Python writes it has 23 characters
_KINDS = {
    "weight": "codes",
    "weight.absmax": "scales",
    "weight.nested_absmax": "scales",
    "SCB": "scales",
}


@dataclass(frozen=True)
class BnbLayout:
    """A `quantization_config`, read; fields as in `BnbSpec`, `skip` as it stands there."""

    method: str
    compute_dtype: str
    double_quant: bool
    quant_storage: str
    int8_threshold: float
    skip: tuple[str, ...]

    @property
    def bits(self) -> int:
        return 8 if self.method == "int8" else 4

    @property
    def summary(self) -> str:
        """One line for `inspect`."""
        if self.method == "int8":
            return f"bitsandbytes Int8, rows, outliers from {self.int8_threshold:g}"
        doubly = ", double quantization" if self.double_quant else ""
        name = self.method.upper()
        return f"bitsandbytes {name}, blocks of {BLOCK}{doubly}, computes in {self.compute_dtype}"

    @classmethod
    def parse(cls, config: Mapping[str, Any]) -> BnbLayout:
        """From a `quantization_config` whose `quant_method` is bitsandbytes.

        Raises:
            CheckpointError: a value is none that bitsandbytes has; the key is named.
        """

        def bad(key: str, expected: object) -> CheckpointError:
            return CheckpointError(
                f"quantization_config: {key}", expected=expected, got=repr(config.get(key))
            )

        four, eight = (bool(config.get(f"load_in_{n}bit")) for n in (4, 8))
        if four == eight:
            raise bad("load_in_4bit", "either load_in_4bit or load_in_8bit, true")
        method = config.get("bnb_4bit_quant_type", "fp4") if four else "int8"
        if method not in METHODS:
            raise bad("bnb_4bit_quant_type", "nf4 or fp4")
        compute = str(config.get("bnb_4bit_compute_dtype") or "float32").removeprefix("torch.")
        if compute not in FLOATS:
            raise bad("bnb_4bit_compute_dtype", f"one of {FLOATS}")
        storage = str(config.get("bnb_4bit_quant_storage") or "uint8").removeprefix("torch.")
        if storage not in STORAGES:
            raise bad("bnb_4bit_quant_storage", f"one of {STORAGES}")
        threshold = config.get("llm_int8_threshold", 6.0)
        number = isinstance(threshold, (int, float)) and not isinstance(threshold, bool)
        if not (number and abs(threshold) <= 1e30):
            raise bad("llm_int8_threshold", "a number")
        skip = config.get("llm_int8_skip_modules") or []
        if not isinstance(skip, list) or not all(isinstance(s, str) for s in skip):
            raise bad("llm_int8_skip_modules", "a list of names")
        double = bool(config.get("bnb_4bit_use_double_quant"))
        return cls(method, compute, double, storage, float(threshold), tuple(skip))


def is_bnb(config: Mapping[str, Any] | None) -> bool:
    """Whether a `quantization_config` is bitsandbytes' (older files have no `quant_method`)."""
    if config is None:
        return False
    method = config.get("quant_method")
    flags = bool(config.get("load_in_4bit") or config.get("load_in_8bit"))
    return method == METHOD or (method is None and flags)


def quantization_config(spec: BnbSpec, compute_dtype: str, skip: Sequence[str]) -> dict[str, Any]:
    """For config.json.

    Args:
        compute_dtype: what `spec.compute_dtype` came to.
        skip: names of the linears that stay in 16 bits, in full.
    """
    four = spec.bits == 4
    return {
        "_load_in_4bit": four,
        "_load_in_8bit": not four,
        "bnb_4bit_compute_dtype": compute_dtype if four else "float32",
        "bnb_4bit_quant_storage": spec.quant_storage,
        "bnb_4bit_quant_type": spec.method if four else "fp4",
        "bnb_4bit_use_double_quant": spec.double_quant,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": list(skip),
        "llm_int8_threshold": float(spec.int8_threshold),
        "load_in_4bit": four,
        "load_in_8bit": not four,
        "quant_method": METHOD,
    }


def state_key(method: str) -> str:
    """The part of a 4-bit linear that holds the JSON: `weight.quant_state.bitsandbytes__nf4`."""
    return _STATE + method


def linears_of(names: Iterable[str]) -> dict[str, set[str]]:
    """The quantized linears among tensor names, with the parts that each has.

    A linear is whatever has a part that no plain linear has; `weight` and `bias` are reported too.
    """
    known = list(names)
    found: dict[str, set[str]] = {}
    for name in known:
        if match := _PART.match(name):
            found.setdefault(match[1], set()).add(match[2])
    for name in known:
        module, _, kind = name.rpartition(".")
        if module in found and kind in ("weight", "bias"):
            found[module].add(kind)
    return found


def kind_of(info: TensorInfo, linears: Mapping[str, set[str]]) -> str | None:
    """What a tensor is for, in the words of `inspect`; None where it is no quantized linear's."""
    for module, part in _splits(info.name):
        if module in linears and part != "bias":
            return _KINDS.get(part, "maps and states")
    return None


def parameters_of(info: TensorInfo, linears: Mapping[str, set[str]]) -> int | None:
    """Weights of the float model that a tensor stands for; None where it is no quantized linear's.

    An odd number of 4-bit weights counts one more.
    """
    for module, part in _splits(info.name):
        if module in linears and part != "bias":
            if part != "weight":
                return 0
            return info.numel if "SCB" in linears[module] else 2 * info.nbytes
    return None


def _splits(name: str) -> list[tuple[str, str]]:
    if match := _PART.match(name):
        return [(match[1], match[2])]
    module, _, kind = name.rpartition(".")
    return [(module, kind)]


def encode_state(
    method: str, dtype: str, shape: Sequence[int], nested_offset: float | None = None
) -> bytes:
    """The JSON of a 4-bit linear, padded to `state_size` where it is doubly quantized.

    Args:
        dtype: of the weight that was quantized, and that comes out again.
        shape: [N, K].
        nested_offset: the mean of the scales, or None.
    """
    found: dict[str, Any] = {
        "quant_type": method,
        "blocksize": BLOCK,
        "dtype": dtype,
        "shape": list(shape),
    }
    if nested_offset is None:
        return json.dumps(found).encode()
    found |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32"}
    text = json.dumps(found | {"nested_offset": nested_offset})
    return text.ljust(state_size(method, dtype, shape, nested=True)).encode()


def state_size(method: str, dtype: str, shape: Sequence[int], *, nested: bool) -> int:
    """Bytes of `encode_state`, whatever the offset."""
    if not nested:
        return len(encode_state(method, dtype, shape))
    rest = {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": 0}
    inner = json.dumps(rest)[1:]  # replaces the closing brace, after a comma and a space
    return len(encode_state(method, dtype, shape)) + 1 + len(inner) - 1 + _FLOAT_WIDTH


def decode_state(name: str, raw: bytes) -> dict[str, Any]:
    """The JSON of the 4-bit linear `name`, its keys and types checked.

    Raises:
        CheckpointError: it is no such JSON.
    """

    def bad(expected: object, got: object) -> CheckpointError:
        cure = "The file is damaged, or of another version of bitsandbytes: quantize again."
        return CheckpointError(f"{name}: quant_state", expected=expected, got=got, cure=cure)

    try:
        found = json.loads(raw.decode())
    except (ValueError, RecursionError) as error:
        raise bad("JSON", str(error)[:100]) from error
    if not isinstance(found, dict):
        raise bad("a JSON object", type(found).__name__)
    shape = found.get("shape")
    if (
        not isinstance(shape, list)
        or len(shape) != 2
        or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in shape)
        or prod(shape) > 1 << 48
    ):
        raise bad("shape [outputs, inputs]", repr(shape)[:100])
    if found.get("quant_type") not in ("nf4", "fp4"):
        raise bad("quant_type nf4 or fp4", repr(found.get("quant_type"))[:100])
    if found.get("dtype") not in FLOATS:
        raise bad(f"dtype one of {FLOATS}", repr(found.get("dtype"))[:100])
    size = found.get("blocksize")
    if type(size) is not int or size not in (32, 64, 128, 256, 512, 1024, 2048, 4096):
        raise bad("blocksize 32 to 4096, a power of 2", repr(size)[:100])
    if "nested_offset" in found or "nested_blocksize" in found:
        offset = found.get("nested_offset")
        number = isinstance(offset, (int, float)) and not isinstance(offset, bool)
        if not number or (isinstance(offset, int) and abs(offset) > 1e30):
            raise bad("nested_offset a number", repr(offset)[:100])
        size = found.get("nested_blocksize")
        if type(size) is not int or size != NESTED_BLOCK:
            raise bad(f"nested_blocksize {NESTED_BLOCK}", repr(size)[:100])
    return found
