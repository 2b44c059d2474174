"""A directory made runnable, under a named kernel.

`load` takes a GPTQ directory (ours or another tool's, v1 or v2, with settings per linear in
`dynamic` or not) or an unquantized one. The model is built without memory and filled tensor by
tensor (`assembly.py`), so the peak is the model and one tensor. Nothing is unpickled, downloaded or
guessed. Neither gptqmodel nor optimum is needed (on CUDA gptqmodel's Marlin is tried where it is).

Which kernel ran is part of the answer (`Loaded.kernel`): under `auto` on a CPU each linear gets
`avx2` or `torch-int4` (`kernel_choice.py`), and `dequantize` where neither fits, with the reason;
on CUDA the fastest that is right. A kernel asked for by name that does not fit is refused. The
dtype follows the rule in `devices`: without instructions for it, bfloat16 products measured 8 times
slower than float32 on a CPU.

bitsandbytes directories, and unquantized ones with `method="nf4"`, go through transformers' own
quantizer (`bnb.py`), which is where their kernels are.

Left out on purpose: several devices at once for GPTQ (use `from_pretrained` with `device_map`),
training. The CUDA paths have not yet been run on a GPU.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from . import compressed, compressed_layout, rebuild
from .assembly import build, fill, not_the_model, read_config, replace_linear, said
from .bnb import check_loadable, load_model, stored_bytes
from .bnb_layout import is_bnb
from .bnb_spec import METHODS, BnbSpec
from .checkpoint import Checkpoint
from .compiling import check_compiler, compile_generate
from .devices import choose_device, choose_dtype
from .directory import read_json
from .errors import CheckpointError, SpecError
from .heap import Tidy, trim_heap
from .kernel_choice import faster_missing, measure_few_tokens
from .kernel_report import KernelReport
from .kernels import (
    ANY_ROWS,
    FEW_TOKENS,
    HELD,
    KERNELS,
    TRITON_ROWS,
    QuantLinear,
)
from .layout import Layout
from .models import register
from .models.experts import split_experts
from .models.families import check_config, family_of
from .models.tokenizer import load_tokenizer
from .packed_head import NOTE as PACKED_NOTE
from .packed_head import held_weights, pack_head
from .vocabulary import STORED_NOTE, keep_stored

logger = logging.getLogger(__name__)

_FREE = 32 << 20  # bytes of free heap that packing may leave
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "qwen.tiktoken", "vocab.json")


class Loaded(NamedTuple):
    """What `load` gives: `model, tokenizer, report = load(...)` or by name."""

    model: Any
    tokenizer: Any
    kernel: KernelReport


def load(
    path: str | os.PathLike[str],
    *,
    device: str | torch.device = "auto",
    kernel: str = "auto",
    dtype: str | torch.dtype | None = None,
    trust_remote_code: bool = False,
    method: str | BnbSpec | None = None,
    compute_dtype: str | torch.dtype | None = None,
    device_map: Any = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    few_tokens: int | None = None,
    compile: bool = False,
) -> Loaded:
    """Load a checkpoint directory, quantized (GPTQ, bitsandbytes) or not, ready to run.

    Args:
        path: the directory: config.json and safetensors.
        device: `auto` (CUDA where there is one), `cpu`, `cuda`, `cuda:1`, ...
        kernel: `auto`, or one of `kernels.KERNELS` for every quantized linear.
        dtype: float32, float16 or bfloat16, for everything that is not quantized and for the
            results; None or `auto` for the rule in `devices`, by which a GPTQ directory on a CPU
            counts as stored in bfloat16. Asking for float32 keeps kernel `auto` exact: it then
            leaves `torch-int4` and `avx2`, which round their inputs, alone.
        trust_remote_code: let transformers run the directory's own Python. Original Qwen does not
            need it, nor do Qwen2 and Qwen3.
        method: quantize an unquantized directory while it is loaded: `nf4`, `fp4`, `int8`, or a
            `BnbSpec`. Needs bitsandbytes, as a directory of such a method does.
        compute_dtype: of the products of bitsandbytes' 4-bit linears. None or `auto` for what the
            directory says (with `method`, `dtype`), but float16 on a GPU without bfloat16; what it
            came to is in the report.
        device_map, max_memory: as in transformers; with bitsandbytes only. They take the place of
            `device`.
        few_tokens: rows (tokens times batch) up to which `torch-int4` and `avx2` run; more go
            through `dequantize`. None measures on a CPU where the two meet (`torch-int4`: 32 at the
            most), which takes a moment and may come out differently another time; what it came to
            is in the report.
        compile: let `model.generate` decode compiled, on a static cache (CUDA graphs on a GPU): its
            first call takes a minute or so. Not with bitsandbytes.

    Returns:
        The model in eval mode, its tokenizer (None where the directory has no tokenizer files) and
        the kernel report.

    Raises:
        CheckpointError: the directory is missing, broken, no Qwen, or quantized in another way.
        SpecError: the device or dtype is unknown, or the named kernel does not fit a linear.
        MissingDependencyError: bitsandbytes is needed and not there, or a compiler.
    """
    place = choose_device(device)
    _check_kernel(kernel)
    checkpoint = Checkpoint.open(path)
    quant = checkpoint.quantization_config
    spec = BnbSpec(method) if isinstance(method, str) else method
    if not isinstance(spec, BnbSpec | None):
        raise SpecError(
            "method",
            expected=f"one of {', '.join(METHODS)}, or a BnbSpec",
            got=repr(method),
            cure='Use method="nf4".',
        )
    if compile:
        check_compiler()  # before gigabytes are read
    if spec is not None or is_bnb(quant):
        if compile:
            raise SpecError("compile", expected="False with bitsandbytes", got="True")
        more = {"device_map": device_map, "max_memory": max_memory}
        return _load_bnb(
            checkpoint, spec, place, kernel, dtype, compute_dtype, trust_remote_code, **more
        )
    for name, value, cure in (
        ("device_map", device_map, "Use device, or transformers' from_pretrained."),
        ("max_memory", max_memory, "Use device, or transformers' from_pretrained."),
        ("compute_dtype", compute_dtype, "Use dtype."),
    ):
        if value is not None:
            raise SpecError(name, expected="none without bitsandbytes", got=repr(value), cure=cure)
    family = family_of(checkpoint.config)
    check_config(checkpoint.config, family, checkpoint.tensors)
    if compressed_layout.is_compressed(quant):
        checkpoint = compressed.view(checkpoint)
        quant = checkpoint.quantization_config
    layout = None if quant is None else Layout.parse(quant)
    register()
    config = read_config(checkpoint, trust_remote_code)
    stored = getattr(config, "dtype", None)
    if (
        layout is not None
        and kernel in ("auto", *HELD)
        and place.type == "cpu"
        and stored == torch.float16
    ):
        # What is float16 beside packed weights was bfloat16 in the model they were made from, and
        # the int4 product takes that: a CPU that is fast at it need not compute in float32.
        stored = torch.bfloat16
    chosen = choose_dtype(dtype, place, stored)
    model = build(config, chosen, trust_remote_code)
    split_experts(model, family)
    packed = [name for name in checkpoint.tensors if name.endswith(".qweight")]
    linears = sorted(name.removesuffix(".qweight") for name in packed)
    if bool(linears) != (layout is not None):
        raise CheckpointError(
            "config.json: quantization_config",
            expected="present exactly where there are packed weights",
            got=f"{len(linears)} packed linears and {'no' if layout is None else 'a'} config",
            cure="Restore config.json (or quantize_config.json) from where the weights are from.",
        )
    # torch.compile cannot look past gptqmodel's product.
    without = ("marlin",) if compile else ()
    report = KernelReport(kernel, place, chosen, without=without, compiled=compile)
    exact = dtype not in (None, "auto") and chosen == torch.float32
    taken: set[str] = set()
    tidy = Tidy()
    if layout is not None:
        for name in linears:
            own = layout.of(name)
            if own is None:
                raise not_the_model(name, "plain weights, as `dynamic` says", "quantized ones")
            taken.update(replace_linear(model, name, checkpoint, own, report, exact))
            tidy(_FREE)
    rebuilt = any(isinstance(m, QuantLinear) and m.bits != 3 for m in model.modules())
    if rebuilt and (slower := rebuild.choose(place).reason):
        report = replace(report, notes=(f"weights for many rows are rebuilt by torch: {slower}",))
    if place.type == "cpu" and kernel == "auto" and linears and not exact:
        if "torch-int4" in report.counts and (why := faster_missing()):
            report = replace(report, notes=(why,))
        if chosen == torch.float32 and (kept := keep_stored(model, family, checkpoint)):
            report = replace(report, notes=(*report.notes, STORED_NOTE))
            taken.update(kept)
        # torch.compile cannot look into that layout.
        if (
            chosen == torch.bfloat16
            and not compile
            and (kept := pack_head(model, family, checkpoint))
        ):
            report = replace(report, notes=(*report.notes, PACKED_NOTE))
            taken.update(kept)
    taken.update(fill(model, checkpoint, place, chosen))
    if rest := sorted(set(checkpoint.tensors) - taken):
        logger.warning("%d tensors of the file have no place in the model: %s", len(rest), rest[:4])
    model.requires_grad_(False).eval()
    report = _settle_few_tokens(_weighed(report, model), model, few_tokens)
    trim_heap()
    logger.info("loaded %s: %s", checkpoint.path.name, report)
    _generation(model, checkpoint)
    if compile:
        compile_generate(model)
        report = replace(report, notes=(*report.notes, "generate decodes compiled"))
    return Loaded(model, tokenizer_of(checkpoint, trust_remote_code), report)


def _load_bnb(
    checkpoint: Checkpoint,
    spec: BnbSpec | None,
    place: torch.device,
    kernel: str,
    dtype: str | torch.dtype | None,
    compute_dtype: str | torch.dtype | None,
    trust_remote_code: bool,
    **more: Any,
) -> Loaded:
    """`load` where the linears are bitsandbytes'."""
    if kernel != "auto":
        raise SpecError("kernel", expected="auto, with bitsandbytes", got=repr(kernel))
    check_loadable(checkpoint)
    register()
    config = read_config(checkpoint, trust_remote_code)
    chosen = choose_dtype(dtype, place, getattr(config, "dtype", None))
    found = load_model(
        checkpoint,
        spec,
        device=place,
        dtype=chosen,
        compute=str(compute_dtype or "auto").removeprefix("torch."),
        trust_remote_code=trust_remote_code,
        **more,
    )
    report = KernelReport(
        kernel,
        found.model.get_input_embeddings().weight.device,
        chosen,
        found.used,
        weight_bytes=stored_bytes(found.model),
        compute_dtype=found.compute_dtype,
        placed=found.placed,
        notes=found.notes,
    )
    logger.info("loaded %s: %s", checkpoint.path.name, report)
    return Loaded(found.model, tokenizer_of(checkpoint, trust_remote_code), report)


