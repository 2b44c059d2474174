"""A directory made runnable: built without memory, filled tensor by tensor, under a named kernel.

`load` takes a GPTQ directory (ours or another tool's, v1 or v2, with settings per linear in
`dynamic` or not) or an unquantized one. The model is
made on the meta device by transformers' classes (original Qwen's are ours, `models.register`), each
quantized linear becomes a `kernels.QuantLinear` around the tensors of the file, and everything else
is read, cast and put in its place one tensor at a time, so the peak is the model and one tensor.
Nothing is unpickled, downloaded or guessed: a tensor that is missing or of another shape is an
error that names it. Neither gptqmodel nor optimum is needed.

Which kernel ran is part of the answer (`Loaded.kernel`): under `auto` each linear gets `torch-int4`
where it fits and `dequantize` elsewhere, with the reason; a kernel asked for by name that does not
fit is refused. The dtype follows the rule in `devices`: without instructions for it, bfloat16
products measured 8 times slower than float32 on a CPU.

bitsandbytes directories, and unquantized ones with `method="nf4"`, go through transformers' own
quantizer (`bnb.py`), which is where their kernels are.

Left out on purpose: several devices at once for GPTQ (use `from_pretrained` with `device_map`),
training. The CUDA paths have not yet been run on a GPU.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import compressed, compressed_layout
from .bnb import check_loadable, load_model, stored_bytes
from .bnb_layout import is_bnb
from .bnb_spec import METHODS, BnbSpec
from .checkpoint import Checkpoint
from .compiling import check_compiler, compile_generate
from .devices import choose_device, choose_dtype
from .directory import read_json
from .errors import CheckpointError, SpecError
from .kernels import (
    FEW_TOKENS,
    KERNELS,
    TRITON_ROWS,
    QuantLinear,
    fastest,
    int4_misfit,
    int4_unwise,
    measure_few_tokens,
    misfit,
)
from .layout import KINDS, Layout
from .models import register
from .models.experts import split_experts
from .models.families import check_config, family_of
from .models.tokenizer import load_tokenizer
from .pack import Packed
from .vocabulary import STORED_NOTE, keep_stored, stored_weights

logger = logging.getLogger(__name__)

_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "qwen.tiktoken", "vocab.json")


@dataclass(frozen=True)
class KernelReport:
    """Which kernel runs which linear, and why not another.

    Attributes:
        requested: the `kernel` argument.
        device, dtype: where and in what the model computes.
        used: kernel by linear; empty for an unquantized directory.
        passed_over: why `auto` did not give a linear `torch-int4`, by linear.
        weight_bytes: bytes of all weights as held in memory, torch's own packings included.
        compute_dtype: of the products of bitsandbytes' 4-bit linears; None where there are none.
        placed: device by part of the model, where a `device_map` spread it; `device` is then that
            of the embedding.
        few_tokens: rows up to which `torch-int4` runs; more go through `dequantize`.
        notes: what is not as one might expect, in words.
        tried: under `auto` on CUDA, by (inputs, outputs, bits, group): the kernel that was fastest
            and right, and every candidate's time for one row or what is wrong with it.
    """

    requested: str
    device: torch.device
    dtype: torch.dtype
    used: dict[str, str] = field(default_factory=dict)
    passed_over: dict[str, str] = field(default_factory=dict)
    weight_bytes: int = 0
    compute_dtype: torch.dtype | None = None
    placed: dict[str, str] = field(default_factory=dict)
    few_tokens: int = FEW_TOKENS
    notes: tuple[str, ...] = ()
    tried: dict[tuple[int, ...], tuple[str, str]] = field(default_factory=dict)

    @property
    def counts(self) -> dict[str, int]:
        """Linears by kernel."""
        return dict(Counter(self.used.values()))

    @property
    def reasons(self) -> dict[str, int]:
        """Linears by the reason `torch-int4` was passed over."""
        return dict(Counter(self.passed_over.values()))

    def __str__(self) -> str:
        places = ", ".join(dict.fromkeys(self.placed.values())) or self.device
        where = f"{_plain(self.dtype)} on {places}"
        if not self.used:
            return f"no quantized linears, {where}"
        parts = [f"{name} for {count} linears" for name, count in sorted(self.counts.items())]
        if "torch-int4" in self.counts:
            parts.append(
                f"int4 inputs in bfloat16 and up to {self.few_tokens} rows, beyond dequantize"
            )
        if "triton-int4" in self.counts:
            parts.append("triton-int4 for few rows, beyond dequantize")
        parts += [f"not torch-int4 for {n}: {why}" for why, n in self.reasons.items()]
        if self.compute_dtype is not None:
            parts.append(f"4-bit products in {_plain(self.compute_dtype)}")
        return "; ".join([*parts, where, *self.notes])


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


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
            results; None or `auto` for the rule in `devices`. Asking for float32 keeps kernel
            `auto` exact: it then leaves `torch-int4`, which rounds its inputs to bfloat16, alone.
        trust_remote_code: let transformers run the directory's own Python. Original Qwen does not
            need it, nor do Qwen2 and Qwen3.
        method: quantize an unquantized directory while it is loaded: `nf4`, `fp4`, `int8`, or a
            `BnbSpec`. Needs bitsandbytes, as a directory of such a method does.
        compute_dtype: of the products of bitsandbytes' 4-bit linears. None or `auto` for what the
            directory says (with `method`, `dtype`), but float16 on a GPU without bfloat16; what it
            came to is in the report.
        device_map, max_memory: as in transformers; with bitsandbytes only. They take the place of
            `device`.
        few_tokens: rows (tokens times batch) up to which kernel `torch-int4` runs; more go through
            `dequantize`. None measures on a CPU where the two meet, 32 at the most, which takes a
            moment and may come out differently another time; what it came to is in the report.
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
    config = _config(checkpoint, trust_remote_code)
    chosen = choose_dtype(dtype, place, getattr(config, "dtype", None))
    model = _build(config, chosen, trust_remote_code)
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
    report = KernelReport(kernel, place, chosen)
    exact = dtype not in (None, "auto") and chosen == torch.float32
    taken: set[str] = set()
    if layout is not None:
        for name in linears:
            own = layout.of(name)
            if own is None:
                raise _misfit(name, "plain weights, as `dynamic` says", "quantized ones")
            taken.update(_replace(model, name, checkpoint, own, report, exact))
    if (
        place.type == "cpu"
        and chosen == torch.float32
        and kernel == "auto"
        and linears
        and not exact
    ):
        if stored := keep_stored(model, family, checkpoint):
            report = replace(report, notes=(STORED_NOTE,))
            taken.update(stored)
    taken.update(_fill(model, checkpoint, place, chosen))
    if rest := sorted(set(checkpoint.tensors) - taken):
        logger.warning("%d tensors of the file have no place in the model: %s", len(rest), rest[:4])
    model.requires_grad_(False).eval()
    report = _settle_few_tokens(_weighed(report, model), model, few_tokens)
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
    config = _config(checkpoint, trust_remote_code)
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


def _config(checkpoint: Checkpoint, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(
            checkpoint.path, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as error:  # whatever a config class raises over values it was not made for
        raise CheckpointError(
            "config.json", expected="a configuration transformers can read", got=_said(error)
        ) from error


def _build(config: Any, dtype: torch.dtype, trust_remote_code: bool) -> Any:
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
            "config.json", expected="values that make a model", got=_said(error)
        ) from error
    for name, module in list(model.named_modules()):
        if any(b.is_meta for b in module.buffers(recurse=False)):
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], type(module)(config=module.config))
    return model


def _replace(
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
        raise _misfit(name, "a linear of the model", "none of that name") from error
    if not isinstance(module, nn.Linear):
        raise _misfit(name, "a linear of the model", type(module).__name__)
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
            raise _misfit(f"{name}.{part}", f"shape {list(shape)}", list(parts[part].shape))
    index = parts["g_idx"]
    if not 0 <= int(index.min()) <= int(index.max()) < groups:
        got = f"{int(index.min())} to {int(index.max())}"
        raise _misfit(f"{name}.g_idx", f"entries 0 to {groups - 1}", got)
    bias, biased = None, getattr(module, "bias", None) is not None
    if f"{name}.bias" in checkpoint.tensors:
        bias = checkpoint.read(f"{name}.bias")
        if tuple(bias.shape) != (n,):
            raise _misfit(f"{name}.bias", f"shape [{n}]", list(bias.shape))
        if not biased and not bool(bias.any()):
            bias = None  # the published files hold zeros where the model has no bias
    elif biased:
        raise _misfit(f"{name}.bias", "a bias, which the model has", "none")
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
        like = (linear.in_features, linear.out_features, linear.bits, linear.group)
        if like not in report.tried:
            report.tried[like] = fastest(linear, report.dtype)
            logger.info("%s: %s", name, report.tried[like][1])
        kernel = report.tried[like][0]
        if kernel == "dequantize":
            report.passed_over[name] = report.tried[like][1]
    elif kernel == "auto":
        why = int4_misfit(linear) or int4_unwise(report.device)
        if why is None and exact:
            why = "float32 was asked for, and the op rounds its inputs to bfloat16"
        if why is not None:
            report.passed_over[name] = why
            logger.debug("%s: not torch-int4: %s", name, why)
        kernel = "dequantize" if why is not None else "torch-int4"
    elif why := misfit(linear, kernel):
        raise SpecError(
            f"kernel {kernel} for {name}",
            expected="a linear that it fits",
            got=why,
            cure="Use kernel auto or dequantize.",
        )
    linear.use(kernel)
    return kernel


def _fill(
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
                    raise _misfit(name, "a tensor of this name", "none in the checkpoint")
                if checkpoint.tensors[name].shape != tuple(parameter.shape):
                    got = list(checkpoint.tensors[name].shape)
                    raise _misfit(name, f"shape {list(parameter.shape)}", got)
                tensor = _cast(checkpoint.read(name), name, device, dtype)
                setattr(module, leaf, nn.Parameter(tensor, requires_grad=False))
                used.add(name)
        for leaf, buffer in list(module.named_buffers(recurse=False)):
            if not buffer.is_meta:
                setattr(module, leaf, buffer.to(device))
    if tied:
        head.weight = model.get_input_embeddings().weight
    if left := [n for n, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]:
        raise _misfit(left[0], "a value", "nothing to compute it from")
    return used


def _cast(tensor: Tensor, name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    if not tensor.is_floating_point():
        raise _misfit(name, "a floating dtype", str(tensor.dtype))
    return tensor.to(device=device, dtype=dtype)


def _weighed(report: KernelReport, model: nn.Module) -> KernelReport:
    """`report` with the bytes of the model's weights, each storage counted once."""
    total, seen = 0, set()
    for module in model.modules():
        if isinstance(module, QuantLinear):
            total += module.nbytes
            continue
        for tensor in (*module.parameters(recurse=False), *stored_weights(module)):
            if tensor.data_ptr() not in seen:
                seen.add(tensor.data_ptr())
                total += tensor.numel() * tensor.element_size()
    return replace(report, weight_bytes=total)


def _settle_few_tokens(report: KernelReport, model: nn.Module, asked: int | None) -> KernelReport:
    """Tells every `torch-int4` linear up to how many rows to run, measured on the largest."""
    own = [m for m in model.modules() if isinstance(m, QuantLinear)]
    for linear in own:
        if linear.kernel == "triton-int4":
            linear.few_tokens = TRITON_ROWS if asked is None else asked
    linears = [m for m in own if m.kernel == "torch-int4"]
    if not linears:
        return report
    few = FEW_TOKENS if asked is None else asked
    if asked is None and report.device.type == "cpu":
        widest = max(linears, key=lambda m: m.in_features * m.out_features)
        few = measure_few_tokens(widest, report.dtype)
    for linear in linears:
        linear.few_tokens = few
    twice = sum(linear.packings == 2 for linear in linears)
    notes = (f"{twice} linears hold their codes twice",) if twice else ()
    return replace(report, few_tokens=few, notes=(*report.notes, *notes))


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
            got=_said(error),
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


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _misfit(name: str, expected: str, got: object) -> CheckpointError:
    return CheckpointError(
        name,
        expected=expected,
        got=got,
        cure="config.json and the weights are not of the same model, or the copy is incomplete.",
    )
