"""bitsandbytes models loaded and saved: from a directory, or from a 16-bit one on the fly.

Loading is transformers' own: its quantizer builds the linears, so what runs here is what runs for
anybody who calls `from_pretrained`. What is added is the choice of dtypes (a GPU without bfloat16
computes in float16; a CPU without native bfloat16 in float32), a word on what stays in 16 bits
unasked (a mixture's experts), and a mark on models that have run.

The mark is for saving. bitsandbytes 0.50.2 repacks 4-bit weights during a forward on a CPU with
AVX512-BF16 and, asked to save afterwards, writes scales that are transposed and rounded, and leaves
the model in memory damaged. So `save` refuses a model that has run, by the mark or by what the
forward left in it, and opens what it wrote before anybody can find it. `convert`'s way to a
directory (`bnb_convert.py`) runs nothing forward and is the usual one; it streams, and makes the
card and the manifest too.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .bnb_check import check_states
from .bnb_layout import BnbLayout, is_bnb, quantization_config
from .bnb_spec import HEAD, BnbSpec, skipped
from .bnb_state import left_in_16_bit, need_bitsandbytes
from .checkpoint import Checkpoint
from .devices import native_bfloat16
from .errors import CheckpointError, RunError, SpecError, VerifyError
from .findings import VerifyReport, some
from .models import register
from .models.families import family_of
from .publish import WorkDir
from .sums import write_sums

log = logging.getLogger(__name__)

MIXTURES = ("qwen2_moe", "qwen3_moe")  # loaded by transformers alone, and only on the fly
_RAN = "_qquant_has_run"


def compute_dtype(spec: BnbSpec, dtype: str, device: torch.device) -> str:
    """What a spec's `auto` comes to where weights are `dtype`; what is named stays."""
    if spec.compute_dtype != "auto":
        return spec.compute_dtype
    if device.type == "cuda" and dtype == "bfloat16" and not native_bfloat16(device):
        return "float16"
    return dtype


def check_loadable(checkpoint: Checkpoint) -> None:
    """Refuses what is no Qwen. A mixture of experts may be loaded: its experts stay in 16 bits and
    are named.

    Raises:
        CheckpointError: `model_type` is another's, or not supported.
    """
    if checkpoint.config.get("model_type") not in MIXTURES:
        family_of(checkpoint.config)


def load_model(
    checkpoint: Checkpoint,
    spec: BnbSpec | None,
    *,
    device: torch.device,
    dtype: torch.dtype,
    device_map: Any = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, dict[str, str]]:
    """A model whose linears are bitsandbytes'.

    Args:
        checkpoint: a bitsandbytes directory with `spec` None, or a 16-bit one to quantize with it.
        device: where all of it goes, unless a `device_map` says otherwise.
        dtype: of everything that is not quantized; at 4 bits also of the products, unless the spec
            names another.
        device_map, max_memory: transformers' own.

    Returns:
        (the model in eval mode, method by quantized linear).

    Raises:
        MissingDependencyError: bitsandbytes is missing or too old.
        CheckpointError: the directory does not fit `spec`, or transformers cannot load it.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    need_bitsandbytes()
    register()
    local = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    try:
        config = AutoConfig.from_pretrained(checkpoint.path, **local)
        more: dict[str, Any] = {}
        if spec is not None:
            name = str(dtype).removeprefix("torch.")
            more["quantization_config"] = _transformers_config(checkpoint, spec, name, device)
        if max_memory is not None:
            more["max_memory"] = dict(max_memory)
            device_map = "auto" if device_map is None else device_map
        with _no_progress():
            model = AutoModelForCausalLM.from_pretrained(
                checkpoint.path,
                config=config,
                dtype=dtype,
                device_map={"": device} if device_map is None else device_map,
                use_safetensors=True,
                **local,
                **more,
            )
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"{checkpoint.path.name}, loaded by transformers with bitsandbytes",
            expected="a model it can load",
            got=(str(error).splitlines() or [type(error).__name__])[0][:300],
        ) from error
    model.requires_grad_(False).eval()
    linears = dict(bnb_linears(model))
    if spec is None:
        _compute_in(model, linears, dtype)
    mark_runs(model)
    method = spec.method if spec else BnbLayout.parse(checkpoint.quantization_config or {}).method
    if not linears:
        raise CheckpointError(
            checkpoint.path.name, expected="linears that bitsandbytes can quantize", got="none"
        )
    if stay := stays_in_16_bit(model):
        log.warning(
            "%d matrices stay in 16 bits, bitsandbytes does not quantize them: %s",
            len(stay),
            some(stay),
        )
    return model, {name: f"bitsandbytes {method}" for name in linears}


def _compute_in(model: Any, linears: Mapping[str, Any], dtype: torch.dtype) -> None:
    """Takes what is not quantized to `dtype`, and 4-bit products too.

    transformers leaves a quantized directory's tensors in the dtype of the file, whatever dtype is
    asked for.
    """
    packed = {id(module.weight) for module in linears.values()}
    with torch.no_grad():
        for parameter in model.parameters():
            if id(parameter) not in packed and parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
    for module in linears.values():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = dtype
            module.compute_type_is_set = True
    model.config.dtype = dtype
    if hasattr(model.config, "set_precision"):  # original Qwen says it in flags, too
        model.config.set_precision(dtype)


@contextmanager
def _no_progress() -> Iterator[None]:
    """Keeps transformers from drawing, which is the caller's to decide."""
    from transformers.utils import logging as transformers_logging

    drawn = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if drawn:
            transformers_logging.enable_progress_bar()