def _check_kernel(kernel: str) -> None:
    if kernel not in ("auto", *KERNELS):
        raise SpecError("kernel", expected=f"auto or one of {', '.join(KERNELS)}", got=repr(kernel))


def _weighed(report: KernelReport, model: nn.Module) -> KernelReport:
    """`report` with the bytes of the model's weights, each storage counted once."""
    total, seen = 0, set()
    for module in model.modules():
        if isinstance(module, QuantLinear):
            total += module.nbytes
            continue
        for tensor in (*module.parameters(recurse=False), *held_weights(module)):
            if tensor.data_ptr() not in seen:
                seen.add(tensor.data_ptr())
                total += tensor.numel() * tensor.element_size()
    return replace(report, weight_bytes=total)


def _settle_few_tokens(report: KernelReport, model: nn.Module, asked: int | None) -> KernelReport:
    """Tells every linear up to how many rows its kernel is to run, measured on the largest.

    Where some have 8 bits, which take longer, the fewer rows of both are taken.
    """
    own = [m for m in model.modules() if isinstance(m, QuantLinear)]
    for linear in own:
        if linear.kernel == "triton-int4":
            linear.few_tokens = TRITON_ROWS if asked is None else asked
            report = replace(report, triton_rows=linear.few_tokens)
    if twice := sum(linear.packings == 2 for linear in own):
        report = replace(report, notes=(*report.notes, f"{twice} linears hold their codes twice"))
    settled = {"torch-int4": FEW_TOKENS, "avx2": ANY_ROWS}
    for kernel in HELD:
        linears = [m for m in own if m.kernel == kernel]
        if asked is not None:
            settled[kernel] = asked
        elif report.device.type == "cpu":
            settled[kernel] = _measured(linears, settled[kernel], report.dtype)
        for linear in linears:
            linear.few_tokens = settled[kernel]
    return replace(report, few_tokens=settled["torch-int4"], avx2_rows=settled["avx2"])


