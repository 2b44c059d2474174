"""A model put together from a directory's tensors: made on meta, filled one tensor at a time.

transformers' class makes the model without memory, each packed linear takes a `QuantLinear`'s
place, and everything else is read, cast and put where it belongs. A tensor that is missing, too
many or of another shape is an error that names it.

Left out on purpose: which directory, device and dtype (`runtime.load`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import Checkpoint
from .errors import CheckpointError, SpecError
from .kernel_choice import fastest, on_cpu
from .kernel_report import KernelReport
from .kernels import QuantLinear, misfit
from .layout import KINDS, Layout
from .pack import Packed

logger = logging.getLogger(__name__)


def read_config(checkpoint: Checkpoint, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(
            checkpoint.path, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as error:  # whatever a config class raises over values it was not made for
        raise CheckpointError(
            "config.json", expected="a configuration transformers can read", got=said(error)
        ) from error


def build(config: Any, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    """The model with parameters on meta, and what is computed rather than loaded (RoPE) real."""
    from transformers import AutoModelForCausalLM

    if hasattr(config, "set_precision"):  # original Qwen says it in flags, too
        config.set_precision(dtype)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, trust_remote_code=trust_remote_code
            )
    except Exception as error:
        raise CheckpointError(
            "config.json", expected="values that make a model", got=said(error)
        ) from error
    for name, module in list(model.named_modules()):
        if any(b.is_meta for b in module.buffers(recurse=False)):
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], type(module)(config=module.config))
    return model


def replace_linear(
    model: nn.Module,
    name: str,
    checkpoint: Checkpoint,
    layout: Layout,
    report: KernelReport,
    exact: bool,
) -> Iterable[str]:
    """Put the packed linear `name` into the model and into `report`; the tensor names used."""
    try:
        module = model.get_submodule(name)
    except AttributeError as error:
        raise not_the_model(name, "a linear of the model", "none of that name") from error
    if not isinstance(module, nn.Linear):
        raise not_the_model(name, "a linear of the model", type(module).__name__)
    n, k = module.out_features, module.in_features
    parts = {part: checkpoint.read(f"{name}.{part}") for part in KINDS}
    groups = parts["scales"].shape[0] if parts["scales"].dim() else 0
    want = {
        "qweight": (k * layout.bits // 32, n),
        "qzeros": (groups, n * layout.bits // 32),
        "scales": (groups, n),
        "g_idx": (k,),
    }
    for part, shape in want.items():
        if tuple(parts[part].shape) != shape or groups < 1:
            raise not_the_model(f"{name}.{part}", f"shape {list(shape)}", list(parts[part].shape))
    index = parts["g_idx"]
    if not 0 <= int(index.min()) <= int(index.max()) < groups:
        got = f"{int(index.min())} to {int(index.max())}"
        raise not_the_model(f"{name}.g_idx", f"entries 0 to {groups - 1}", got)
    bias, biased = None, getattr(module, "bias", None) is not None
    if f"{name}.bias" in checkpoint.tensors:
        bias = checkpoint.read(f"{name}.bias")
        if tuple(bias.shape) != (n,):
            raise not_the_model(f"{name}.bias", f"shape [{n}]", list(bias.shape))
        if not biased and not bool(bias.any()):
            bias = None  # the published files hold zeros where the model has no bias
    elif biased:
        raise not_the_model(f"{name}.bias", "a bias, which the model has", "none")
    moved = Packed(*(parts[part].to(report.device) for part in KINDS))
    if bias is not None:
        bias = bias.to(report.device, report.dtype)
    linear = QuantLinear(moved, bias, bits=layout.bits, zero_offset=layout.zero_offset)
    report.used[name] = _assign(linear, name, report, exact)
    made: nn.Module = linear.dense(report.dtype) if report.used[name] == "dense" else linear
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, made)
    return {f"{name}.{part}" for part in (*KINDS, "bias")}


def _assign(linear: QuantLinear, name: str, report: KernelReport, exact: bool) -> str:
    """The kernel for one linear, set up."""
    kernel = report.requested
    if kernel == "dense":
        return kernel
    if kernel == "auto" and report.device.type == "cuda" and not exact:
        # Linears of one shape and layout are alike: one of them is tried.
        shape = (linear.in_features, linear.out_features)
        like = (*shape, linear.bits, linear.group, linear.symmetric)
        if like not in report.tried:
            report.tried[like] = fastest(linear, report.dtype, report.without, report.compiled)
            logger.info("%s: %s", name, report.tried[like][1])
        kernel = report.tried[like][0]
        if kernel == "dequantize":
            report.passed_over[name] = report.tried[like][1]
    elif kernel == "auto":
        kernel, why = on_cpu(linear, exact)
        if why is not None:
            report.passed_over[name] = why
            logger.debug("%s: not torch-int4: %s", name, why)
    elif why := misfit(linear, kernel):
        raise SpecError(
            f"kernel {kernel} for {name}",
            expected="a linear that it fits",
            got=why,
            cure="Use kernel auto or dequantize.",
        )
    linear.use(kernel, report.dtype)
    return kernel


def fill(
    model: Any, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype
) -> Iterable[str]:
    """Give every parameter and buffer that is still on meta its tensor; the names used."""
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    head = model.get_output_embeddings()
    used = set()
    for prefix, module in list(model.named_modules()):
        if isinstance(module, QuantLinear):
            continue
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            name = f"{prefix}.{leaf}" if prefix else leaf
            if tied and module is head:
                used.add(name)  # tied below; a copy in the file is the same matrix
            elif parameter.is_meta:
                if name not in checkpoint.tensors:
                    raise not_the_model(name, "a tensor of this name", "none in the checkpoint")
                if checkpoint.tensors[name].shape != tuple(parameter.shape):
                    got = list(checkpoint.tensors[name].shape)
                    raise not_the_model(name, f"shape {list(parameter.shape)}", got)
                tensor = _cast(checkpoint.read(name), name, device, dtype)
                setattr(module, leaf, nn.Parameter(tensor, requires_grad=False))
                used.add(name)
        for leaf, buffer in list(module.named_buffers(recurse=False)):
            if not buffer.is_meta:
                setattr(module, leaf, buffer.to(device))
    if tied:
        head.weight = model.get_input_embeddings().weight
    if left := [n for n, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]:
        raise not_the_model(left[0], "a value", "nothing to compute it from")
    return used


def _cast(tensor: Tensor, name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    if not tensor.is_floating_point():
        raise not_the_model(name, "a floating dtype", str(tensor.dtype))
    return tensor.to(device=device, dtype=dtype)


def said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def not_the_model(name: str, expected: str, got: object) -> CheckpointError:
    return CheckpointError(
        name,
        expected=expected,
        got=got,
        cure="config.json and the weights are not of the same model, or the copy is incomplete.",
    )
