"""Which reader takes a directory, with which kernel, or why not: by rules, from headers alone.

This is a checker of rules, not a run. The rules are those of the readers' own loading code, as read
in vLLM 0.33.0, SGLang 0.5.23, transformers 5.23.0 with gptqmodel 7.6.0, and auto-gptq 0.7.1. What
has been run, and on what, is on the page docs/READERS.md.

- vLLM: a model class of that name; symmetric 4 or 8 bits for every linear, under the name of the
  matrix that it loads linears as (`qkv_proj`, `gate_up_proj`); groups that Marlin has; no
  activation order. It takes the first kernel of its list that fits: Marlin, but on compute
  capability 9.0 Machete, and where its shapes and groups do not fit, Humming, which only there
  stands before Marlin (`kernels/linear`, `quantization/utils/humming/priority.py`). Experts have
  kernels of their own: Marlin, on 9.0 Humming. Of compressed-tensors, which has more kernels behind
  it, nothing that we write is refused.
- SGLang: the same for its Marlin path (compute capability 8.0); everything else goes through its
  `gptq` kernel, which takes 2, 3, 4 and 8 bits in float16. The directory's own setting decides
  between the two, and rules per linear have to stay within what it decided for.
- transformers: no rules per linear; groups that gptqmodel has; experts once they are taken apart.
- `qquant.load`: any of its kernels by what fits (`int4_torch`'s and `avx2`'s rules, from headers).
- auto-gptq: no rules per linear, v1 zeros, and its own list of models.

Left out on purpose: tensor parallelism (each share of a matrix needs whole groups), bitsandbytes
directories under vLLM and SGLang and compressed-tensors ones under SGLang, whose loaders were not
read.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from . import compressed, compressed_layout
from .avx2 import unfit
from .bnb_layout import is_bnb
from .checkpoint import Checkpoint
from .int4_torch import int4_cpu_misfit
from .layout import Layout, linears_of
from .models.families import APART, Family, family_of

MARLIN_GROUPS = (-1, 32, 64, 128)
GPTQMODEL_GROUPS = (-1, 32, 64, 128, 256, 512, 1024)
_MACHETE_GROUPS = (-1, 64, 128)
_VLLM = "vLLM 0.33.0"
_AUTO_GPTQ = ("qwen", "qwen2")


@dataclass(frozen=True)
class Verdict:
    """What a reader makes of a directory.

    Attributes:
        reader: its name and version.
        reads: whether its rules allow the directory.
        how: the kernels, or what it needs; empty where it does not read it.
        why: what is against it; empty where nothing is.
    """

    reader: str
    reads: bool
    how: str = ""
    why: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {"reader": self.reader, "reads": self.reads, "how": self.how, "why": [*self.why]}


@dataclass(frozen=True)
class _Linear:
    """One matrix as a reader loads it: its layout(s) and its shape, [inputs, outputs]."""

    name: str
    layouts: tuple[Layout | None, ...]
    inputs: int
    outputs: int


def verdicts(path: str | os.PathLike[str]) -> list[Verdict]:
    """Every reader's verdict on the directory `path`; only headers are read.

    Raises:
        CheckpointError: the directory is broken, no Qwen, or quantized in an unknown way.
    """
    checkpoint = Checkpoint.open(path)
    family = family_of(checkpoint.config)
    quant = checkpoint.quantization_config
    if quant is None or is_bnb(quant):
        needs = "bitsandbytes" if quant else ""
        code = "trust_remote_code" if family.remote_code else ""
        needs = ", ".join(part for part in (needs, code) if part)
        return [
            Verdict("transformers 5.23", True, needs),
            Verdict("qquant.load", True, "bitsandbytes" if quant else ""),
        ]
    packed = compressed_layout.is_compressed(quant)
    if packed:
        checkpoint = compressed.view(checkpoint)
    layout = Layout.parse(checkpoint.quantization_config or {})
    linears = _linears(checkpoint, layout, family)
    if packed:
        return [
            _transformers_compressed(layout),
            _own(checkpoint, layout),
            _vllm_compressed(linears),
        ]
    return [
        _transformers(layout, family),
        _own(checkpoint, layout),
        _vllm(layout, linears, family),
        _sglang(layout, linears, family),
        _auto_gptq(layout, family),
    ]


def render(found: list[Verdict]) -> str:
    """Lines for the terminal."""
    lines = ["which reader takes it, by rules (docs/READERS.md):"]
    for verdict in found:
        said = verdict.how if verdict.reads else "; ".join(verdict.why)
        answer = "yes" if verdict.reads else "no"
        lines.append(f"  {verdict.reader}: {answer}{': ' if said else ''}{said}")
    return "\n".join(lines)


def _linears(checkpoint: Checkpoint, layout: Layout, family: Family) -> list[_Linear]:
    """The matrices as vLLM and SGLang load them: linears that share a matrix are one."""
    fused = {part: name for name, parts in family.fused for part in parts}
    groups: dict[str, list[str]] = {}
    for name in sorted(linears_of(checkpoint.tensors)):
        whole = next(
            (name.removesuffix(p) + f for p, f in fused.items() if name.endswith("." + p)), name
        )
        groups.setdefault(whole, []).append(name)
    found = []
    for whole, names in groups.items():
        sizes = [compressed.sizes_of(checkpoint, n) for n in names]
        outputs, inputs = sum(size[0] for size in sizes), sizes[0][1]
        layouts = tuple(layout.of(n) for n in dict.fromkeys([whole, *names]))
        found.append(_Linear(whole, layouts, inputs, outputs))
    return found


def _unequal(linears: list[_Linear]) -> list[str]:
    return [
        f"{linear.name}: its parts have different settings, and are loaded as one"
        for linear in linears
        if len({_settings(own) for own in linear.layouts}) > 1
    ][:1]


def _settings(own: Layout | None) -> tuple[Any, ...] | None:
    return None if own is None else (own.bits, own.group_size, own.sym, own.desc_act)


def _marlin(linears: list[_Linear]) -> list[str]:
    """What keeps a linear from Marlin, each reason once."""
    against: dict[str, None] = {}
    for own in (own for linear in linears for own in linear.layouts if own is not None):
        if own.bits not in (4, 8) or not own.sym:
            against[f"{own.bits} bits, {'symmetric' if own.sym else 'asymmetric'}"] = None
        if own.group_size not in MARLIN_GROUPS:
            against[f"groups of {own.group_size}"] = None
    return [*against]


def _vllm(layout: Layout, linears: list[_Linear], family: Family) -> Verdict:
    reader = _VLLM
    why = []
    if family.remote_code:
        why.append(
            "it has had no model class for original Qwen since 0.23.0: `qquant convert --to qwen2` "
            "makes a native directory"
        )
    for reason in _marlin(linears):
        takes = f"groups of {_words(MARLIN_GROUPS)}" if "groups" in reason else "symmetric 4 and 8"
        why.append(f"{reason}: its kernels take {takes}")
    if layout.desc_act and layout.group_size != -1:
        why.append("desc_act is true: activation order with g_idx is no longer supported")
    why += _unequal(linears)
    if why:
        return Verdict(reader, False, why=tuple(why))
    return Verdict(reader, True, f"Marlin (compute capability 7.5); {_on_hopper(linears)} on 9.0")


def _on_hopper(linears: list[_Linear]) -> str:
    """vLLM's kernels on compute capability 9.0."""
    fits = {
        ".experts." not in linear.name
        and linear.inputs % 64 == 0
        and linear.outputs % 128 == 0
        and own.group_size in _MACHETE_GROUPS
        for linear in linears
        for own in linear.layouts
        if own is not None
    }
    both = "Machete where it fits, else Humming"
    return both if len(fits) > 1 else "Machete" if fits == {True} else "Humming"