def _measured(linears: list[QuantLinear], most: int, dtype: torch.dtype) -> int:
    """Rows up to which a kernel's linears are to use it, `most` or fewer."""
    for kind in ([m for m in linears if m.bits != 8], [m for m in linears if m.bits == 8]):
        if kind:
            widest = max(kind, key=lambda m: m.in_features * m.out_features)
            most = min(most, measure_few_tokens(widest, dtype))
    return most


def _generation(model: Any, checkpoint: Checkpoint) -> None:
    """The directory's generation_config.json, where there is one."""
    if not os.path.lexists(checkpoint.path / "generation_config.json"):
        return
    from transformers import GenerationConfig

    read_json(checkpoint.path, "generation_config.json")
    try:
        model.generation_config = GenerationConfig.from_pretrained(
            checkpoint.path, local_files_only=True
        )
    except Exception as error:  # as for config.json
        raise CheckpointError(
            "generation_config.json",
            expected="settings transformers can read",
            got=said(error),
            cure="Restore it from the original model, or remove it.",
        ) from error


def tokenizer_of(checkpoint: Checkpoint, trust_remote_code: bool = False) -> Any:
    """As `load` gives it: None where the directory has no tokenizer files.

    Raises:
        CheckpointError: they are broken.
    """
    if not any(os.path.lexists(checkpoint.path / name) for name in _TOKENIZERS):
        logger.info("%s has no tokenizer files", checkpoint.path.name)
        return None
    return load_tokenizer(checkpoint, trust_remote_code)
