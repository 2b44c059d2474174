"""What a GPTQ directory says about itself: settings from its config, linears from its tensor names.

The one reading of a `quantization_config`, for `verify`, which doubts it, `inspect`, which reports
it, and `runtime`, which runs it. Lenient, as the tools that write such directories differ:
auto-gptq's files have no `checkpoint_format` (that means v1) and no `quant_method`, GPTQModel's say
`format` and `method` too, and null is the same as a missing key. Two keys for one thing must agree,
since other readers believe the one or the other. GPTQModel's `dynamic` gives single modules
settings of their own or leaves them out by regular expression (matched from the start of the
module's name, the first that matches deciding; `-:` leaves out).

Those expressions come from elsewhere, and a few characters can keep a backtracking matcher busy for
years. They are matched with `regex` (which vLLM uses for them, and transformers brings along): it
can be given a time, and all matching for one directory shares `_SECONDS`. Rules that need more are
refused. Ordinary ones take microseconds, so the clock decides nothing about an honest directory.
What only `regex` has (recursion, which eats memory too) is refused: it must be an expression of
`re`.
"""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeGuard

import regex

from .config import BITS
from .errors import CheckpointError
from .pack import ZERO_OFFSETS

KINDS = ("qweight", "qzeros", "scales", "g_idx")
WIDEST_GROUP = 1 << 20  # input columns; no linear has as many
_SECONDS = 5.0  # of matching `dynamic` for one directory
_LONGEST_RULE = 10_000  # characters
_EMBEDDINGS = ("embed_tokens", "wte")
_BLOCK = re.compile(r"^(.*?\.?(?:layers|h|blocks))\.(\d{1,9})\.")


@dataclass(frozen=True)
class Layout:
    """How linears are stored; one for the directory, or one for a module.

    Attributes:
        bits, group_size, sym, desc_act: as in the config.
        checkpoint_format: `gptq` (v1) or `gptq_v2`.
        dynamic: layouts of exceptional modules by regular expression, None for unquantized ones.
        decided: the rule found for each module asked about.
        spent: one number, the seconds that went into finding them.
    """

    bits: int
    group_size: int
    sym: bool
    desc_act: bool
    checkpoint_format: str
    dynamic: Mapping[str, Layout | None] = field(default_factory=dict)
    decided: dict[str, str | None] = field(default_factory=dict, compare=False, repr=False)
    spent: list[float] = field(default_factory=lambda: [0.0], compare=False, repr=False)

    @classmethod
    def parse(cls, config: Mapping[str, Any] | None) -> Layout:
        """From a `quantization_config`.

        Raises:
            CheckpointError: there is none, it is another method's, or a value is not of GPTQ.
        """

        def bad(key: str, expected: object, got: object, cure: str | None = None) -> Exception:
            return CheckpointError(
                f"quantization_config: {key}", expected=expected, got=repr(got), cure=cure
            )

        if config is None:
            raise CheckpointError(
                "config.json: quantization_config",
                expected="how the weights are quantized",
                got="none, nor a quantize_config.json",
                cure="An unquantized checkpoint has nothing to verify; `qquant inspect` shows it.",
            )

        def said(*keys: str) -> list[Any]:
            return [config[key] for key in keys if config.get(key) is not None]

        methods = said("quant_method", "method")
        if any(method != "gptq" for method in methods):
            got = methods[0] if _alike(methods) else methods
            raise bad("quant_method", "'gptq'", got, "Only GPTQ directories are understood.")
        bits, group = config.get("bits"), config.get("group_size")
        if not _is_int(bits) or bits not in BITS:
            raise bad("bits", f"one of {BITS}", bits)
        if not _is_int(group) or (group != -1 and not 1 <= group <= WIDEST_GROUP):
            raise bad("group_size", f"-1, or 1 to {WIDEST_GROUP}", group)
        names = said("checkpoint_format", "format")
        name = names[0] if names else "gptq"
        if not isinstance(name, str) or name not in ZERO_OFFSETS or any(n != name for n in names):
            got = name if _alike(names) else names
            raise bad("checkpoint_format", f"one of {', '.join(ZERO_OFFSETS)}", got)
        flags = {}
        for key, default in (("sym", True), ("desc_act", False)):
            value = config.get(key)
            flags[key] = default if value is None else value
            if not isinstance(flags[key], bool):
                raise bad(key, "true or false", value)
        dynamic = config.get("dynamic") or {}
        if not isinstance(dynamic, dict):
            raise bad("dynamic", "an object", dynamic)
        exceptions: dict[str, Layout | None] = {}
        for pattern, changes in dynamic.items():
            try:
                _compiled(pattern)
            except (re.error, regex.error, OverflowError, RecursionError, ValueError) as error:
                raise bad("dynamic", "regular expressions", pattern) from error
            if changes and not isinstance(changes, dict):
                raise bad(f"dynamic {pattern}", "an object", changes)
            own = {**config, **(changes or {}), "dynamic": None}
            exceptions[pattern] = None if pattern.startswith("-:") else cls.parse(own)
        return cls(bits, group, flags["sym"], flags["desc_act"], name, exceptions)

    @property
    def zero_offset(self) -> int:
        """What was subtracted from zeros before they were stored (see `pack.py`)."""
        return ZERO_OFFSETS[self.checkpoint_format]

    def of(self, module: str) -> Layout | None:
        """The module's own layout; None where `dynamic` leaves it unquantized."""
        rule = self.rule_of(module)
        return self if rule is None else self.dynamic[rule]

    def rule_of(self, module: str) -> str | None:
        """The key of `dynamic` that decides for the module; None where none does.

        Raises:
            CheckpointError: finding it takes too long.
        """
        if module not in self.decided:
            self.decided[module] = next((k for k in self.dynamic if self._fits(k, module)), None)
        return self.decided[module]

    def _fits(self, rule: str, module: str) -> bool:
        start = time.monotonic()
        try:
            left = max(_SECONDS - self.spent[0], 0.0)
            return _compiled(rule).match(module, timeout=left) is not None
        except TimeoutError as error:
            raise CheckpointError(
                f"quantization_config: dynamic {rule}",
                expected=f"rules that are matched within {_SECONDS:.0f} seconds, all together",
                got="one that backtracks without end, or too many",
                cure="Write it without repeats within repeats.",
            ) from error
        finally:
            self.spent[0] += time.monotonic() - start