def _vllm_compressed(linears: list[_Linear]) -> Verdict:
    """Asymmetric 4 bits are Marlin's here, too."""
    against = [why for why in _marlin(linears) if why != "4 bits, asymmetric"]
    how = f"Marlin (compute capability 7.5); {_on_hopper(linears)} on 9.0"
    if against:
        how = f"another of its kernels ({against[0]}: not Marlin)"
    unequal = tuple(_unequal(linears))
    return Verdict(_VLLM, not unequal, "" if unequal else how, unequal)


def _transformers_compressed(layout: Layout) -> Verdict:
    more = "" if layout.sym else ", CompressedTensorsConfig(dequantize=True)"
    return Verdict("transformers 5.23", True, f"compressed-tensors{more}")


def _own(checkpoint: Checkpoint, layout: Layout) -> Verdict:
    """What `qquant.load` runs under `auto` on a CPU."""
    used: dict[str, None] = {}
    bits: set[int] = set()
    both = False  # devices run torch's op for some
    for name in linears_of(checkpoint.tensors):
        own = layout.of(name)
        if own is None:
            continue
        outputs, inputs, _ = compressed.sizes_of(checkpoint, name)
        group = inputs if own.group_size == -1 else own.group_size
        even = 0 if inputs % group else group
        misfit = int4_cpu_misfit(even, outputs)
        fits = [] if misfit else ["torch-int4"]
        fits += [] if unfit(own.bits, even, outputs) else ["avx2"]
        fits += [] if "torch-int4" in fits else ["dequantize"]
        used[" or ".join(fits)] = None
        bits.add(own.bits)
        both |= own.bits == 4 and not own.desc_act and not misfit
    how = " and ".join(sorted(used, reverse=True))
    # On CUDA torch's op takes 4 bits without activation order only, and nothing else takes 3.
    cuda = ["triton-int4 or marlin, not yet run on a GPU"] if bits - {3} else []
    cuda += ["dequantize"] if 3 in bits else []
    also = "also " if both else ""
    return Verdict("qquant.load", True, f"{how}; on CUDA {also}{', and '.join(cuda)}")


