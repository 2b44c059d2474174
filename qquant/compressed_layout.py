"""The compressed-tensors format `pack-quantized`: what it holds, and how it is GPTQ's own numbers.

vLLM's other format for integer weights, read by transformers through the `compressed-tensors`
package too. One linear of `K` inputs, `N` outputs, `b` bits, `G` groups:

    weight_packed      int32    [N, K*b/32]   codes, packed along the inputs
    weight_scale       float16  [N, G]
    weight_zero_point  int32    [N*b/32, G]   packed along the outputs; asymmetric grids only
    weight_shape       int64    [2]           N, K

    w[n, k] = scale[n, k // g] * (value[n, k] - zero[n, k // g])

Values are signed there, and stored with 2^(b-1) added: which are GPTQ's unsigned codes, in the
same bit stream (`pack.py`). So `weight_packed` is `qweight` turned round, `weight_scale` is
`scales`, and `weight_zero_point` is `qzeros` as v2 stores them; a symmetric grid's zero is 0 and
not stored. Nothing is computed and nothing lost. Scales may be negative here too: the package's own
loader and vLLM's Marlin kernel (read in its source: `__hmul2(frag_b, s)`) multiply by them. Not so
sure is Marlin with 8-bit activations, which a server has to be asked for: it divides all scales of
a matrix by the largest, and was not tried (`--no-negative-scales` keeps clear of it).

Owns names, shapes and the config of that format, none of which needs torch; the tensors are
`compressed.py`'s. Of 2 and 3 bits the package would pack as well, but vLLM's kernels do not read
them; they are refused. So is an activation order that is stored (`weight_g_idx`), and so are
mixtures of experts and linear attention, where `ignore` would have to name what stays in 16 bits:
not tried with a reader.

Source: compressed-tensors 0.20.0, `compressors/pack_quantized` (read; shapes and conventions only).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from .errors import CheckpointError, SpecError
from .models.families import Family

METHOD, FORMAT = "compressed-tensors", "pack-quantized"
BITS = (4, 8)
PACKED, SCALE, ZERO, SHAPE = PARTS = (
    "weight_packed",
    "weight_scale",
    "weight_zero_point",
    "weight_shape",
)
ORDER = "weight_g_idx"
HEAD = "lm_head"  # which stays as it is: `ignore` has it


def is_compressed(quant: Mapping[str, Any] | None) -> bool:
    """Whether a `quantization_config` is this format's (or another of compressed-tensors)."""
    return quant is not None and quant.get("quant_method") == METHOD


def check_bits(bits: int) -> None:
    """Refuses what vLLM's kernels do not read.

    Raises:
        SpecError: other than 4 or 8 bits.
    """
    if bits not in BITS:
        raise SpecError(
            f"bits with format {METHOD}",
            expected="4 or 8, which vLLM's kernels read",
            got=bits,
            cure="Use --bits 4, or --format gptq",
        )


def check_family(family: Family) -> None:
    """Refuses models whose config would have to name the linears that stay in 16 bits.

    Raises:
        SpecError: the family has experts or linear attention.
    """
    if family.varied:
        raise SpecError(
            f"format {METHOD}",
            expected="a model whose blocks all have the same linears",
            got=f"{family.model_type}, with experts or two kinds of attention",
            cure="Use --format gptq",
        )