def stored_bytes(model: nn.Module) -> int:
    """Bytes of the model's weights with the scales and tables of its linears."""
    held = {t.data_ptr(): t for t in model.state_dict().values()}
    return sum(t.numel() * t.element_size() for t in held.values())


def _transformers_config(
    checkpoint: Checkpoint, spec: BnbSpec, dtype: str, device: torch.device
) -> Any:
    """The spec as transformers' `BitsAndBytesConfig`."""
    from transformers import BitsAndBytesConfig

    if checkpoint.quantization_config is not None:
        raise SpecError(
            "method",
            expected="a 16-bit checkpoint to quantize on the fly",
            got=f"{checkpoint.path.name}, quantized already",
            cure="Leave method out to load it as it is",
        )
    names = [
        info.name.removesuffix(".weight")
        for info in checkpoint.tensors.values()
        if info.name.endswith(".weight") and len(info.shape) == 2
    ]
    skip = sorted({*skipped(names, spec.skip), *({HEAD} & set(spec.skip))})
    return BitsAndBytesConfig(**quantization_config(spec, compute_dtype(spec, dtype, device), skip))


def bnb_linears(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The bitsandbytes linears of a model, by name."""
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    for name, module in model.named_modules():
        if isinstance(module, (Linear4bit, Linear8bitLt)):
            yield name, module


def stays_in_16_bit(model: nn.Module) -> list[str]:
    """Matrices of a loaded model that stay in 16 bits without having been left out by name."""
    config: Any = model.config
    quant = config.quantization_config
    named = quant.get("llm_int8_skip_modules") if isinstance(quant, dict) else None
    named = named or getattr(quant, "llm_int8_skip_modules", None) or []
    linears = {name for name, _ in bnb_linears(model)}
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    embeddings = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) or module is model.get_output_embeddings()  # type: ignore[operator]
    }
    apart = {f"{name}.weight" for name in {*embeddings, *named}}
    return left_in_16_bit(shapes, linears, apart)


def mark_runs(model: nn.Module) -> None:
    """From now on a forward of the model leaves a mark that `has_run` sees."""

    def hook(module: nn.Module, args: Any) -> None:
        setattr(module, _RAN, True)

    setattr(model, _RAN, getattr(model, _RAN, False))
    model.register_forward_pre_hook(hook)


def has_run(model: nn.Module) -> str | None:
    """By what it shows that a model has run, or None where nothing does.

    A model that `load_model` did not load shows it only where the forward changed its state, which
    is where saving it would do harm.
    """
    if getattr(model, _RAN, False):
        return "a forward was run since it was loaded"
    for name, module in bnb_linears(model):
        state = getattr(module.weight, "quant_state", None)
        if state is not None:
            if getattr(state, "packing_format_for_cpu", False):
                return f"{name} is packed for this CPU"
            nested = bool(getattr(state, "nested", False))
            right = torch.uint8 if nested else torch.float32
            if state.absmax.dtype != right or state.absmax.dim() != 1:
                return f"the scales of {name} are {state.absmax.dtype} {list(state.absmax.shape)}"
        elif getattr(getattr(module, "state", None), "CB", None) is not None:
            return f"{name} holds its codes where a forward puts them"
    return None


def save(
    model: Any,
    dst: str | os.PathLike[str],
    tokenizer: Any = None,
    *,
    overwrite: bool = False,
) -> Path:
    """Saves a loaded bitsandbytes model that has not run; the target appears once it is verified.

    For a published directory use `qquant quantize`, which also writes the card and the manifest.

    Args:
        model: loaded with bitsandbytes, by `load` or by `from_pretrained`.
        dst: must not exist, unless `overwrite`.
        tokenizer: saved beside it, if given.

    Raises:
        RunError: the model has run. Load it again and save it first.
        SpecError: it is no bitsandbytes model.
        VerifyError: what was written is not whole; the target is as it was.
    """
    quant = getattr(model.config, "quantization_config", None)
    found = quant if isinstance(quant, dict) or quant is None else quant.to_dict()
    if not is_bnb(found):
        raise SpecError("model", expected="one loaded with bitsandbytes", got="another")
    if why := has_run(model):
        raise RunError(
            "model",
            expected="one that has not run yet",
            got=why,
            cure="Load it again and save it before any forward: bitsandbytes 0.50.2 writes damaged "
            "scales after one, on CPUs with AVX512-BF16",
        )
    with WorkDir(dst, need_bytes=stored_bytes(model), overwrite=overwrite) as work:
        # transformers cannot take back what its loader of quantized files did; for dense models
        # there is nothing to take back.
        mixture = getattr(model.config, "model_type", None) in MIXTURES
        model.save_pretrained(work.path, save_original_format=mixture)
        if tokenizer is not None:
            tokenizer.save_pretrained(work.path)
        written = Checkpoint.open(work.path)
        report = VerifyReport(work.path.name)
        rows = check_states(written, BnbLayout.parse(written.quantization_config or {}), report)
        count = sum(1 for _ in bnb_linears(model))
        if len(rows) != count:
            report.problem("quantized linears", count, len(rows))
        if not report.ok:
            raise VerifyError(
                "the written directory",
                expected="whole bitsandbytes states",
                got="; ".join(str(p) for p in report.problems[:3]),
                cure="The target was not touched; load the model again and save it at once",
            )
        write_sums(work.path, {})
        return work.publish()