def _sglang(layout: Layout, linears: list[_Linear], family: Family) -> Verdict:
    reader = "SGLang 0.5.23"
    unequal = _unequal(linears)
    base = layout.bits in (4, 8) and layout.sym and layout.group_size in MARLIN_GROUPS
    against = _marlin(linears)
    if unequal:
        return Verdict(reader, False, why=tuple(unequal))
    if base and not against:
        return Verdict(reader, True, "Marlin (compute capability 8.0)")
    if base:
        reason = (
            f"rules per linear ask for {against[0]}, and the directory's own setting for Marlin"
        )
        return Verdict(reader, False, why=(reason,))
    why = []
    for linear in linears:
        for own in linear.layouts:
            if own is None:
                continue
            if own.group_size != -1 and linear.inputs % own.group_size:
                why.append(f"{linear.name}: {linear.inputs} inputs are no whole groups")
            if linear.outputs % 32:
                why.append(f"{linear.name}: {linear.outputs} outputs, a multiple of 32 is needed")
    if why:
        return Verdict(reader, False, why=tuple(why[:1]))
    return Verdict(reader, True, f"its gptq kernel, float16 only ({against[0]}: not Marlin)")


def _transformers(layout: Layout, family: Family) -> Verdict:
    reader = "transformers 5.23"
    why = []
    if layout.dynamic:
        why.append("it passes over `dynamic`: use GPTQModel.load or qquant.load")
    if family.experts and family.model_type not in APART:
        why.append(
            f"nothing takes the experts of {family.model_type} apart: use GPTQModel.load or "
            "qquant.load"
        )
    if layout.group_size not in GPTQMODEL_GROUPS:
        why.append(f"groups of {layout.group_size}: gptqmodel has {_words(GPTQMODEL_GROUPS)}")
    if why:
        return Verdict(reader, False, why=tuple(why))
    code = ", trust_remote_code" if family.remote_code else ""
    if family.experts:
        code = f', after defuser.replace_fused_blocks("{family.model_type}")'
    return Verdict(reader, True, f"optimum and gptqmodel{code}")


def _auto_gptq(layout: Layout, family: Family) -> Verdict:
    reader = "auto-gptq 0.7.1"
    why = []
    if family.model_type not in _AUTO_GPTQ:
        why.append(f"its list of models ends before {family.model_type}")
    if family.remote_code:
        why.append(
            "the code beside the weights is for today's transformers, auto-gptq needs 4.40: "
            "`qquant convert --to qwen2` makes a directory that needs no code"
        )
    if layout.dynamic:
        why.append("it passes over `dynamic`")
    if not layout.zero_offset:
        why.append("v2 zero points, which it reads as v1, without an error")
    if why:
        return Verdict(reader, False, why=tuple(why))
    return Verdict(reader, True, "transformers 4.40")


def _words(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers))