def shapes_of(
    outputs: int, inputs: int, groups: int, bits: int, sym: bool
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype (safetensors' spelling) and shape of each tensor of a linear."""
    found: dict[str, tuple[str, tuple[int, ...]]] = {
        PACKED: ("I32", (outputs, inputs * bits // 32)),
        SCALE: ("F16", (outputs, groups)),
        SHAPE: ("I64", (2,)),
    }
    if not sym:
        found[ZERO] = ("I32", (outputs * bits // 32, groups))
    return found


def quantization_config(
    *, bits: int, group_size: int, sym: bool, rules: Mapping[str, Mapping[str, Any] | None]
) -> dict[str, Any]:
    """What readers need to know.

    Args:
        bits, group_size, sym: of all linears but those of `rules`; the head is left out.
        rules: GPTQModel's `dynamic`: regular expressions behind `+:`, and the bits of what they
            match; `-:` for modules that stay as they are.

    Raises:
        SpecError: other bits than the format's, or a rule that changes more than bits.
    """

    def group(width: int, targets: list[str]) -> dict[str, Any]:
        check_bits(width)
        weights: dict[str, Any] = {
            "num_bits": width,
            "type": "int",
            "symmetric": sym,
            "strategy": "channel" if group_size == -1 else "group",
            "group_size": None if group_size == -1 else group_size,
            "dynamic": False,
            "actorder": None,
        }
        return {"targets": targets, "weights": weights, "format": FORMAT}

    by_width: dict[int, list[str]] = {bits: ["Linear"]}
    ignore = [HEAD]
    for rule, changes in rules.items():
        pattern = "re:" + rule.removeprefix("+:").removeprefix("-:")
        if rule.startswith("-:"):
            ignore.append(pattern)
            continue
        width = (changes or {}).get("bits", bits)
        if set(changes or {}) - {"bits"}:
            raise SpecError(
                f"dynamic {rule}", expected="a rule for bits", got=sorted(changes or {})
            )
        by_width.setdefault(width, []).append(pattern)
    return {
        "quant_method": METHOD,
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{i}": group(width, targets)
            for i, (width, targets) in enumerate(by_width.items())
        },
        "ignore": ignore,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def as_gptq(quant: Mapping[str, Any]) -> dict[str, Any]:
    """The `quantization_config` that GPTQ v2 would have.

    Raises:
        CheckpointError: it is not of this format as qquant reads it.
    """
    base, rules = _parse(quant)
    return {"quant_method": "gptq", **base, "dynamic": rules, "checkpoint_format": "gptq_v2"}


def _parse(quant: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, dict[str, int]]]:
    """(GPTQ's keys of the group that names the class, `dynamic` rules for the others).

    Raises:
        CheckpointError: not as qquant writes such a config.
    """

    def bad(key: str, expected: object, got: object) -> CheckpointError:
        return CheckpointError(
            f"quantization_config: {key}",
            expected=expected,
            got=repr(got),
            cure="Of compressed-tensors only integer weights in pack-quantized are understood",
        )

    if quant.get("format") != FORMAT:
        raise bad("format", repr(FORMAT), quant.get("format"))
    groups = quant.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise bad("config_groups", "an object", groups)
    base: dict[str, Any] | None = None
    rules: dict[str, dict[str, int]] = {}
    ignored = quant.get("ignore") or []
    if not isinstance(ignored, list) or not all(isinstance(name, str) for name in ignored):
        raise bad("ignore", "names", ignored)
    for name in ignored:
        if name.startswith("re:"):
            rules[f"-:{name[3:]}"] = {}
        elif "." in name:  # a module of a block; a head needs no rule to be a plain tensor
            rules[f"-:{re.escape(name)}$"] = {}
    settings = []
    for name, group in groups.items():
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict) or weights.get("type", "int") != "int":
            raise bad(f"{name}: weights", "integer weights", weights)
        # `static` (its other name is `weight`) says how codes were found, not how they are stored.
        stored_order = weights.get("actorder") not in (None, False, "static", "weight")
        if group.get("input_activations") is not None or stored_order:
            raise bad(name, "weights only, without a stored activation order", group)
        bits, size = weights.get("num_bits"), weights.get("group_size")
        if type(bits) is not int or bits not in BITS:
            raise bad(f"{name}: num_bits", f"one of {BITS}", bits)
        strategy = weights.get("strategy")
        if strategy not in ("group", "channel"):
            raise bad(f"{name}: strategy", "group or channel", strategy)
        keys = {
            "group_size": -1 if strategy == "channel" else size,
            "sym": weights.get("symmetric", True),
            "desc_act": False,
        }
        settings.append(keys)
        targets = group.get("targets")
        if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
            raise bad(f"{name}: targets", "names", targets)
        for target in targets:
            if target == "Linear":
                base = {"bits": bits, **keys}
            else:
                pattern = target[3:] if target.startswith("re:") else f"{re.escape(target)}$"
                rules[f"+:{pattern}"] = {"bits": bits}
    if base is None:
        raise bad("config_groups", "a group for Linear", list(groups))
    if any(keys != settings[0] for keys in settings):
        raise bad("config_groups", "one group size and one kind of grid", settings)
    size = base["group_size"]
    if not isinstance(size, int) or isinstance(size, bool) or (size < 1 and size != -1):
        raise bad("group_size", "a positive number", size)
    if not isinstance(base["sym"], bool):
        raise bad("symmetric", "true or false", base["sym"])
    return base, rules