def linears_of(names: Iterable[str]) -> dict[str, set[str]]:
    """The quantized linears among tensor names, with the kinds of tensor each has.

    A linear is whatever has a `qweight`, `qzeros`, `scales` or `g_idx`; `bias` and `weight` are
    reported too where it has them.
    """
    found: defaultdict[str, set[str]] = defaultdict(set)
    rest: defaultdict[str, set[str]] = defaultdict(set)
    for name in names:
        module, _, kind = name.rpartition(".")
        if kind in KINDS:
            found[module].add(kind)
        elif kind in ("bias", "weight"):
            rest[module].add(kind)
    for module, kinds in found.items():
        kinds |= rest[module]
    return dict(found)


def block_of(name: str) -> tuple[str, int] | None:
    """Where a tensor or module is: (`model.layers`, 3); None outside the blocks."""
    match = _BLOCK.match(name)
    return (match[1], int(match[2])) if match else None


def within_block(name: str) -> str:
    """The name without its block: `mlp.up_proj` of `model.layers.3.mlp.up_proj`."""
    match = _BLOCK.match(name)
    return name[match.end() :] if match else name


def text_stack(names: Iterable[str]) -> str | None:
    """Name of the list of blocks that is the text model's: the one beside an embedding of tokens.

    Others are a vision tower's, an audio tower's or those that predict several tokens ahead. None
    where there are no blocks.
    """
    sizes: defaultdict[str, set[int]] = defaultdict(set)
    bases: set[str] = set()
    for name in names:
        if place := block_of(name):
            sizes[place[0]].add(place[1])
        module = name.rpartition(".")[0]
        base, _, last = module.rpartition(".")
        if last in _EMBEDDINGS:
            bases.add(base)
    beside = [stack for stack in sizes if stack.rpartition(".")[0] in bases]
    return max(sorted(beside or sizes), key=lambda stack: len(sizes[stack]), default=None)


def layer_count(config: Mapping[str, Any]) -> int | None:
    """Blocks by the config, under either generation of names; None where it does not say."""
    for key in ("num_hidden_layers", "n_layer"):
        if _is_int(value := config.get(key)) and value > 0:
            return value
    return None


def _alike(values: list[Any]) -> bool:
    return all(value == values[0] for value in values)


@lru_cache(maxsize=8192)  # GPTQModel writes a rule per module, and `regex` keeps only 500
def _compiled(key: str) -> Any:
    if len(key) > _LONGEST_RULE:
        raise ValueError(f"longer than {_LONGEST_RULE} characters")
    pattern = key[2:] if key[:2] in ("-:", "+:") else key
    re.compile(pattern)  # refuses what `regex` has beyond it
    return regex.compile(pattern)


def _is_int(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)
