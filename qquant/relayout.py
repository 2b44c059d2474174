"""A GPTQ directory as a compressed-tensors one: the same codes and scales in the other layout.

One linear at a time is read, turned round (`compressed.py`) and written; everything else goes over
as it is stored. The discipline is `native`'s: refused before anything is written, built beside the
target, read back and compared, renamed. Any GPTQ directory of a Qwen will do, other tools' too, as
long as its widths are 4 and 8 bits, no activation order is stored, the head is in 16 bits, float16
holds its scales, and its rules for single linears do not depend on their order.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import compressed, compressed_layout
from .card_loading import PACKED_ZEROS
from .checkpoint import Checkpoint, tensor_sha256
from .config import DTYPES, OutputSpec
from .conversion import Converted, conversion_manifest, loading_code, weight_bytes, write_card
from .errors import CheckpointError
from .events import Event, Progress, Stage
from .export import check_side_files, write_common_files
from .headers import TensorPlan
from .layout import KINDS, Layout, linears_of
from .manifest import write_manifest
from .models.families import Family, check_config, family_of
from .pack import Packed, trivial_g_idx
from .publish import WorkDir
from .readback import check_written
from .shards import ShardWriter
from .sums import write_sums
from .verify import verify


def convert_to_compressed(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    shard_size: int = OutputSpec.shard_size,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Converted:
    """Converts the GPTQ directory `src` into the new compressed-tensors directory `dst`.

    Args:
        src: GPTQ, 4 and 8 bits, trivial `g_idx`. The others as in `native.convert_to_native`.

    Raises:
        InputError: something given cannot be used; nothing was written.
        RunError: the run failed; the target is as it was before.
    """
    start = time.perf_counter()
    tell: Callable[[Event], None] = progress or (lambda _: None)
    tell(Stage("read"))
    shards = OutputSpec(shard_size=shard_size).shard_size
    source = Checkpoint.open(src)
    family = family_of(source.config)
    check_config(source.config, family, source.tensors)
    compressed_layout.check_family(family)
    check_side_files(source)
    layout = Layout.parse(source.quantization_config)
    rules = (source.quantization_config or {}).get("dynamic") or {}
    quant = compressed_layout.quantization_config(
        bits=layout.bits, group_size=layout.group_size, sym=layout.sym, rules=rules
    )
    linears = linears_of(source.tensors)
    spare = family.all_biases and source.config.get("no_bias", True) is True
    _need_same_settings(source, family, layout, linears, quant)
    plan = _plan(source, layout, linears, spare)
    report = verify(src)
    if not report.ok:
        raise CheckpointError(
            source.path.name,
            expected="a GPTQ directory that `qquant verify` finds in order",
            got=str(report.problems[0]),
        )
    with WorkDir(
        dst, source=source.path, need_bytes=sum(p.nbytes for p in plan), overwrite=overwrite
    ) as work:
        tell(Stage("write"))
        written: dict[str, str] = {}
        with ShardWriter(work.path, plan, shards) as writer:
            for name in linears:
                for kind, tensor in _turned(source, name, layout).items():
                    written[f"{name}.{kind}"] = tensor_sha256(tensor)
                    writer.write(f"{name}.{kind}", tensor)
            for tensor_plan in plan:
                if tensor_plan.name in source.tensors:
                    tensor = source.read(tensor_plan.name)
                    written[tensor_plan.name] = tensor_sha256(tensor)
                    writer.write(tensor_plan.name, tensor)
        dtype = str(source.info(family.embedding).torch_dtype).removeprefix("torch.")
        dtype = dtype if dtype in DTYPES else OutputSpec.dtype
        out = OutputSpec(dtype, shards, compressed_layout.METHOD)
        write_common_files(source, work.path, family, quant, out)
        manifest = conversion_manifest(source, compressed_layout.METHOD, (), shards)
        write_manifest(work.path, manifest)
        trust = ", trust_remote_code=True" if family.remote_code else ""
        write_card(
            work.path,
            manifest,
            source,
            suffix="compressed-tensors",
            tags=["compressed-tensors", "gptq", f"{layout.bits}-bit"],
            what=[
                f"The codes and scales of {source.path.name}, as they were, laid out as",
                f"compressed-tensors ({weight_bytes(work.path)}). Converted by qquant.",
            ],
            loading=[
                "With vLLM, or with transformers (needs `pip install compressed-tensors`):",
                "",
                *loading_code(False, trust),
                *(() if layout.sym else ("", *PACKED_ZEROS)),
            ],
        )
        write_sums(work.path, manifest["files"])
        tell(Stage("verify"))
        check_written(work.path, written)
        tell(Stage("publish"))
        size = sum(f.stat().st_size for f in work.path.iterdir() if f.is_file())
        path = work.publish()
    return Converted(path, time.perf_counter() - start, len(plan), size, ())


def _plan(
    source: Checkpoint, layout: Layout, linears: dict[str, set[str]], spare: bool
) -> list[TensorPlan]:
    """Every tensor of the result.

    Args:
        spare: zero biases, which only GPTQ directories carry, are left out; not that of `c_attn`,
            which the original's model has whatever its numbers.

    Raises:
        CheckpointError: a linear stores an activation order, settings differ beyond bits, scales do
            not fit float16, or a tensor is malformed.
        SpecError: other bits than the format's.
    """
    plan: list[TensorPlan] = []
    for name, info in source.tensors.items():
        module, _, kind = name.rpartition(".")
        if module not in linears or kind == "bias":
            own_bias = module not in linears or module.endswith(".c_attn")
            if not spare or own_bias or bool(source.read(name).any()):
                plan.append(TensorPlan(name, info.dtype, info.shape))
        elif kind == "qweight":
            own = layout.of(module)
            same = own is not None and (own.group_size, own.sym) == (layout.group_size, layout.sym)
            outputs, inputs, groups = compressed.sizes_of(source, module)
            trivial = trivial_g_idx(inputs, layout.group_size)
            if own is None or not same or not torch.equal(source.read(f"{module}.g_idx"), trivial):
                raise CheckpointError(
                    module,
                    expected="the directory's group size and grid, and no activation order",
                    got="others",
                    cure=f"Quantize its source again with --format {compressed_layout.METHOD}",
                )
            compressed_layout.check_bits(own.bits)
            _need_float16(source, f"{module}.scales")
            parts = compressed_layout.shapes_of(outputs, inputs, groups, own.bits, own.sym)
            plan += [TensorPlan(f"{module}.{part}", *parts[part]) for part in parts]
    return plan


def _need_same_settings(
    source: Checkpoint,
    family: Family,
    layout: Layout,
    linears: dict[str, set[str]],
    quant: dict[str, Any],
) -> None:
    """The written config `quant` says of every linear what the source's says.

    There, `ignore` comes first and then one width after another; the order of `dynamic`, whose
    first rule that matches decides, is lost.

    Raises:
        CheckpointError: names a linear of which it would say something else.
    """
    if compressed_layout.HEAD in linears:
        raise CheckpointError(
            compressed_layout.HEAD,
            expected=f"a head in 16 bits, as format {compressed_layout.METHOD} says of it",
            got="a quantized one",
            cure="Keep the GPTQ directory, or quantize its source again without the head",
        )
    written = Layout.parse(compressed_layout.as_gptq(quant))
    for module in (*linears, *family.linear_names(source.tensors)):
        own, there = layout.of(module) if module in linears else None, written.of(module)
        want, got = (None if found is None else found.bits for found in (own, there))
        if want != got:
            raise CheckpointError(
                f"quantization_config: dynamic, of {module}",
                expected=f"rules that mean {_said(want)} in any order",
                got=f"{_said(got)}, as format {compressed_layout.METHOD} orders them",
                cure="Give it rules that do not overlap, and one (-:) for each linear in 16 bits",
            )


def _said(bits: int | None) -> str:
    return "16 bits" if bits is None else f"{bits} bits"


def _need_float16(source: Checkpoint, name: str) -> None:
    """Scales are stored in float16, which must be no rounding.

    Raises:
        CheckpointError: it would be one.
    """
    if source.info(name).dtype == "F16":
        return
    scales = source.read(name)
    if not torch.equal(scales.to(torch.float16).to(scales.dtype), scales):
        raise CheckpointError(
            name,
            expected="scales that float16 holds",
            got=f"{scales.dtype} ones that it would round".removeprefix("torch."),
            cure=f"Quantize its source again with --format {compressed_layout.METHOD}",
        )


def _turned(source: Checkpoint, name: str, layout: Layout) -> dict[str, Tensor]:
    """The tensors of one linear in the new layout."""
    own = layout.of(name)
    assert own is not None  # `_plan` refused it
    packed = Packed(*(source.read(f"{name}.{kind}") for kind in KINDS))
    packed = packed._replace(scales=packed.scales.to(torch.float16))
    return compressed.parts_of(packed, bits=own.bits, zero_offset=own.zero_offset, sym=own.sym)
